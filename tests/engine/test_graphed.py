"""The bookkeeping of recorded micro-steps, on the CPU: here a recording repeats the Python function."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from umt_fast.config import ConfigError
from umt_fast.engine.graphed import GraphedStep


class Noisy(nn.Module):
    """Least squares with generator noise and a seed, both of which a wrong replay would change."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable = nn.Linear(4, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, batch: dict, seed: torch.Tensor) -> dict:
        x = batch["x"] + 0.1 * torch.rand(batch["x"].shape) + 0.01 * seed
        return {"loss": (self.trainable(x).squeeze(1) - batch["y"]).square().mean()}


def record(micro):
    """Warms up as the real one does, keeping its outputs in the same memory."""
    for _ in range(3):
        kept, gradients = micro()

    def replay():
        values, written = micro()
        for key, value in values.items():
            kept[key].copy_(value)
        for own, new in zip(gradients, written, strict=True):
            if own is not None:
                own.copy_(new)
        return kept, gradients

    return replay


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_steps_equal_eager_ones(accumulate: int) -> None:
    torch.manual_seed(0)
    objective = Noisy()
    parameters = list(objective.parameters())
    step = GraphedStep(objective, parameters, accumulate, record)
    micro_steps = []
    for number in range(6):
        rows = (4, 3)[number % 2]  # two shapes in turn, as clips and images come
        micro_steps.append(({"x": torch.randn(rows, 4), "y": torch.randn(rows)}, torch.tensor([number])))

    found: dict[str, list] = {"eager": [], "recorded": []}
    for way in found:
        for parameter in parameters:
            parameter.grad = None
        for number, (batch, seed) in enumerate(micro_steps):
            torch.manual_seed(number)
            if way == "eager":
                values = objective(batch, seed)
                (values["loss"] / accumulate).backward()
            else:
                # Fresh memory each time: the recording must read its own copy, not the first batch's.
                values = step({key: value.clone() for key, value in batch.items()}, seed.clone())
            found[way].append(values["loss"].detach().clone())
            found[way] += [p.grad.clone() for p in objective.trainable.parameters()]
            if accumulate == 1:
                for parameter in parameters:
                    parameter.grad = None
    torch.testing.assert_close(found["recorded"], found["eager"])
    assert len(step.recorded) == 2 and objective.unused.weight.grad is None


def test_no_silent_fall_back(tmp_path: Path) -> None:
    from umt_fast.engine.graphed import require_graphs

    with pytest.raises(ConfigError, match="run.cuda_graph needs a GPU.*cpu"):
        require_graphs(torch.device("cpu"), 1)
    with pytest.raises(ConfigError, match="4 ranks"):
        require_graphs(torch.device("cuda"), 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_backward_writes_gradients_where_nothing_accumulates(accumulate: int) -> None:
    """What a recording finds in `.grad` decides between a kernel that writes and one that reads, adds and writes."""
    objective = Noisy()
    parameters = list(objective.parameters())
    found = []

    def spy(micro):
        for parameter in objective.trainable.parameters():
            parameter.grad = torch.full_like(parameter, 5.0)  # left over from a step before
        found.append(micro)
        micro()
        return record(micro)

    step = GraphedStep(objective, parameters, accumulate, spy)
    assert step.adds_up == (accumulate > 1)
    batch = {"x": torch.randn(4, 4), "y": torch.randn(4)}
    step(batch, torch.tensor([1]))
    values, written = found[0]()
    assert len(written) == (0 if accumulate > 1 else len(parameters))
    if accumulate == 1:
        assert all(gradient.abs().max() < 5 for gradient in written if gradient is not None)
        assert [gradient is None for gradient in written] == [False, False, True, True]  # `unused` gets none


class FakeCuda:
    """Notes how graphs are recorded, and repeats nothing."""

    def __init__(self) -> None:
        self.graphs: list[dict] = []
        self.pools = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        class Graph:
            def replay(self) -> None:
                pass

        @contextlib.contextmanager
        def graph(recorded: Graph, **options: object):
            self.graphs.append(options)
            yield

        def handle() -> tuple[int, int]:
            self.pools += 1
            return (0, self.pools)

        for name, value in {
            "Stream": Stream,
            "current_stream": lambda *_: Stream(),
            "stream": lambda _: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": handle,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_recordings_share_a_pool_and_mind_their_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    objective = Noisy()
    step = GraphedStep(objective, list(objective.parameters()), 1)
    for rows in (4, 3, 4):
        step({"x": torch.randn(rows, 4), "y": torch.randn(rows)}, torch.tensor([1]))
    assert cuda.pools == 1 and cuda.graphs == [{"pool": (0, 1), "capture_error_mode": "thread_local"}] * 2
    # Gradients are those of the recording that was repeated last: of four rows, the first.
    first, second = (entry[2]()[1] for entry in step.recorded.values())
    assert objective.trainable.weight.grad is first[0] and first[0] is not second[0]
