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
# What a micro-step leaves: its values, and the gradients it wrote (none where they are added to earlier ones).
Result = tuple[Values, list[Tensor | None]]
Replay = Callable[[], Result]


def require_graphs(device: torch.device, world_size: int) -> None:
    """Raises ConfigError where run.cuda_graph cannot work."""
    if device.type != "cuda":
        raise ConfigError(f"run.cuda_graph needs a GPU, and this run is on {device}; leave out --run.cuda_graph")
    if world_size > 1:
        raise ConfigError(
            f"run.cuda_graph records one process's work, and this run has {world_size} ranks whose gradients meet in the "
            "backward pass; leave out --run.cuda_graph"
        )


class CudaRecorder:
    """Records functions as CUDA graphs that share one pool of memory.

    So one graph's results are overwritten by the repetition of any other: they must have been read by then.
    """

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, micro: Callable[[], Result]) -> Replay:
        """Warms a function up on a side stream, as CUDA graphs want it, records it, and returns what repeats it.

        The tensors it returns are the same at every repetition. Random numbers follow the default generator's seed at the
        time of the repetition: recording registers that generator, and the models draw from no other.
        """
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                micro()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # By default a call that any thread makes meanwhile, as those that decode and pin do, would spoil the recording.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = micro()

        def replay() -> Result:
            graph.replay()
            return result

        return replay


class GraphedStep:
    """(batch, seed) -> the objective's values, with gradients in `.grad`; one recording for each shape of batch.

    Where a micro-step is a step (accumulate 1) its backward pass finds no gradients and writes them, instead of adding to
    zeros: set them to None after the update. Otherwise they are added up in the same memory from the first recording on:
    zero them, never set them to None.
    """

    def __init__(
        self,
        objective: nn.Module,
        parameters: list[nn.Parameter],
        accumulate: int,
        record: Callable[[Callable[[], Result]], Replay] | None = None,
    ) -> None:
        self.objective, self.parameters, self.accumulate = objective, parameters, accumulate
        self.record = record or CudaRecorder()
        self.recorded: dict[Any, tuple[dict[str, Tensor], Tensor, Replay]] = {}

    def __call__(self, batch: dict[str, Tensor], seed: Tensor) -> Values:
        kind = tuple((key, value.shape, value.dtype) for key, value in sorted(batch.items()))
        if kind not in self.recorded:
            self.recorded[kind] = self._recorded(batch, seed)
        inputs, seed_input, replay = self.recorded[kind]
        for key, value in batch.items():
            inputs[key].copy_(value)
        seed_input.copy_(seed)
        values, gradients = replay()
        if not self.adds_up:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        return values

    @property
    def adds_up(self) -> bool:
        """Whether gradients are added to earlier ones, and must stay where they are."""
        return self.accumulate > 1

    def _recorded(self, batch: dict[str, Tensor], seed: Tensor) -> tuple[dict[str, Tensor], Tensor, Replay]:
        inputs = {key: value.clone() for key, value in batch.items()}
        seed_input = seed.clone()
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]

        def micro() -> Result:
            if not self.adds_up:
                for parameter in self.parameters:
                    parameter.grad = None
            values = self.objective(inputs, seed_input)
            (values["loss"] / self.accumulate).backward()
            written = [] if self.adds_up else [parameter.grad for parameter in self.parameters]
            return {key: value.detach() for key, value in values.items()}, written

        replay = self.record(micro)
        # What warming up left behind is taken back: gradients and the generators' positions.
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if self.adds_up and parameter.grad is not None:
                parameter.grad.zero_() if gradient is None else parameter.grad.copy_(gradient)
        torch.manual_seed(torch.initial_seed())
        return inputs, seed_input, replay
