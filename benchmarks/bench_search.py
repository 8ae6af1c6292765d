"""Milliseconds of an exact search in stored embeddings: `pytest benchmarks/bench_search.py`.

`text`, `clip`: one query among 20,000 clips of 512 numbers, as the command `search` asks them once the model has read the text
or the clip; a clip asks by the cosine.
`gallery`: the ranks of 1,000 captions among as many clips, as the evaluation computes them. extra_info has milliseconds in the
best round. UMT_BENCH_ITEMS (20000) and UMT_BENCH_ROUNDS (5) say how many clips and how often.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.tasks.ranking import nearest, search

ITEMS = int(os.environ.get("UMT_BENCH_ITEMS", "20000"))
ROUNDS = int(os.environ.get("UMT_BENCH_ROUNDS", "5"))
WIDTH, CAPTIONS = 512, 1000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unit(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("kind", ["text", "clip", "gallery"])
def test_milliseconds(benchmark, kind: str) -> None:
    items = unit(ITEMS, 0)
    queries = F.normalize(items[:CAPTIONS] + 0.02 * unit(CAPTIONS, 1), dim=1)
    right = torch.arange(CAPTIONS)[:, None].expand(-1, 2).contiguous()

    def run() -> Tensor:
        if kind != "gallery":
            return nearest(queries[:1], items, 10, device=DEVICE, cosine=kind == "clip")[0]
        return search(queries, items, right, 10, device=DEVICE).items

    found = benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    assert torch.equal(found[:, 0], torch.arange(len(found)))
    benchmark.extra_info["milliseconds"] = round(1000 * benchmark.stats.stats.min, 2)
    benchmark.extra_info["items"], benchmark.extra_info["queries"] = ITEMS, len(found)
