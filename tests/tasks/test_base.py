"""A task that is not in the package: it trains, is saved, planned, tuned and judged like the others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.config import ConfigError, DataConfig, OptimConfig, RunConfig, VitConfig
from umt_fast.engine.tune_measure import difference, observe
from umt_fast.models.description import base_description
from umt_fast.plan import work_of
from umt_fast.tasks import (
    EVALUATIONS,
    TASKS,
    EvalOptions,
    evaluations_of,
    register,
    register_evaluation,
    task_named,
    task_of,
    tuning,
)
from umt_fast.tasks.clips import listed_clips, random_clips
from umt_fast.train import train


@dataclasses.dataclass(kw_only=True)
class BrightnessConfig:
    """A toy: how bright is a clip?"""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    student: VitConfig = dataclasses.field(default_factory=VitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    bias: float = 0.0


class Brightness(nn.Module):
    def __init__(self, config: BrightnessConfig) -> None:
        super().__init__()
        self.trainable = nn.Linear(1, 1)
        nn.init.constant_(self.trainable.bias, config.bias)

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        mean = batch["video"].float().flatten(1).mean(1, keepdim=True) / 255
        return {"loss": (self.trainable(mean) - mean).square().mean()}

    def flops_per_clip(self) -> float:
        return 6.0

    def pieces(self) -> list[tuple[nn.Module, str]]:
        return [(self.trainable, "forward")]


class BrightnessTask:
    name, Config = "brightness", BrightnessConfig

    def settled(self, config: BrightnessConfig) -> BrightnessConfig:
        return config

    def refuse_unread(self, config: BrightnessConfig, refuse: Any, world_size: int) -> None:
        refuse("student.drop_path", "a toy has no blocks", 0.0)

    def objective(self, config: BrightnessConfig) -> Brightness:
        return Brightness(config)

    untrained = objective

    def loader(self, config: BrightnessConfig, ranks: Any) -> Any:
        return listed_clips(config, ranks)

    def validation(self, config: BrightnessConfig, ranks: Any) -> None:
        return None

    def random_batches(self, config: BrightnessConfig) -> list[dict[str, Tensor]]:
        return [random_clips(config, config.student.num_frames)]

    def without_noise(self, config: BrightnessConfig) -> BrightnessConfig:
        return config

    def clips_of_epoch(self, config: BrightnessConfig) -> None:
        return None

    def visible_tokens(self, config: BrightnessConfig) -> int:
        return 1

    def describe(self, config: BrightnessConfig) -> dict[str, Any]:
        return base_description(self.name, config) | {"bias": config.bias}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions(EvalOptions):
    factor: float = 1.0
    """What the weight is multiplied with."""


class Measure:
    """The weight of a toy."""

    name, tasks, Options = "measure", ("brightness",), MeasureOptions

    def run(
        self, file: Any, described: dict, source: Path, list_path: Path, data: Any, options: MeasureOptions, ranks: Any
    ) -> dict[str, Any]:
        return {
            "weight": options.factor * file.state["weight"].item(),
            "bias": described["bias"],
            "lines": len(list_path.read_text().split()),
        }


@pytest.fixture
def brightness() -> BrightnessTask:
    task, evaluation = register(BrightnessTask()), register_evaluation(Measure())
    yield task
    del TASKS[task.name], EVALUATIONS[evaluation.name]


def configured(out: Path, table: Path, **changes: Any) -> BrightnessConfig:
    base = tiny.tiny()
    student = dataclasses.replace(base.student, drop_path=0.0)
    run = dataclasses.replace(base.run, out=str(out), epochs=4, warmup_epochs=0, tensorboard=False)
    data = dataclasses.replace(base.data, train=str(table))
    return BrightnessConfig(run=run, data=data, student=student, optim=OptimConfig(lr=0.1, lr_batch=0), **changes)


def test_it_trains_and_is_judged(
    brightness: BrightnessTask, tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = train(configured(tmp_path / "run", tiny_list, bias=0.5))
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    newest = max(folder.glob("checkpoint-*.pt"))
    content = torch.load(newest, weights_only=True)
    assert content["model_config"]["task"] == "brightness" and "lr" not in content["model_config"]
    capsys.readouterr()
    assert main(["eval", "measure", str(newest), str(tiny_list), "--factor", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "weight": 2 * content["model"]["weight"].item(),
        "bias": 0.5,
        "lines": 2,
    }


def test_it_is_planned_tuned_and_checked(brightness: BrightnessTask, tmp_path: Path, tiny_list: Path) -> None:
    config = configured(tmp_path / "run", tiny_list)
    assert task_of(config) is brightness is task_named("brightness")
    assert (work_of(config).flops, work_of(config).trained) == (6.0, 2)
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    cases = [tuning.build_case("brightness", record, exact=True) for _ in range(2)]
    assert not difference(observe(cases[0]), observe(cases[1]), "fp32")
    config.student.drop_path = 0.3
    with pytest.raises(ConfigError, match="student.drop_path is 0.3, but a toy has no blocks"):
        train(config)


def test_names_and_configurations_are_one_tasks_alone(brightness: BrightnessTask) -> None:
    with pytest.raises(ValueError, match="brightness"):
        register(BrightnessTask())
    with pytest.raises(ValueError, match="measure"):
        register_evaluation(Measure())
    assert evaluations_of("brightness") == ["measure"]
    with pytest.raises(ConfigError, match="unknown task 'brightnes'; did you mean 'brightness'"):
        task_named("brightnes")
    with pytest.raises(ConfigError, match="RunConfig is no configuration of a task"):
        task_of(RunConfig())
