"""The alignment of projected captions to CLIP's text tower: its loss, the tower, its weights, and what is refused."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizerFast

from tests.objectives.test_stage2 import batch_of, gradients, objective, small
from umt_fast.config import CLIP_TEXT_LENGTH, ConfigError, Stage2Config, Stage2Losses, TeacherConfig
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.models.teachers.clip_text import load_clip_text
from umt_fast.models.weights import WeightsError, save_state

open_clip = pytest.importorskip("open_clip")
CAPTIONS = ["a red thing", "it moves left", "a thing moves and stops " * 30]


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    """A whole CLIP with the visual sizes of `small` and a text tower of two blocks."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(width=64, heads=1, layers=2)
    return open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def weights(clip: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_state(clip.state_dict(), path)
    return path


def teacher(weights: object, **changes: object) -> TeacherConfig:
    sizes = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "image_size": 32, "output_dim": 12}
    return TeacherConfig(**(sizes | {"weights": str(weights)} | changes))


def aligned(weights: Path, **losses: float) -> Stage2Config:
    return small(teacher=teacher(weights), losses=Stage2Losses(**losses))


def tokens_of(folder: Path, *, asked: bool = True, fixed: bool = False) -> Tokens:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]))
    tokenizer = BertTokenizerFast.from_pretrained(str(folder))
    return Tokens(CAPTIONS, tokenizer, max_length=8, fixed=fixed, teacher=asked)


def batch_with_captions(folder: Path) -> dict[str, Tensor]:
    return batch_of(2, 3, 7, 0) | {"teacher_ids": tokens_of(folder).teacher_ids(torch.arange(3))}


def test_loss_and_gradients_against_the_formula(clip: torch.nn.Module, weights: Path, tmp_path: Path) -> None:
    """Mean over captions of 1 - cos(projected class token, CLIP's own embedding), in float64."""
    module = objective(aligned(weights, vtc=0, vtm=0, mlm=0, uta=0, text_projection=2.0))
    batch = batch_with_captions(tmp_path)
    found = module(batch, torch.tensor([5]))
    assert found.keys() == {"loss", "text_projection"}
    ours = gradients(module, found["loss"])
    exact, clip = copy.deepcopy(module.model).double(), copy.deepcopy(clip).double()
    ours_alone = exact.text_proj(exact.text_encoder.encode(batch["ids"], batch["mask"])[:, 0])
    with torch.no_grad():
        theirs = clip.encode_text(open_clip.tokenize(CAPTIONS))
    cosine = (ours_alone * theirs).sum(1) / ours_alone.norm(dim=1) / theirs.norm(dim=1)
    loss = (1 - cosine).mean()
    torch.testing.assert_close(found["text_projection"].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"].double(), 2 * loss.detach(), rtol=1e-5, atol=1e-6)
    exact.zero_grad(set_to_none=True)
    (2 * loss).backward()
    expected = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    assert {"text_proj.weight", "text_encoder.bert.embeddings.word_embeddings.weight"} <= expected.keys()
    assert {name for name, value in ours.items() if value.any()} == {n for n, v in expected.items() if v.any()}
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm() + 1e-6 * largest, name


def test_both_projections_beside_the_four_losses(weights: Path, tmp_path: Path) -> None:
    module = objective(aligned(weights, vision_projection=0.5, text_projection=0.25))
    found = module(batch_with_captions(tmp_path), torch.tensor([5]))
    sum_of = sum(found[name] for name in ("vtc", "vtm", "mlm", "uta"))
    whole = sum_of + 0.5 * found["vision_projection"] + 0.25 * found["text_projection"]
    torch.testing.assert_close(found["loss"].detach(), whole)


def test_the_tower_is_open_clips(clip: torch.nn.Module, weights: Path, tmp_path: Path) -> None:
    """At every length that holds the end token; rounded to bf16 nearly."""
    tower = load_clip_text(teacher(weights))
    expected = clip.encode_text(open_clip.tokenize(CAPTIONS), normalize=True).detach()
    ids = tokens_of(tmp_path, fixed=True).teacher_ids(torch.arange(3))
    assert ids.shape == (3, CLIP_TEXT_LENGTH) and ids[2, -1] == ids.max() == 49407
    torch.testing.assert_close(tower(ids), expected, rtol=1e-4, atol=1e-5)
    short = tokens_of(tmp_path).teacher_ids(torch.arange(2))
    assert short.shape == (2, 5)
    torch.testing.assert_close(tower(short), expected[:2], rtol=1e-4, atol=1e-5)
    rounded = tower.compute_in(torch.bfloat16)(ids)
    assert tower.tower.transformer.get_cast_dtype() == torch.bfloat16 and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.02)


def test_gelu_weights_are_computed_with_gelu(weights: Path, clip: torch.nn.Module, tmp_path: Path) -> None:
    tower = load_clip_text(teacher(weights, activation="gelu"))
    ids = tokens_of(tmp_path).teacher_ids(torch.arange(2))
    with torch.no_grad():
        gap = tower(ids) - clip.encode_text(open_clip.tokenize(CAPTIONS[:2]), normalize=True)
    assert gap.abs().max() > 1e-4


def test_the_tower_is_frozen_and_runs_once_a_batch(weights: Path, tmp_path: Path) -> None:
    module = objective(aligned(weights, text_projection=1.0)).train()
    tower = module.teacher_text
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    assert not set(map(id, tower.parameters())) & set(map(id, module.trainable.parameters()))
    calls = []
    tower.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    batch = batch_with_captions(tmp_path)
    module(batch, torch.tensor([5]))["loss"].backward()
    assert calls == [False]
    images = {f"image_{name}": value for name, value in batch.items()} | {"image_video": batch["video"][:, :1]}
    first, second = module.prepare(batch | images, torch.tensor([5]))
    assert len(calls) == 3 and torch.equal(first.caption, second.caption)


def test_switched_off_there_is_no_text_tower(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umt_fast.models.teachers.clip.load_clip_text", lambda config: pytest.fail("loaded"))
    module = objective(aligned(weights))
    assert module.teacher_text is None
    found = module(batch_of(2, 3, 7, 0), torch.tensor([5]))
    assert "text_projection" not in found
    assert tokens_of(tmp_path, asked=False).columns(torch.arange(3)).keys() == {"ids", "mask"}


def test_ids_travel_to_the_decoding_processes(tmp_path: Path) -> None:
    columns = pickle.loads(pickle.dumps(tokens_of(tmp_path).columns))(torch.tensor([1, 0]))
    assert columns.keys() == {"ids", "mask", "teacher_ids"}
    assert torch.equal(columns["teacher_ids"], open_clip.tokenize([CAPTIONS[1], CAPTIONS[0]])[:, :5])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda state: {k.removeprefix("visual."): v for k, v in state.items() if "visual." in k},
            "hold no CLIP text tower",
        ),
        (lambda state: {k: v for k, v in state.items() if k.startswith("visual.")}, "hold no CLIP text tower"),
        (lambda state: state | {"text_projection": torch.zeros(64, 10)}, "'output_dim': 10"),
        (lambda state: state | {"token_embedding.weight": torch.zeros(9, 64)}, "'words': 9"),
        (lambda state: state | {"token_embedding.weight": torch.zeros(49408, 32)}, "'width': 32"),
        (lambda state: state | {"positional_embedding": torch.zeros(16, 64)}, "'positions': 16"),
        (lambda state: state | {"text_projection": torch.zeros(12)}, "hold no CLIP text tower"),
        (lambda state: {k: v for k, v in state.items() if k != "ln_final.bias"}, "missing: ln_final.bias"),
    ],
    ids=["official visual", "visual", "output", "words", "width", "positions", "projection", "missing"],
)
def test_weights_without_a_fitting_text_tower(
    change: object, expected: str, clip: torch.nn.Module, tmp_path: Path
) -> None:
    save_state(change(clip.state_dict()), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=expected) as found:
        load_clip_text(teacher(tmp_path / "other.pth"))
    assert "other.pth" in str(found.value)


def test_names_and_sizes_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'?untrained'?: losses.text_projection needs a trained CLIP"):
        load_clip_text(teacher("untrained"))
    with pytest.raises(
        WeightsError, match=r"coca_ViT-B-32 has a text tower of another kind \(embed_cls, output_tokens\)"
    ):
        load_clip_text(teacher("coca_ViT-B-32:laion2b_s13b_b90k"))
    with pytest.raises(ConfigError, match=r"losses.text_projection needs embed_dim 10"):
        small(embed_dim=10, losses=Stage2Losses(text_projection=1.0))
    with pytest.raises(ConfigError, match="losses.text_projection is -1"):
        Stage2Losses(text_projection=-1)
