"""Batches that cross to a device one ahead: order, reuse of buffers, resume. The device is imagined: it copies late."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.test_trainer import trainer
from umt_fast.engine import checkpoint
from umt_fast.engine.feeding import Feed, PinnedRing
from umt_fast.engine.trainer import Trainer


class LateEvent:
    """Of a copy that happens only when somebody waits for it, and waits for those before it, as a stream's do."""

    def __init__(self, lane: "LateLane", pinned: dict[str, Tensor], sent: dict[str, Tensor]) -> None:
        self.lane, self.pinned, self.sent, self.done = lane, pinned, sent, False

    def synchronize(self) -> None:
        for event in self.lane.events:
            if not event.done:
                for name, value in event.pinned.items():
                    event.sent[name].copy_(value)
                event.done = True
            if event is self:
                return


class LateLane:
    """A side stream as slow as may be: nothing is there that was not waited for.

    launched: the computation is launched only, as a GPU's is, and reads its batch when `compute` is called.
    """

    def __init__(self, launched: bool = False) -> None:
        self.events: list[LateEvent] = []
        self.received, self.launched = 0, launched
        self.waiting: list[LateEvent] = []

    def send(self, pinned: dict[str, Tensor]) -> tuple[dict[str, Tensor], LateEvent]:
        sent = {name: torch.full_like(value, 77) for name, value in pinned.items()}
        self.events.append(LateEvent(self, pinned, sent))
        return sent, self.events[-1]

    def receive(self, sent: dict[str, Tensor], event: LateEvent) -> None:
        self.received += 1
        self.waiting.append(event)
        if not self.launched:
            self.compute()

    def compute(self) -> None:
        for event in self.waiting:
            event.synchronize()
        self.waiting.clear()


class Uneven:
    """Batches of several dtypes and of lengths that change, as captions' do; their content tells their number."""

    def __init__(self, count: int = 6, fails_at: int = -1) -> None:
        self.count, self.fails_at, self.position = count, fails_at, 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.position < self.count:
            number = self.position
            if number == self.fails_at:
                raise OSError("no such clip")
            self.position += 1
            yield {
                "video": torch.full((2, 3 + number % 3, 5), number, dtype=torch.uint8),
                "index": torch.tensor([number] * 2),
                "mask": torch.ones(2, 1 + number, dtype=torch.bool),
                "rate": torch.full((3,), number / 2),
            }


def ring(slots: int = 2) -> PinnedRing:
    return PinnedRing(slots, lambda count: torch.empty(count, dtype=torch.uint8))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_batches_arrive_whole_and_in_order(slots: int) -> None:
    feed = Feed(Uneven(), lane := LateLane(launched=True), ring(slots))
    for number, expected in enumerate(Uneven()):
        fed = feed.take()
        feed.stage()  # packed while the copy of the batch before may still read its buffer
        lane.compute()
        assert fed.index.tolist() == [number] * 2
        assert all(
            torch.equal(fed.batch[name], value) and fed.batch[name].dtype == value.dtype
            for name, value in expected.items()
        )
    assert lane.received == 6
    with pytest.raises(StopIteration):
        feed.take()


def test_buffers_are_used_again_and_grow_only() -> None:
    allocated = []
    own = PinnedRing(2, lambda count: allocated.append(count) or torch.empty(count, dtype=torch.uint8))
    feed = Feed(Uneven(40), LateLane(), own)
    for _ in range(40):
        feed.take()
        feed.stage()
    # Rounded to 256 bytes a tensor, all of these batches but the longest masks are equally large.
    assert len(allocated) == 2 and allocated == [4 * 256] * 2


def test_the_next_batch_is_under_way_while_a_step_runs() -> None:
    feed = Feed(Uneven(), lane := LateLane(), ring())
    feed.take()
    assert len(lane.events) == 1
    feed.stage()
    assert len(lane.events) == 2 and lane.received == 1
    feed.stage()  # one ahead, not more
    assert len(lane.events) == 2


def test_state_counts_what_was_taken() -> None:
    feed = Feed(loader := Uneven(), LateLane(), ring())
    assert feed.state == {"position": 0}
    for number in range(4):
        feed.take()
        feed.stage()
        assert feed.state == {"position": number + 1} and loader.position == number + 2


def test_a_batch_that_fails_does_not_cost_the_step_before() -> None:
    feed = Feed(Uneven(fails_at=2), LateLane(), ring())
    feed.take()
    feed.stage()
    assert feed.take().index.tolist() == [1, 1]
    feed.stage()  # fails, and says nothing yet: the step of batch 1 is being computed
    assert feed.state == {"position": 2}
    with pytest.raises(OSError, match="no such clip"):
        feed.take()


def test_what_a_loader_made_on_the_device_stays() -> None:
    class Decoded(Uneven):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in super().__iter__():
                yield batch | {"video": batch["video"].to("meta")}

    feed = Feed(Decoded(), lane := LateLane(), ring())
    fed = feed.take()
    assert fed.batch["video"].device.type == "meta" and "video" not in lane.events[0].sent
    assert fed.batch["index"].tolist() == [0, 0]


def test_without_a_device_nothing_is_fetched_ahead() -> None:
    feed = Feed(loader := Uneven())
    feed.take()
    feed.stage()
    assert loader.position == 1


def rows(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_fed_ahead_continues_exactly(accumulate: int, tmp_path: Path) -> None:
    def train(name: str, ahead: bool, **run: object) -> None:
        own = trainer(tmp_path / name, batch=2, accumulate=accumulate, **run)
        if ahead:
            own.lane, own.ring = LateLane(), ring()
        own.train()

    train("plain", False)
    train("whole", True)
    for last in (4, 9, 0):  # in mid-epoch twice
        train("parts", True, max_steps=last)
    assert rows(tmp_path / "whole") == rows(tmp_path / "plain") == rows(tmp_path / "parts")


def test_a_checkpoint_in_mid_epoch_has_the_loader_where_training_is(tmp_path: Path) -> None:
    """At such a step the next batch has been fetched: a run that goes on from it must train on that batch, too."""

    def make(name: str, **run: object) -> Trainer:
        own = trainer(tmp_path / name, batch=2, keep=99, **run)
        own.lane, own.ring = LateLane(), ring()
        return own

    make("whole").train()
    own, positions = make("parts", save_every=5), []
    save = own._save
    own._save = lambda: (positions.append((own.step, own.loader.position)), save())
    own.train()
    assert positions[0] == (5, 6)
    for step, path in checkpoint.checkpoints(tmp_path / "parts"):
        if step == 5:
            assert torch.load(path, weights_only=True)["loader"] == [{"epoch": 0, "position": 5}]
        else:
            path.unlink()
    make("parts").train()
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.gpu
def test_pinned_buffers_really_are() -> None:
    own = PinnedRing()
    packed = own.pack({"x": torch.arange(7), "y": torch.ones(3, dtype=torch.bool)})
    assert all(value.is_pinned() for value in packed.values())
    assert packed["x"].tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["clips", "alternating", "packed"])
def test_every_loader_of_ours_continues_where_training_was(kind: str, tmp_path: Path, tiny_list: Path) -> None:
    """Fetched one ahead, stopped after each number of batches, over two epochs: no clip twice, none left out."""
    from tests.data.test_cotraining import WORDS, both_kinds
    from umt_fast.data.loaders.joint import AlternatingLoader, PackedLoader

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))

    def make():
        parts = both_kinds(tiny_list, tmp_path)
        return {
            "clips": lambda: parts[0],
            "alternating": lambda: AlternatingLoader(parts, seed=1),
            "packed": lambda: PackedLoader(*parts),
        }[kind]()

    def run(loader, state: dict | None, first: int, count: int) -> tuple[list, dict]:
        """`count` batches from number `first` on, as Trainer goes through epochs."""
        if state is not None:
            loader.load_state_dict(state)
        found, own = [], ring()
        while len(found) < count:
            loader.set_epoch((first + len(found)) // len(loader))
            feed = Feed(loader, LateLane(), own)
            while len(found) < count:
                fed = feed.take()
                found.append((fed.index.tolist(), {name: value.clone() for name, value in fed.batch.items()}))
                if (first + len(found)) % len(loader) == 0:
                    break
                feed.stage()
            state = feed.state
            feed.close()
        return found, state

    length = len(make())
    whole, _ = run(make(), None, 0, 2 * length)
    plain, loader = [], make()
    for epoch in range(2):
        loader.set_epoch(epoch)
        plain += [batch["index"].tolist() for batch in loader]
    assert [index for index, _ in whole] == plain
    for stop in range(1, 2 * length):
        before, state = run(make(), None, 0, stop)
        after, _ = run(make(), state, stop, 2 * length - stop)
        for (index, batch), (expected, other) in zip(before + after, whole, strict=True):
            assert index == expected and all(torch.equal(batch[name], other[name]) for name in other)
