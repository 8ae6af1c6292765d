"""A fine-tuning step of the video-text tasks is one graph, and nothing in it makes the host wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kernels
from tests.objectives.test_one_graph import hopper, imagined  # noqa: F401, a fixture
from umt_fast.config import OptimConfig, TextConfig, VitConfig
from umt_fast.engine.optim import build_optimizer
from umt_fast.tasks.multiple_choice import score_options
from umt_fast.tasks.question_answering import QuestionTuning
from umt_fast.tasks.retrieval_tuning import RetrievalTuning

VIT = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16, "num_frames": 2, "drop_path": 0.0}
TEXT = {"width": 32, "depth": 3, "fusion_layer": 1, "num_heads": 2, "vocab_size": 20, "max_positions": 8}


def objective_of(kind: str, dtype: str = "fp32", dropout: float = 0.0) -> nn.Module:
    vit = VitConfig(**VIT)
    text = TextConfig(**TEXT, hidden_dropout=dropout, attention_dropout=dropout)
    if kind == "retrieval":
        return RetrievalTuning(vit, text, embed_dim=8, dtype=dtype).train()
    return QuestionTuning(vit, text, dtype=dtype).train()


def batch_of(kind: str) -> dict[str, Tensor]:
    """Three clips; four answers, two of them to the second question."""
    batch = {
        "video": torch.randint(256, (3, 2, 16, 16, 3)).to(torch.uint8),
        "ids": torch.randint(4, 16, (3, 6)),
        "mask": torch.ones(3, 6, dtype=torch.bool),
    }
    if kind == "retrieval":
        return batch | {"sample": torch.arange(3)}
    return batch | {
        "answer_ids": torch.randint(4, 16, (4, 5)),
        "answer_mask": torch.ones(4, 5, dtype=torch.bool),
        "answer_weights": torch.ones(4),
        "answer_question": torch.arange(4).clamp(max=2),
    }


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", ["retrieval", "questions"])
def test_a_step_never_waits(kind: str) -> None:
    with imagined("cuda") as waits:
        objective, batch, seed = objective_of(kind, "bf16", 0.1), batch_of(kind), torch.empty(1, dtype=torch.int64)
        waits.found.clear()
        values = objective(batch, seed)
        assert values["loss"].device.type == "cuda" and waits.count > 100
    assert waits.found == []
    # On imagined CPU tensors: the backward pass of imagined GPU tensors needs a real GPU.
    with kernels.force_backend("triton"), imagined("cpu") as waits:
        objective = objective_of(kind)
        optimizer = build_optimizer(objective.trainable, OptimConfig(), lr=1e-3)
        loss = objective(batch_of(kind), torch.empty(1, dtype=torch.int64))["loss"]
        waits.found.clear()
        loss.backward()
        optimizer.step()
    assert waits.found == []


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retrieval", "questions"])
def test_the_whole_objective_is_one_graph(kind: str) -> None:
    torch.manual_seed(0)
    objective, batch = objective_of(kind), batch_of(kind)
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="eager")
    found = [module(batch, torch.tensor([5])) for module in (objective, compiled)]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["retrieval", "questions"])
def test_bf16_gives_nearly_the_losses_of_fp32(kind: str) -> None:
    torch.manual_seed(0)
    exact, batch = objective_of(kind), batch_of(kind)
    half = objective_of(kind, "bf16")
    half.load_state_dict(exact.state_dict())
    one, other = (objective(batch, torch.tensor([5]))["loss"] for objective in (exact, half))
    assert other.dtype == torch.float32 and one != other
    assert other.item() == pytest.approx(one.item(), rel=0.02)


def test_pieces_are_the_modules_parts() -> None:
    for kind in ("retrieval", "questions"):
        objective = objective_of(kind)
        inside = set(objective.modules())
        assert all(module in inside and callable(getattr(module, name)) for module, name in objective.pieces())
        assert set(objective.trainable.shard_units) <= inside


@torch.no_grad()
def test_similarities_of_options_are_exact_under_autocast() -> None:
    """A temperature of .01 would turn bf16's rounding of a cosine into another choice."""
    torch.manual_seed(0)
    objective = objective_of("retrieval").eval()
    model, batch, noted = objective.model, batch_of("retrieval"), {}
    model.temp.fill_(0.01)
    for name in ("project_vision", "project_text"):
        real = getattr(model, name)

        def noting(x: Tensor, name: str = name, real=real) -> Tensor:
            noted[name] = real(x)
            return noted[name]

        setattr(model, name, noting)
    ids, mask = (batch[name][:, None].repeat(1, 4, 1) for name in ("ids", "mask"))
    ids[:, 1:] = torch.randint(4, 16, ids[:, 1:].shape)
    with torch.autocast("cpu", torch.bfloat16):
        scored = score_options(model, batch["video"], ids, mask)
    clip, captions = noted["project_vision"].double(), noted["project_text"].double().view(3, 4, -1)
    expected = ((captions * clip[:, None]).sum(-1) / 0.01).softmax(1)
    torch.testing.assert_close(scored.similarity.double(), expected, rtol=1e-3, atol=1e-5)
