"""A micro-step as one CUDA graph: forward and backward are recorded once and then launched together.

The optimizer stays outside: its fused kernels are a few dozen launches, and the rate stays a plain number. This module
has not been run on a GPU yet; its bookkeeping is tested on the CPU with a recorder that repeats the Python function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.config import ConfigError

Values = dict[str, Tensor]
Replay = Callable[[], Values]


def require_graphs(device: torch.device, world_size: int) -> None:
    """Raises ConfigError where run.cuda_graph cannot work."""
    if device.type != "cuda":
        raise ConfigError(f"run.cuda_graph needs a GPU, and this run is on {device}; set --run.cuda_graph False")
    if world_size > 1:
        raise ConfigError(
            f"run.cuda_graph records one process's work, and this run has {world_size} ranks whose gradients meet in the "
            "backward pass; set --run.cuda_graph False"
        )


def record_cuda(micro: Callable[[], Values]) -> Replay:
    """Warms a function up on a side stream, as CUDA graphs want it, records it, and returns what repeats it.

    The tensors it returns are the same at every repetition, overwritten by the next. Random numbers follow the
    generator's seed at the time of the repetition.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            micro()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = micro()

    def replay() -> Values:
        graph.replay()
        return values

    return replay


class GraphedStep:
    """(batch, seed) -> the objective's values, with gradients added to `.grad`; one recording for each shape of batch.

    Gradients live in the same memory from the first recording on: zero them, never set them to None.
    """

    def __init__(
        self,
        objective: nn.Module,
        parameters: list[nn.Parameter],
        accumulate: int,
        record: Callable[[Callable[[], Values]], Replay] = record_cuda,
    ) -> None:
        self.objective, self.parameters, self.accumulate, self.record = objective, parameters, accumulate, record
        self.recorded: dict[Any, tuple[dict[str, Tensor], Tensor, Replay]] = {}

    def __call__(self, batch: dict[str, Tensor], seed: Tensor) -> Values:
        kind = tuple((key, value.shape, value.dtype) for key, value in sorted(batch.items()))
        if kind not in self.recorded:
            self.recorded[kind] = self._recorded(batch, seed)
        inputs, seed_input, replay = self.recorded[kind]
        for key, value in batch.items():
            inputs[key].copy_(value)
        seed_input.copy_(seed)
        return replay()

    def _recorded(self, batch: dict[str, Tensor], seed: Tensor) -> tuple[dict[str, Tensor], Tensor, Replay]:
        inputs = {key: value.clone() for key, value in batch.items()}
        seed_input = seed.clone()
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]

        def micro() -> Values:
            values = self.objective(inputs, seed_input)
            (values["loss"] / self.accumulate).backward()
            return {key: value.detach() for key, value in values.items()}

        replay = self.record(micro)
        # What warming up left behind is taken back: gradients and the generators' positions.
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if parameter.grad is not None:
                parameter.grad.zero_() if gradient is None else parameter.grad.copy_(gradient)
        torch.manual_seed(torch.initial_seed())
        return inputs, seed_input, replay
