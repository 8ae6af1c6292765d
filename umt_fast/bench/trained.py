"""The step that `train` runs, on one batch that stays on the device, and a clock at the borders of its parts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from umt_fast.bench.measure import Clock, Steps
from umt_fast.engine.repeated import Repeated
from umt_fast.engine.trainer import Trainer


class Border(NamedTuple):
    """The end of a part: when a method of `owner` begins (before) or ends."""

    owner: Any
    method: str
    before: bool
    part: str


def trainer_of(
    config: Any, objective: nn.Module, batch: dict[str, Tensor], device: torch.device
) -> tuple[Trainer, Callable[[], None]]:
    """A Trainer as config.run and config.optim say, and what makes its next step. batch: `video` and what else the objective
    reads, on the device."""
    index = torch.arange(len(batch["video"]), device=device)
    trainer = Trainer(
        replace(config.run, device=device.type), config.optim, objective, Repeated([batch | {"index": index}])
    )
    return trainer, trainer.stepper()


@contextlib.contextmanager
def laps_at(clock: Clock, borders: Sequence[Border]) -> Iterator[None]:
    """A lap of the clock at each border, for the block."""
    with contextlib.ExitStack() as stack:
        for border in borders:
            stack.enter_context(mock.patch.object(border.owner, border.method, _with_lap(clock, border)))
        yield


def _with_lap(clock: Clock, border: Border) -> Callable[..., Any]:
    method = getattr(border.owner, border.method)

    @functools.wraps(method)
    def call(*values: Any, **named: Any) -> Any:
        if border.before:
            clock.lap(border.part)
            return method(*values, **named)
        found = method(*values, **named)
        clock.lap(border.part)
        return found

    return call


def timed_step(step: Callable[[], None], borders: Sequence[Border], clock: Clock) -> None:
    """One eager step with laps at the borders, at the end of the backward pass, and of what follows it."""
    with laps_at(clock, [*borders, Border(torch.Tensor, "backward", False, "backward")]):
        clock.restart()
        step()
        clock.lap("optimizer")


def steps_of(
    config: Any, objective: nn.Module, batch: dict[str, Tensor], device: torch.device, borders: Sequence[Border]
) -> Steps:
    """The step, and where it is eager the same step with a clock at its parts' ends."""
    _, step = trainer_of(config, objective, batch, device)
    timed = None if config.run.compile else lambda number, clock: timed_step(step, borders, clock)
    return lambda number: step(), timed
