"""When a run's checkpoints are on disk, in which form, and which of them stay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from umt_fast.config import RunConfig
from umt_fast.engine import checkpoint, sharded_checkpoint, sharding
from umt_fast.engine.averaging import AveragedWeights
from umt_fast.engine.distributed import Ranks, gather

log = logging.getLogger("umt_fast")


class Saver:
    """Writes checkpoints as run.checkpoint and run.async_save say, and deletes those that run.keep does not keep."""

    def __init__(self, run: RunConfig, folder: Path, ranks: Ranks, steps_per_epoch: int) -> None:
        self.run, self.folder, self.first = run, folder, ranks.first
        self.permanent_steps = steps_per_epoch * run.keep_every_epochs
        self.pending: sharded_checkpoint.Save | None = None
        # Of its own: in the background the ranks talk while a step's do.
        apart = run.async_save and ranks.world_size > 1
        self.group = dist.new_group(backend="gloo") if apart else None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None,
        rest: dict[str, Any],
    ) -> None:
        """Writes what continues a run, parameters by name; all ranks together. In the background from a copy made here.

        Raises CheckpointError, also of the one before that was written in the background.
        """
        self.wait()
        model, state = get_state_dict(module, optimizer)
        content = {"model": model, "optimizer": state}
        if average:
            content["model_ema"] = average.state_dict()
        if self.run.checkpoint == "sharded":
            self.pending = sharded_checkpoint.Save(
                self.folder / f"checkpoint-{step:08d}.sharded",
                sharded_checkpoint.named_tensors(content),
                rest | {"groups": state["param_groups"]},
                first=self.first,
                published=lambda path: self.published(path, step),
                group=self.group,
                background=self.run.async_save,
            )
            return
        content = sharding.gathered(content, keep=self.first)
        if self.first:
            self.published(checkpoint.save(self.folder, step, content | rest), step)
        gather(None)  # a rank that is done has its checkpoint on disk, whichever rank wrote it

    def published(self, path: Path, step: int) -> None:
        """On the first rank, as soon as a checkpoint is whole."""
        checkpoint.prune(self.folder, step, self.run.keep, self.permanent_steps)
        log.info("saved %s", path)

    def wait(self) -> None:
        """Returns once the checkpoint in the background, if any, is on disk; all ranks together. Raises CheckpointError."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.wait()

    def settle(self) -> None:
        """Lets this rank's part of it be written, before a run that failed ends: what it holds is sound."""
        if self.pending is not None:
            self.pending.settle()
