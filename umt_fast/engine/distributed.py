"""The ranks of a run under torchrun, or one process without it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from umt_fast.config import RunConfig
from umt_fast.engine.host_memory import keep_freed_memory
from umt_fast.engine.precision import pick_device


@dataclass(frozen=True, slots=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def current_ranks(run: RunConfig) -> Ranks:
    """This process's place, from torchrun's environment variables."""
    device = pick_device(run.device, int(os.environ.get("LOCAL_RANK", "0")))
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


@contextlib.contextmanager
def distributed_run(run: RunConfig) -> Iterator[Ranks]:
    """Joins the process group for the block (NCCL on GPUs, gloo on CPUs); only rank 0 logs below warnings."""
    ranks = current_ranks(run)
    if not ranks.first:
        for name in ("umt_fast", "kernels"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Every rank reads the same weights: one says what does not fit, each of them ends with an error of its own.
        logging.getLogger("umt_fast.weights").setLevel(logging.CRITICAL)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        keep_freed_memory()
    if ranks.world_size > 1:
        dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo")
        # A rank that ends on a user's mistake before the others have joined would leave them with errors of their own.
        gather(None)
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            # A sharded model holds on to the group in cycles. While one lives, the group's threads are not joined, and one that
            # lets go of a Python object while the interpreter ends aborts the process.
            gc.collect()
            dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over ranks; non-finite values of any rank stay visible on all."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def gather(value: Any) -> list[Any]:
    """A small Python value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
