"""One training run from one configuration: the clips, the objective and the loop are put together here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import ConfigError, FinetuneConfig, Stage1Config, to_dict
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import read_list
from umt_fast.engine.distributed import distributed_run
from umt_fast.engine.precision import pick_device, usable_dtype
from umt_fast.engine.trainer import Trainer
from umt_fast.objectives.supervised import Supervised
from umt_fast.objectives.unmasked_alignment import UnmaskedAlignment


def build_objective(config: Any) -> torch.nn.Module:
    """The objective of a configuration, its weights loaded."""
    if isinstance(config, Stage1Config):
        return UnmaskedAlignment(config)
    if isinstance(config, FinetuneConfig):
        return Supervised(config)
    raise ConfigError(f"no objective for {type(config).__name__}")


def train(config: Stage1Config | FinetuneConfig) -> Path:
    """Trains as configured and returns the run folder.

    The folder then holds checkpoint-*.pt, metrics.jsonl and, if wanted, TensorBoard events. A run whose folder already
    holds checkpoints continues from the newest one unless run.resume is false.
    """
    config = copy.deepcopy(config)
    config.run.dtype = usable_dtype(config.run.dtype, pick_device(config.run.device))
    # Seeded by the run alone: every rank starts from the same weights.
    torch.manual_seed(config.run.seed)
    return fit_objective(config, lambda: build_objective(config))


def fit_objective(
    config: Stage1Config | FinetuneConfig, objective: torch.nn.Module | Callable[[], torch.nn.Module]
) -> Path:
    """Trains an objective, or one built once the list has been read, with a configuration's data, schedule and folder."""
    if not config.data.train:
        raise ConfigError("data.train is empty; give a list of videos: --data.train list.csv")
    clips = read_list(config.data.train, config.data)
    with distributed_run(config.run) as ranks:
        objective = objective if isinstance(objective, torch.nn.Module) else objective()
        loader = ClipLoader(
            clips,
            config.data,
            num_frames=config.student.num_frames,
            image_size=config.student.image_size,
            batch_size=config.run.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.run.seed,
        )
        trainer = Trainer(
            config.run,
            config.optim,
            objective,
            loader,
            num_sample=config.data.num_sample,
            layer_of=getattr(objective, "layer_id", None),
            num_layers=config.student.depth + 1,
            config_record=to_dict(config),
        )
        trainer.train()
    return Path(config.run.out)
