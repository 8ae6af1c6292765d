"""The bookkeeping of recorded micro-steps, on the CPU: here a recording repeats the Python function."""

from pathlib import Path

import pytest
import torch
from torch import nn

from umt_fast.config import ConfigError
from umt_fast.engine.graphed import GraphedStep


class Noisy(nn.Module):
    """Least squares with generator noise and a seed, both of which a wrong replay would change."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable = nn.Linear(4, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, batch: dict, seed: torch.Tensor) -> dict:
        x = batch["x"] + 0.1 * torch.rand(batch["x"].shape) + 0.01 * seed
        return {"loss": (self.trainable(x).squeeze(1) - batch["y"]).square().mean()}


def record(micro):
    """Warms up as the real one does, keeping its outputs in the same memory."""
    for _ in range(3):
        kept = micro()

    def replay():
        for key, value in micro().items():
            kept[key].copy_(value)
        return kept

    return replay


def test_recorded_steps_equal_eager_ones() -> None:
    torch.manual_seed(0)
    objective = Noisy()
    parameters = list(objective.parameters())
    step = GraphedStep(objective, parameters, 2, record)
    micro_steps = []
    for number in range(6):
        rows = (4, 3)[number % 2]  # two shapes in turn, as clips and images come
        micro_steps.append(({"x": torch.randn(rows, 4), "y": torch.randn(rows)}, torch.tensor([number])))

    found: dict[str, list] = {"eager": [], "recorded": []}
    for way in found:
        for parameter in parameters:
            parameter.grad = None
        for number, (batch, seed) in enumerate(micro_steps):
            torch.manual_seed(number)
            if way == "eager":
                values = objective(batch, seed)
                (values["loss"] / 2).backward()
            else:
                # Fresh memory each time: the recording must read its own copy, not the first batch's.
                values = step({key: value.clone() for key, value in batch.items()}, seed.clone())
            found[way].append(values["loss"].detach().clone())
            found[way] += [p.grad.clone() for p in objective.trainable.parameters()]
    torch.testing.assert_close(found["recorded"], found["eager"])
    assert len(step.recorded) == 2 and objective.unused.weight.grad is None


def test_no_silent_fall_back(tmp_path: Path) -> None:
    from umt_fast.engine.graphed import require_graphs

    with pytest.raises(ConfigError, match="run.cuda_graph needs a GPU.*cpu"):
        require_graphs(torch.device("cpu"), 1)
    with pytest.raises(ConfigError, match="4 ranks"):
        require_graphs(torch.device("cuda"), 4)
