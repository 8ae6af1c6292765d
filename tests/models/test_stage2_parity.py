"""The stage-2 model and losses against what the official implementation computed from the same weights.

Every `stage2_*.safetensors` of parity_files is a case; everything that may vary comes from its metadata.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from tests.parity_files import parity_files, read_case, relative, tower_of
from umt_fast.config import AlignConfig, Stage2Losses, TextConfig
from umt_fast.models.video_text import HEAD_EPS, VideoText
from umt_fast.models.weights import fit
from umt_fast.tasks import video_text_losses as vision_text
from umt_fast.tasks.video_text_losses import stage2_losses

CASES = parity_files("stage2")
LIMIT = 1e-4


class Case:
    """One file: its tensors, and our model filled with its weights."""

    def __init__(self, path: Path) -> None:
        sizes, self.tensors = read_case(path)
        vit = tower_of(sizes)
        self.align = AlignConfig(num_layers=sizes["k"], normalize=sizes.get("fmt", "l2"), loss=sizes.get("loss", "l2"))
        parts = ("vision_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
        state = {key: value for key, value in self.tensors.items() if key.startswith(parts)}
        self.model = VideoText(
            vit,
            TextConfig(
                width=state["text_proj.weight"].shape[1],
                depth=sizes["layers"],
                fusion_layer=sizes["fusion"],
                num_heads=sizes["theads"],
                vocab_size=sizes["vocab"],
                max_positions=state["text_encoder.bert.embeddings.position_ids"].shape[1],
                hidden_dropout=0.0,
                attention_dropout=0.0,
            ),
            num_layers=sizes["k"],
            output_dim=sizes["tout"],
            embed_dim=sizes["emb"],
        )
        fit(self.model, state | {"temp": self.tensors["in.temp"].reshape(())}, str(path))

    def batch(self, kind: str) -> dict[str, Tensor]:
        """Arguments of stage2_losses for the clips or the images of the file."""
        t = self.tensors
        mask = t[f"in.{kind}_mask"]
        return {
            "video": t[f"in.{kind}"],
            "visible": (~mask).nonzero()[:, 1].view(len(mask), -1).to(torch.int32),
            "ids": t["in.input_ids"],
            "mask": t["in.attention_mask"].bool(),
            "index": t["in.idx"],
            "masked_ids": t["in.mlm_input_ids"],
            "labels": t["in.mlm_labels"],
            "seed": torch.tensor([1]),
            "negatives": (t["in.vision_negatives"], t["in.text_negatives"]),
        }


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest):
    with kernels.force_backend(request.param):
        yield request.param


def test_a_case_is_found() -> None:
    assert CASES


@pytest.mark.parametrize("kind", ["video", "image"])
def test_embeddings(case: Case, backend: str, kind: str) -> None:
    batch, theirs = case.batch(kind), case.tensors
    tokens, heads = case.model.vision_encoder.embed(batch["video"], batch["visible"], heads=True)
    tower = case.model.vision_encoder
    student = kernels.align_features(heads, tower.norm_weight, tower.norm_bias, HEAD_EPS, "none")
    assert relative(tokens, theirs[f"out.{kind}_embeds"]) < LIMIT
    assert relative(tower.pool(tokens), theirs[f"out.{kind}_pooled"]) < LIMIT
    assert relative(student, theirs[f"out.{kind}_student"]) < LIMIT
    text = case.model.text_encoder.encode(batch["ids"], batch["mask"])
    assert relative(text[batch["mask"]], theirs["out.text_embeds"][batch["mask"]]) < LIMIT


def test_evaluation_pools_each_frame(case: Case, backend: str) -> None:
    batch, theirs, model = case.batch("video"), case.tensors, case.model
    tokens, _ = model.vision_encoder.embed(batch["video"])
    pooled = model.vision_encoder.pool(tokens, frames=batch["video"].shape[2])
    assert relative(tokens, theirs["out.video_eval_embeds"]) < LIMIT
    assert relative(pooled, theirs["out.video_eval_pooled"]) < LIMIT
    text = model.project_text(model.text_encoder.encode(batch["ids"], batch["mask"]))
    sim = model.project_vision(pooled) @ text.t() / model.temperature
    assert relative(sim, theirs["out.video_eval_sim_v2t"]) < LIMIT


@pytest.mark.parametrize("kind", ["video", "image"])
def test_losses_and_word_logits(case: Case, backend: str, kind: str) -> None:
    batch, theirs, model = case.batch(kind), case.tensors, case.model
    found = stage2_losses(model, Stage2Losses(), **batch)
    for name in ("vtc", "vtm", "mlm"):
        assert relative(found[name].view(1), theirs[f"out.{kind}_loss_{name}"]) < LIMIT, name
    text = model.text_encoder
    tokens, _ = model.vision_encoder.embed(batch["video"], batch["visible"])
    hidden = text.fuse(
        text.encode(batch["masked_ids"], batch["mask"])[None], batch["mask"][None], text.clip_keys(tokens)
    )
    logits = text.cls.predictions(hidden[0])
    assert relative(logits[batch["mask"]], theirs[f"out.{kind}_mlm_logits"][batch["mask"]]) < LIMIT


def test_every_gradient_of_the_four_losses(case: Case, backend: str) -> None:
    model, theirs = case.model, case.tensors
    model.zero_grad()
    found = stage2_losses(
        model, Stage2Losses(), targets=theirs["in.teacher_video"], align=case.align, **case.batch("video")
    )
    assert relative(found["uta"].view(1), theirs["out.video_loss_uta"]) < LIMIT
    found["loss"].backward()
    compared = 0
    own = dict(model.named_parameters())
    largest = max(value.norm().item() for key, value in theirs.items() if key.startswith("grad."))
    for key, expected in theirs.items():
        if not key.startswith("grad."):
            continue
        gradient = own[key.removeprefix("grad.")].grad
        if expected.norm() < 1e-6 * largest:  # a key bias: zero but for rounding
            assert gradient is None or gradient.norm() < 1e-5 * largest, key
        else:
            assert relative(gradient, expected.view_as(gradient)) < LIMIT, key
        compared += 1
    assert compared >= len([key for key in own if not key.startswith("temp")]) - 2


@pytest.mark.parametrize("pools", ["every frame, nothing hidden", "every frame, tubes"])
def test_contrastive_loss_of_the_official_step_that_pools_frames(case: Case, backend: str, pools: str) -> None:
    """Without alignment the official step hides nothing and compares captions with every frame; with tubes as well."""
    key = "unaligned" if "nothing" in pools else "tube"
    if f"out.{key}_loss_vtc" not in case.tensors:
        pytest.skip(f"the file has no out.{key}_loss_vtc")
    batch, theirs = case.batch("video"), case.tensors
    mask = theirs["in.tube_mask"] if key == "tube" else torch.zeros_like(theirs["in.video_mask"])
    batch["visible"] = (~mask).nonzero()[:, 1].view(len(mask), -1).to(torch.int32)
    losses = Stage2Losses(vtm=0.0, mlm=0.0, uta=0.0)
    found = stage2_losses(case.model, losses, pooled=batch["video"].shape[2], **batch)["vtc"]
    assert relative(found.view(1), theirs[f"out.{key}_loss_vtc"]) < LIMIT
    together = stage2_losses(case.model, losses, **batch)["vtc"]
    assert relative(together.view(1), theirs[f"out.{key}_loss_vtc"]) > 10 * LIMIT


def test_masking_has_the_official_shares() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 100, (400, 30))
    ids[:, 0] = 2
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 25:] = False
    masked, labels = vision_text.mask_tokens(ids, mask, probability=0.5, mask_id=4, vocab_size=100, special=(2,))
    asked = labels != -100
    assert not asked[:, 0].any() and not asked[:, 25:].any()
    assert torch.equal(labels[asked], ids[asked]) and torch.equal(masked[~asked], ids[~asked])
    assert abs(asked[:, 1:25].float().mean() - 0.5) < 0.02
    assert abs((masked[asked] == 4).float().mean() - 0.8) < 0.02
    assert abs((masked[asked] == ids[asked]).float().mean() - 0.101) < 0.015


def test_logits_at_asked_positions_alone_give_the_same_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4 * 7, 11), torch.full((4, 7), -100)
    labels[torch.rand(4, 7) < 0.4] = 3
    count = int((labels != -100).sum())
    expected = vision_text.masked_language_loss(logits, labels.flatten())
    for capacity in (count, count + 5):
        rows, asked = vision_text.masked_rows(labels, capacity)
        torch.testing.assert_close(vision_text.masked_language_loss(logits[rows], asked), expected)
    logits.requires_grad_()
    nothing = vision_text.masked_language_loss(logits, torch.full((28,), -100))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()
