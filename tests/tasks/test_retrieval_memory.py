"""What an evaluation of retrieval holds in memory: what it was allowed to keep, and little else."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from umt_fast.config import DataConfig, TextConfig, VitConfig
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.columns import Clips, Strings
from umt_fast.data.sources.queries import Queries
from umt_fast.engine.distributed import Ranks
from umt_fast.models.downstream import RetrievalModel
from umt_fast.tasks import retrieval

pytestmark = pytest.mark.slow
CLIPS, TOKENS, WIDTH = 500, 1024, 64
KEPT = CLIPS * TOKENS * WIDTH * 4
"""Bytes of all vision tokens: 125 MiB."""


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell what memory a process has of its own")


def growth(work: Callable[[], None]) -> int:
    """The most bytes by which own_memory grows while `work` runs."""
    before, highest, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest - before


class Loader:
    """A ClipLoader's batches, without files."""

    def __init__(
        self, clips: Clips, data: DataConfig, *, num_frames: int, image_size: int, batch_size: int, **_: object
    ):
        self.shape, self.count = (batch_size, num_frames, image_size, image_size, 3), len(clips) // batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            yield {"video": torch.randint(256, self.shape, dtype=torch.uint8, generator=generator)}


class Words:
    """Tokens of captions: one word each."""

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.stack([torch.ones_like(rows), 3 + rows % 90], 1)
        return ids, torch.ones_like(ids, dtype=torch.bool)


def measured(bound: int) -> tuple[int, int]:
    """By how many bytes own memory grows in an evaluation with this bound, and in one whose bound is never reached."""
    retrieval.ClipLoader = Loader
    vit = VitConfig(width=WIDTH, depth=1, num_heads=2, image_size=128, patch_size=4, num_frames=1, drop_path=0.0)
    text = TextConfig(width=32, depth=2, fusion_layer=1, num_heads=2, vocab_size=100, max_positions=8)
    model = RetrievalModel(vit, text, embed_dim=16).eval()
    right = torch.arange(CLIPS)[:, None].expand(-1, 2)
    clips = Clips.of(Clip(path=f"{number}.mp4") for number in range(CLIPS))
    queries = Queries(clips, Strings.of(["word"] * CLIPS), right)
    ranks = Ranks(0, 1, torch.device("cpu"))

    def judged(memory: int) -> Callable[[], None]:
        kind = {"top_k": 2, "batch_size": 10, "memory": memory}
        return lambda: retrieval.evaluate(model, queries, Words(), DataConfig(workers=0), ranks, **kind)

    judged(KEPT)()  # libraries take their own memory at first use
    torch.manual_seed(0)
    return growth(judged(bound)), growth(judged(2 * KEPT))


def test_evaluation_stays_within_its_bound() -> None:
    """Own memory grows by the bound and by less than half of what is kept: the rest is in a file that the system may drop."""
    own_memory()
    bound = KEPT // 8
    # A process of its own: what earlier tests freed and this one takes again would not be seen to grow.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        kept, unbound = pool.apply(measured, (bound,))
    assert kept < bound + KEPT // 3
    assert unbound > 0.9 * KEPT, "without a bound all of it is the process's own"
