"""Batches on their way to a GPU: copied one ahead of the step that uses them, through pinned memory that is used again.

The host packs a batch into one of a ring of pinned buffers and starts its copy on a stream of its own, once the step before
it has been launched; events order the copy before the step that reads it, and before the buffer's next use. On a CPU nothing
is copied and nothing is fetched ahead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]
# Every tensor of a packed batch starts at a multiple of it, whatever its dtype.
_ALIGNMENT = 256


class Event(Protocol):
    """What torch.cuda.Event offers of which this module needs."""

    def synchronize(self) -> None: ...


class Lane(Protocol):
    """How tensors cross to a device beside its computation."""

    def send(self, pinned: Batch) -> tuple[Batch, Event]:
        """Starts copying; the tensors hold the batch once the event has happened."""
        ...

    def receive(self, sent: Batch, event: Event) -> None:
        """Has the computation that is launched from now on wait for the event."""
        ...


class CudaLane:
    """A side stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, pinned: Batch) -> tuple[Batch, Event]:
        with torch.cuda.stream(self.stream):
            sent = {name: value.to(self.device, non_blocking=True) for name, value in pinned.items()}
            event = torch.cuda.Event()
            event.record(self.stream)
        return sent, event

    def receive(self, sent: Batch, event: Event) -> None:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(event)
        for value in sent.values():
            # Made on the side stream: its memory must not be given away there while the computation reads it.
            value.record_stream(compute)


def pinned_bytes(count: int) -> Tensor:
    """Uninitialized host memory that a GPU can read by itself."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


class PinnedRing:
    """Pinned buffers in turn; one is written again only after the copy out of it has happened."""

    def __init__(self, slots: int = 2, allocate: Callable[[int], Tensor] = pinned_bytes) -> None:
        self.allocate = allocate
        self.buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(slots)]
        self.events: list[Event | None] = [None] * slots
        self.slot = -1

    def pack(self, batch: Batch) -> Batch:
        """The batch's tensors in the next buffer, one after the other. The caller says by `sent` when it is free again."""
        starts, size = {}, 0
        for name, value in batch.items():
            starts[name] = size
            size += math.ceil(value.numel() * value.element_size() / _ALIGNMENT) * _ALIGNMENT
        self.slot = (self.slot + 1) % len(self.buffers)
        event = self.events[self.slot]
        if event is not None:
            # The copy is older than the step before this one: a wait here is one for the step, not for the copy.
            event.synchronize()
        if len(self.buffers[self.slot]) < size:
            self.buffers[self.slot] = self.allocate(size)
        packed = {}
        for name, value in batch.items():
            length = value.numel() * value.element_size()
            place = self.buffers[self.slot][starts[name] : starts[name] + length]
            packed[name] = place.view(value.dtype).view(value.shape).copy_(value)
        return packed

    def sent(self, event: Event) -> None:
        """The buffer packed last is read until the event has happened."""
        self.events[self.slot] = event


class _Staged(NamedTuple):
    """A batch that was fetched, and the loader's state with it as the last one given."""

    batch: Batch
    event: Event | None
    sent: Batch
    index: Tensor
    state: Any


@dataclass(frozen=True, slots=True)
class Fed:
    """A batch on the device, and the numbers of its clips on the host."""

    batch: Batch
    index: Tensor


class Feed:
    """The rest of a loader's epoch, batch by batch.

    `state` is the loader's state as of the last batch that `take` gave: what was fetched ahead of the step does not count.
    """

    def __init__(self, loader: Any, lane: Lane | None = None, ring: PinnedRing | None = None) -> None:
        """lane, ring: how batches cross to the device; None: they are used where they are, and nothing is fetched ahead."""
        self.loader, self.lane, self.ring = loader, lane, ring
        self.state = loader.state_dict()
        self.waited = 0.0
        self._batches = iter(loader)
        self._ahead: _Staged | Exception | None = None

    def stage(self) -> None:
        """Fetches the next batch and starts its copy; to be called once the step before it has been launched.

        What goes wrong, or that there is no further batch, shows when the batch is taken: the step before it is sound.
        """
        if self.lane is not None and self._ahead is None:
            try:
                self._ahead = self._fetch()
            except Exception as error:
                self._ahead = error

    def take(self) -> Fed:
        """The next batch; work launched from now on may read it. Raises what the loader raises, StopIteration at its end."""
        staged = self._ahead if self._ahead is not None else self._fetch()
        self._ahead = None
        if isinstance(staged, Exception):
            raise staged
        if staged.event is not None:
            self.lane.receive(staged.sent, staged.event)
        self.state = staged.state
        return Fed(staged.batch, staged.index)

    def close(self) -> None:
        """Ends the loader's epoch where it is."""
        self._ahead = None
        if hasattr(self._batches, "close"):
            self._batches.close()

    def _fetch(self) -> _Staged:
        before = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - before
        # A loader's state counts the batches that it gave; the next one must not be fetched before this is noted.
        state = self.loader.state_dict()
        if self.lane is None or self.ring is None:
            return _Staged(batch, None, {}, batch["index"], state)
        # What a loader made on the device stays as it is.
        on_host = {name: value for name, value in batch.items() if value.device.type == "cpu"}
        if not on_host:
            return _Staged(batch, None, {}, batch["index"], state)
        sent, event = self.lane.send(self.ring.pack(on_host))
        self.ring.sent(event)
        return _Staged(batch | sent, event, sent, batch["index"], state)
