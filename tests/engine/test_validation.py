"""Judging between epochs: the training does not notice, the best weights are kept, the average is timm's."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.test_trainer import Toy, ToyLoader
from umt_fast.config import OptimConfig, RunConfig
from umt_fast.engine import checkpoint
from umt_fast.engine.trainer import Stopped, Trainer
from umt_fast.report import write_report


class Judge:
    """The error on clips of its own, times -1; it draws from the generators, as a careless one would."""

    best = "score"

    def __init__(self, scores: dict[int, float] | None = None) -> None:
        self.scores, self.steps, self.seen = scores, [], []

    def figures(self, objective: nn.Module) -> dict[str, float]:
        assert not objective.training and not torch.is_grad_enabled()
        torch.rand(3)
        torch.manual_seed(99)
        x = torch.linspace(-1, 1, 20).view(5, 4)
        error = (objective.trainable(x).squeeze(1) - x.sum(1)).square().mean().item()
        self.seen.append({name: value.clone() for name, value in objective.trainable.state_dict().items()})
        score = -error if self.scores is None else self.scores[len(self.seen)]
        return {"score": score, "error": error}


def run(out: Path, judge: Judge | None = None, ema_decay: float = 0.0, count: int = 24, **options: object) -> Trainer:
    torch.manual_seed(0)
    values = {"epochs": 3, "warmup_epochs": 1, "device": "cpu", "dtype": "fp32", "log_every": 1, "tensorboard": False}
    config = RunConfig(out=str(out), batch_size=4, **(values | options))
    optim = OptimConfig(lr=0.05, lr_batch=0, ema_decay=ema_decay)
    return Trainer(
        config,
        optim,
        Toy(),
        ToyLoader(4, count),
        validation=judge,
        records={"model_config": {"task": "toy", "version": 1}},
    )


def rows(out: Path, judged: bool) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row[key] for key in row if key.startswith(("val_", "step", "loss", "lr", "grad_norm"))}
        for row in found
        if ("val_score" in row) == judged
    ]


def weights(out: Path) -> dict:
    return checkpoint.load_newest(out)[1]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_training_does_not_notice(ema_decay: float, tmp_path: Path) -> None:
    run(tmp_path / "alone", ema_decay=ema_decay).train()
    judged = run(tmp_path / "judged", Judge(), ema_decay=ema_decay)
    judged.train()
    assert judged.objective.training
    assert rows(tmp_path / "alone", False) == rows(tmp_path / "judged", False)
    one, other = weights(tmp_path / "alone"), weights(tmp_path / "judged")
    assert same(one["model"], other["model"]) and one["loader"] == other["loader"]
    assert same(one.get("model_ema", {}), other.get("model_ema", {}))
    for index, state in one["optimizer"]["state"].items():
        assert same(state, other["optimizer"]["state"][index])


@pytest.mark.parametrize(
    ("every", "epochs", "max_steps", "steps"),
    [(1, 3, 0, [6, 12, 18]), (2, 3, 0, [12, 18]), (5, 3, 0, [18]), (1, 3, 8, [6, 8]), (0, 3, 0, [])],
)
def test_when_it_is_judged(every: int, epochs: int, max_steps: int, steps: list[int], tmp_path: Path) -> None:
    run(tmp_path, Judge(), epochs=epochs, max_steps=max_steps, validate_epochs=every).train()
    assert [row["step"] for row in rows(tmp_path, True)] == steps
    assert (tmp_path / "checkpoint-best.pt").exists() == bool(steps)


def test_the_best_is_kept_and_the_earlier_of_two_equal_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "umt_fast")
    judge = Judge({1: 0.25, 2: 0.75, 3: 0.75, 4: 0.5})
    run(tmp_path, judge, epochs=4, keep=1).train()
    kept = checkpoint.read_file(tmp_path / "checkpoint-best.pt")
    assert same(kept["model"], judge.seen[1]) and not same(kept["model"], judge.seen[2])
    assert kept["validation"]["step"] == 12 and kept["validation"]["figures"]["score"] == 0.75
    assert kept["model_config"] == {"task": "toy", "version": 1} and not kept["validation"]["averaged"]
    assert [row["val_score"] for row in rows(tmp_path, True)] == [0.25, 0.75, 0.75, 0.5]
    # Pruning counts the others alone, and leaves no partial file.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-00000024.pt",
        "checkpoint-best.pt",
    ]
    assert "validation at step 12: score 0.75" in caplog.text and "(the best score)" in caplog.text


def test_figures_that_are_no_numbers_are_never_the_best(tmp_path: Path) -> None:
    run(tmp_path, Judge({1: float("nan"), 2: 0.5, 3: float("nan")})).train()
    assert checkpoint.read_file(tmp_path / "checkpoint-best.pt")["validation"]["step"] == 12


@pytest.mark.parametrize("lost", [False, True], ids=["with metrics.jsonl", "without"])
def test_a_run_that_continues_knows_its_best(lost: bool, tmp_path: Path) -> None:
    run(tmp_path, Judge({1: 0.25, 2: 0.75}), max_steps=12).train()
    if lost:
        (tmp_path / "metrics.jsonl").unlink()
    again = Judge({1: 0.5, 2: 0.5})
    run(tmp_path, again, epochs=4).train()
    assert len(again.seen) == 2
    assert checkpoint.read_file(tmp_path / "checkpoint-best.pt")["validation"]["step"] == 12


def test_weights_that_were_saved_but_not_judged_are_judged_when_the_run_continues(tmp_path: Path) -> None:
    """As after a kill between the two, and after a stop at an epoch's end."""

    class Killed(Exception):
        pass

    class Dying(Judge):
        def figures(self, objective: nn.Module) -> dict[str, float]:
            if len(self.seen) == 1:
                raise Killed
            return super().figures(objective)

    run(tmp_path / "whole", Judge()).train()
    with pytest.raises(Killed):
        run(tmp_path / "parts", Dying()).train()
    run(tmp_path / "parts", Judge()).train()
    for judged in (True, False):
        assert rows(tmp_path / "parts", judged) == rows(tmp_path / "whole", judged)
    best = [checkpoint.read_file(tmp_path / name / "checkpoint-best.pt") for name in ("whole", "parts")]
    assert same(best[0]["model"], best[1]["model"]) and best[0]["validation"] == best[1]["validation"]
    # A run that is complete judges nothing again.
    idle = Judge()
    run(tmp_path / "parts", idle).train()
    assert not idle.seen


def test_a_stop_at_the_end_of_an_epoch_comes_before_the_judgment(tmp_path: Path) -> None:
    stopped = run(tmp_path, Judge())
    stopped.loader.set_epoch(0)

    class Stopping(ToyLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 5:
                    stopped.stop_signal = 15
                yield batch

    stopped.loader = Stopping(4)
    with pytest.raises(Stopped):
        stopped.train()
    assert rows(tmp_path, True) == []
    judge = Judge()
    run(tmp_path, judge).train()
    assert [row["step"] for row in rows(tmp_path, True)] == [6, 12, 18]


def test_the_average_is_that_of_a_loop_by_hand(tmp_path: Path) -> None:
    """timm's ModelEma: a copy of the weights, then average * decay + (1 - decay) * weights after every step."""
    judge, decay = Judge(), 0.8
    run(tmp_path, judge, ema_decay=decay, save_every=1, keep=100).train()
    torch.manual_seed(0)
    average = {name: value.double() for name, value in Toy().trainable.state_dict().items()}
    judged = []
    for step in range(1, 19):
        content = checkpoint.read_file(tmp_path / f"checkpoint-{step:08d}.pt")
        average = {name: decay * average[name] + (1 - decay) * value for name, value in content["model"].items()}
        for name, value in average.items():
            torch.testing.assert_close(content["model_ema"][name].double(), value, rtol=1e-6, atol=1e-7)
        if step % 6 == 0:
            judged.append(content["model_ema"])
    # The average is what was judged, and what the best file holds.
    assert all(same(one, other) for one, other in zip(judged, judge.seen, strict=True))
    kept = checkpoint.read_file(tmp_path / "checkpoint-best.pt")
    assert kept["validation"]["averaged"] and same(kept["model"], judged[kept["validation"]["step"] // 6 - 1])
    assert not same(content["model"], content["model_ema"])


def test_an_average_continues_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "whole", Judge(), ema_decay=0.9).train()
    run(tmp_path / "parts", Judge(), ema_decay=0.9, max_steps=8).train()
    run(tmp_path / "parts", Judge(), ema_decay=0.9).train()
    assert same(weights(tmp_path / "whole")["model_ema"], weights(tmp_path / "parts")["model_ema"])
    run(tmp_path / "late", max_steps=8).train()
    late = run(tmp_path / "late", ema_decay=0.9, max_steps=9)
    late.train()
    assert "made without optim.ema_decay" in caplog.text
    before, after = (checkpoint.read_file(tmp_path / "late" / f"checkpoint-{step:08d}.pt") for step in (8, 9))
    for name, value in after["model_ema"].items():
        torch.testing.assert_close(value, 0.9 * before["model"][name] + 0.1 * after["model"][name])


def test_frozen_weights_are_their_own_average() -> None:
    from umt_fast.engine.averaging import AveragedWeights

    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = AveragedWeights(module, 0.5)
    assert set(average.values) == {"weight"} and set(average.state_dict()) == {"weight", "bias"}
    with torch.no_grad():
        module.weight.add_(1)
    average.update()
    before, mean = module.weight.clone(), average.values["weight"].clone()
    with average.in_use():
        assert torch.equal(module.weight, mean) and not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before) and torch.equal(average.values["weight"], mean)


def test_the_report_shows_the_figures(tmp_path: Path) -> None:
    run(tmp_path, Judge()).train()
    page = write_report(tmp_path).read_text()
    assert "score on unseen clips" in page and "error on unseen clips" in page and ", loss" in page
