"""Exact search in blocks: of queries and of items, against all scores at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from umt_fast.tasks.ranking import nearest, place_of, search


@pytest.fixture(params=[(3, 4), (100, 5), (2, 1000)], ids=str)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and items that are held at once, none of which divides what there is."""
    monkeypatch.setattr("umt_fast.tasks.ranking._QUERIES", request.param[0])
    monkeypatch.setattr("umt_fast.tasks.ranking._ITEMS", request.param[1])


@pytest.mark.usefixtures("blocks")
def test_blocks_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randn(n, 6, generator=generator) for n in (8, 23))
    scores = queries @ items.t()
    for k in (1, 7, 23, 99):
        numbers, values = nearest(queries, items, k)
        expected = scores.topk(min(k, 23))
        assert torch.equal(numbers, expected.indices)
        torch.testing.assert_close(values, expected.values)
        numbers, values = nearest(queries, items, k, cosine=True)
        expected = torch.cosine_similarity(queries[:, None], items, dim=2).topk(min(k, 23))
        assert torch.equal(numbers, expected.indices)
        torch.testing.assert_close(values, expected.values)
    # Several right items a query, in the first block, the last, and both.
    pairs = [(0, 0), (0, 22), (1, 22), (2, 3), (2, 4), (3, 11), (4, 5), (5, 19), (6, 1), (6, 2), (6, 21), (7, 8)]
    hits = torch.zeros(8, 23, dtype=torch.bool)
    for query, item in pairs:
        hits[query, item] = True
    found = search(queries, items, torch.tensor(pairs), 5)
    assert torch.equal(found.rank, place_of(scores, hits).rank) and len(found.rank.unique()) > 3
    assert torch.equal(found.items, scores.topk(5).indices)


@pytest.mark.usefixtures("blocks")
def test_equal_scores_count_half_across_blocks() -> None:
    """Ten items alike, one of which is right: its rank is the middle of them."""
    queries, items = torch.ones(2, 3), torch.ones(10, 3)
    found = search(queries, items, torch.tensor([[0, 0], [1, 9]]), 3)
    assert found.rank.tolist() == [4.5, 4.5]


@pytest.mark.usefixtures("blocks")
def test_items_may_lie_in_a_mapped_file(tmp_path: Path) -> None:
    items = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    save_file({"embedding": items}, tmp_path / "features.safetensors")
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        numbers, _ = nearest(items[[17]], file.get_tensor("embedding"), 1)
    assert numbers.tolist() == [[int((items @ items[17]).argmax())]]
