"""One training run from one configuration: its task gives objective and clips, the trainer the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import ConfigError, from_dict, to_dict
from umt_fast.engine.checkpoint import own_folder
from umt_fast.engine.distributed import Ranks, current_ranks, distributed_run
from umt_fast.engine.numerics import numerics
from umt_fast.engine.precision import pick_device, room_for, usable_dtype
from umt_fast.engine.trainer import Trainer
from umt_fast.models.attention import require_attention
from umt_fast.models.linear import require_linear
from umt_fast.tasks import Task, check_used, task_of, tuning, validation_of, vocabulary_for


def train(config: Any) -> Path:
    """Trains as configured and returns the run folder.

    config: of any task (umt_fast.tasks). The folder then holds checkpoint-*.pt, metrics.jsonl and, if wanted, TensorBoard
    events. A run whose folder already holds checkpoints continues from the newest one unless run.resume is false.
    """
    task = task_of(config)
    # A copy, checked again: fields may have been set since it was made.
    config = from_dict(type(config), to_dict(config))
    config.run.dtype = usable_dtype(config.run.dtype, pick_device(config.run.device))
    config = task.settled(config)
    # Seeded by the run alone: every rank starts from the same weights.
    torch.manual_seed(config.run.seed)
    return fit_objective(config, lambda: task.objective(config))


def fit_objective(config: Any, objective: torch.nn.Module | Callable[[], torch.nn.Module]) -> Path:
    """Trains an objective, or one built once the list has been read, with a configuration's data, schedule and folder.

    run.tune writes its choice into `config` before the objective is built. Raises ConfigError where one is given built.
    """
    if config.run.tune != "off" and isinstance(objective, torch.nn.Module):
        raise ConfigError(f"run.tune is {config.run.tune!r}, and this objective is built already; set --run.tune off")
    task = task_of(config)
    check_used(config, current_ranks(config.run).world_size)
    with (
        numerics(config.run),
        distributed_run(config.run) as ranks,
        own_folder(Path(config.run.out), first=ranks.first),
    ):
        # In a function of its own: what it holds must be gone when the ranks part (see distributed_run).
        _fit(config, task, objective, ranks)
    return Path(config.run.out)


def _fit(config: Any, task: Task, objective: torch.nn.Module | Callable[[], torch.nn.Module], ranks: Ranks) -> None:
    loader = task.loader(config, ranks)
    validation, vocabulary = validation_of(config, ranks), vocabulary_for(config)
    tuning.settle(config, ranks)
    towers = {name: getattr(config, name) for name in ("student", "teacher", "text") if hasattr(config, name)}
    sizes = ", ".join(f"{name}.width {tower.width} and depth {tower.depth}" for name, tower in towers.items())
    with room_for(f"the model ({sizes})"):
        require_attention(config, ranks.device)
        require_linear(config, ranks.device)
        objective = objective if isinstance(objective, torch.nn.Module) else objective()
        trainer = Trainer(
            config.run,
            config.optim,
            objective,
            loader,
            num_sample=config.data.num_sample * loader.kinds,
            layer_of=getattr(objective, "layer_id", None),
            num_layers=config.student.depth + 1,
            records={
                "config": to_dict(config),
                "model_config": task.describe(config),
                **({"vocabulary": vocabulary._asdict()} if vocabulary else {}),
            },
            validation=validation,
        )
    trainer.train()
