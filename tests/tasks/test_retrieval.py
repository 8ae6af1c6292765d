"""Retrieval figures on scores known by hand, and re-ranking against the plain way of doing it."""

import pytest
import torch

from umt_fast.config import TextConfig, VitConfig
from umt_fast.data.captions import Tokens
from umt_fast.models.multimodal import VideoText
from umt_fast.tasks.retrieval import encode_texts, recalls, rerank


def test_recalls_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.5, 0.6, 0.4]])
    figures = recalls(scores, torch.eye(3, dtype=torch.bool), "x")
    assert figures["x_r1"] == pytest.approx(1 / 3) and figures["x_r5"] == 1.0
    assert figures["x_median_rank"] == 2


def test_several_right_answers_count_by_the_best() -> None:
    scores, right = torch.tensor([[0.1, 0.9, 0.8]]), torch.tensor([[True, False, True]])
    assert recalls(scores, right, "x")["x_median_rank"] == 2


def test_constant_scores_are_chance_and_not_a_hit() -> None:
    assert recalls(torch.zeros(100, 100), torch.eye(100, dtype=torch.bool), "x")["x_r10"] == 0.0


class Words:
    """A tokenizer of numbers."""

    cls_token_id, sep_token_id, pad_token_id = 2, 3, 0

    def __call__(self, captions: list[str], add_special_tokens: bool) -> dict:
        return {"input_ids": [[5 + int(word) for word in caption.split()] for caption in captions]}


def test_rerank_equals_one_pair_at_a_time() -> None:
    torch.manual_seed(0)
    vit = VitConfig(width=32, depth=1, num_heads=2, image_size=32, num_frames=2, drop_path=0.0)
    text = TextConfig(width=32, depth=3, fusion_layer=1, num_heads=2, vocab_size=20, max_positions=8)
    model = VideoText(vit, text, num_layers=1, output_dim=8, embed_dim=8).eval()
    torch.nn.init.normal_(model.itm_head.weight)
    clips, dual = torch.randn(3, 8, 32), torch.randn(3, 5)
    tokens = Tokens(["1 2 3", "4", "5 6", "7 8 9 1", "2"], Words(), max_length=6)
    cpu = torch.device("cpu")
    texts = encode_texts(model, tokens, 5, batch_size=2, device=cpu)
    v2t, t2v = rerank(model, dual, clips, texts, top_k=2, pairs=2, device=cpu)
    expected = torch.empty(3, 5)
    with torch.no_grad():
        for row in range(3):
            for column in range(5):
                ids, mask = tokens[torch.tensor([column])]
                keys = model.text_encoder.clip_keys(clips[row : row + 1])
                fused = model.text_encoder.fuse(model.text_encoder.encode(ids, mask)[None], mask[None], keys)
                expected[row, column] = model.match(fused[0])[0, 1]
    for found, axis in ((v2t, 1), (t2v, 0)):
        kept = torch.zeros(3, 5, dtype=torch.bool).scatter_(axis, dual.topk(2, dim=axis).indices, True)
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
        assert (found[~kept] == -100).all()
