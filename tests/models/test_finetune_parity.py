"""Our classifier and its losses against what the official implementation computed from the same weights.

Every `finetune_*.safetensors` is a case; sizes and options come from its metadata.
"""

from pathlib import Path

import pytest
import torch

import kernels
from tests.parity_files import parity_files, read_case, relative, tower_of
from umt_fast.config import FinetuneConfig, RunConfig
from umt_fast.models.weights import fit
from umt_fast.tasks.classification import Supervised

CASES = parity_files("finetune")
LIMIT = 1e-4


class Case:
    """One file: its tensors, and our objective filled with its weights."""

    def __init__(self, path: Path) -> None:
        self.sizes, self.tensors = read_case(path)
        self.state = {k.removeprefix("model."): v for k, v in self.tensors.items() if k.startswith("model.")}
        self.table = self.state.pop("pos_embed", None)
        self.objective = self.with_smoothing(0.0)
        fit(self.objective.classifier, self.state, str(path))

    def with_smoothing(self, value: float) -> Supervised:
        sizes = self.sizes
        vit = tower_of(sizes)
        config = FinetuneConfig(
            run=RunConfig(dtype="fp32", epochs=2, warmup_epochs=1),
            student=vit,
            num_classes=sizes["classes"],
            label_smoothing=value,
        )
        return Supervised(config).eval()

    def loss(self, label: str, smoothing: float = 0.0) -> torch.Tensor:
        objective = self.with_smoothing(smoothing)
        objective.classifier = self.objective.classifier
        batch = {"video": self.tensors["in.video"], "label": self.tensors[label]}
        return objective(batch, torch.tensor([1]))["loss"].view(1)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_position_table(case: Case) -> None:
    """Made for 8 x 14 x 14 tokens and resized, without being told to; the state keeps none."""
    assert (case.table is not None) == case.sizes["pos_embed_in_state"]
    if case.table is not None:
        assert relative(case.objective.classifier.position, case.table[0]) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_features_and_logits(case: Case, backend: str) -> None:
    with torch.no_grad(), kernels.force_backend(backend):
        features = case.objective.classifier.pooled(case.tensors["in.video"])
        logits = case.objective.logits(case.tensors["in.video"])
    assert relative(features, case.tensors["out.features"]) < LIMIT
    assert relative(logits, case.tensors["out.logits"]) < LIMIT


def test_losses_of_classes(case: Case) -> None:
    with torch.no_grad():
        smoothed = case.loss("in.labels", case.sizes["label_smoothing"])
        hard = case.loss("in.labels")
    assert relative(smoothed, case.tensors["out.loss_label_smoothing"]) < LIMIT
    assert relative(hard, case.tensors["out.loss_hard"]) < LIMIT


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_of_soft_targets_and_every_gradient(case: Case, smoothing: float) -> None:
    """Soft targets are not smoothed once more."""
    case.objective.zero_grad()
    loss = case.loss("in.soft_targets", smoothing)
    loss.sum().backward()
    assert relative(loss.detach(), case.tensors["out.loss"]) < LIMIT
    gradients = {key.removeprefix("grad."): value for key, value in case.tensors.items() if key.startswith("grad.")}
    gradients = {key.removeprefix("model."): value for key, value in gradients.items()}
    ours = {key: parameter.grad for key, parameter in case.objective.classifier.named_parameters()}
    assert set(ours) == set(gradients)
    worst = {key: relative(ours[key], value) for key, value in gradients.items()}
    assert max(worst.values()) < LIMIT, sorted(worst.items(), key=lambda item: -item[1])[:5]
