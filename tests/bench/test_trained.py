"""`bench`, its profile and the trainer run one and the same step."""

import pytest
import torch

from umt_fast.bench import finetune, stage1, stage2
from umt_fast.bench.measure import Case, Clock
from umt_fast.bench.trained import Border, laps_at
from umt_fast.engine.trainer import Trainer

CPU = torch.device("cpu")
STEPS = {
    "stage1": lambda case: stage1.measure(case),
    "stage2": lambda case: stage2.measure(case, "video"),
    "finetune": lambda case: finetune.measure(case),
}
PARTS = {
    "stage1": ["teacher and mask", "student forward", "loss", "backward", "optimizer"],
    "stage2": ["teacher and masks", "forward and losses", "backward", "optimizer"],
    "finetune": ["erasing and mixing", "classifier forward", "loss", "backward", "optimizer"],
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers whose own step was made, once for each."""
    made: list[Trainer] = []
    real = Trainer._train_step

    def noted(self: Trainer, *values: object) -> None:
        made.append(self)
        real(self, *values)

    monkeypatch.setattr(Trainer, "_train_step", noted)
    return made


@pytest.mark.parametrize("stage", STEPS)
def test_bench_times_the_trainers_own_step(stage: str, steps: list[Trainer]) -> None:
    case = Case(model="tiny", batch_size=2, device=CPU, dtype="fp32", implementation="fast", steps=2)
    found = STEPS[stage](case)
    assert len(steps) == 2 + 2 + 1 and len(set(map(id, steps))) == 1, "two warm, two timed, one in parts"
    assert list(found["ms_per_part"]) == PARTS[stage]
    # They train: no two steps draw the same, and gradients were applied.
    losses = [entry["values"]["loss"].item() for entry in steps[0].pending]
    assert len(set(losses)) == 5 and steps[0].step == 5


def test_the_profile_times_the_trainers_own_step(steps: list[Trainer]) -> None:
    found = stage1.profile_of(stage1.stage1_config("tiny", 2, "fp32"), CPU, 2)
    assert len(steps) == 2 + 2
    assert [row["part"] for row in found["parts"]] == [
        "teacher patches",
        "teacher blocks",
        "last block, mask, targets",
        "student patches",
        "student blocks",
        "student heads",
        "loss",
        "backward",
        "optimizer",
    ]


def test_laps_are_at_their_borders_and_leave_nothing() -> None:
    class Named(Clock):
        said: list[str] = []

        def lap(self, part: str) -> None:
            self.said.append(part)

    layer, clock = torch.nn.Linear(2, 2), Named(CPU)
    layer.register_forward_hook(lambda *_: clock.said.append("inside"))
    before = torch.Tensor.backward
    with laps_at(
        clock, [Border(layer, "forward", True, "begins"), Border(torch.Tensor, "backward", False, "backward")]
    ):
        layer(torch.ones(1, 2)).sum().backward()
    layer(torch.ones(1, 2))
    assert clock.said == ["begins", "inside", "backward", "inside"]
    assert "forward" not in vars(layer) and torch.Tensor.backward is before
