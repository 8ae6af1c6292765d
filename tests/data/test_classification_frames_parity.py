"""Frame numbers of the fine-tuning readers against the official ones: every table of every frames_* file."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.data.test_frames_parity import Extreme
from tests.parity_files import parity_files
from umt_fast.data.decode.classification_frames import RULES, FrameRule, KineticsDense, KineticsSparse, Ssv2

FILES = [pytest.param(path, id=path.stem) for path in parity_files("frames")]


def table(path: Path, name: str, *columns: str) -> list[tuple[list[int], list[list[int]]]]:
    """Pairs of a query and the columns of its row without their padding."""
    with safe_open(path, "np") as file:
        if f"{name}.query" not in file.keys():  # noqa: SIM118, it is no dictionary
            pytest.skip(f"{path.name} has no table {name}")
        padding = json.loads(file.metadata()["config"])["padding"]
        queries = file.get_tensor(f"{name}.query").tolist()
        found = [file.get_tensor(f"{name}.{column}") for column in columns]
    assert queries
    rows = [[[value for value in part[n].tolist() if value != padding] for part in found] for n in range(len(queries))]
    return list(zip(queries, rows, strict=True))


def rule_and_rest(name: str, query: list[int]) -> tuple[FrameRule, list[int]]:
    """The rule, and the columns behind num_frames and count; those of the dense rule start with its rate."""
    rest = query[2:]
    return (KineticsDense(rest[0]), rest[1:]) if name == "kinetics_dense" else (RULES[name], rest)


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("name", ["kinetics_sparse", "ssv2", "ssv2_folder"])
def test_ranges_of_training_draws_parity(path: Path, name: str) -> None:
    for query, (low, high) in table(path, f"{name}.train", "low", "high"):
        n, count = query
        assert RULES[name].train(n, count, Extreme(False)).tolist() == low, query
        assert RULES[name].train(n, count, Extreme(True)).tolist() == high, query


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("name", sorted(RULES))
def test_validation_frames_parity(path: Path, name: str) -> None:
    for query, (frames,) in table(path, f"{name}.val", "frames"):
        rule, _ = rule_and_rest(name, query)
        assert rule.validation(*query[:2]).tolist() == frames, query


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("name", sorted(RULES))
def test_test_frames_parity(path: Path, name: str) -> None:
    for query, (frames,) in table(path, f"{name}.test", "frames"):
        rule, (segments, segment) = rule_and_rest(name, query)
        assert rule.test(*query[:2], segments, segment).tolist() == frames, query


@pytest.mark.parametrize("path", FILES)
def test_dense_windows_before_the_start_parity(path: Path) -> None:
    """Exactly the listed videos have a validation window that starts before frame 0: counted from the end, it leaves them."""
    queries = [query for query, _ in table(path, "kinetics_dense.val")]
    with safe_open(path, "np") as file:
        listed = json.loads(file.metadata()["config"])["dense_val_negative_start"]
    found = []
    for n, count, rate in queries:
        first = KineticsDense(rate).validation(n, count)[0]
        if n > count * rate and first + count * rate >= n:
            found.append([n, count, rate])
    assert sorted(found) == sorted(query for query in listed if query in queries)


@pytest.mark.parametrize(("num_frames", "count", "rate"), [(100, 8, 4), (33, 8, 4), (300, 16, 2)])
def test_dense_training_windows_lie_in_the_video(num_frames: int, count: int, rate: int) -> None:
    """All windows but the last are drawn, each as often as another, and each is a window of the validation's shape."""
    rng, rule = np.random.default_rng(0), KineticsDense(rate)
    draws = np.stack([rule.train(num_frames, count, rng) for _ in range(4000)])
    starts = draws[:, 0]
    assert set(starts.tolist()) == set(range(num_frames - count * rate))
    assert (draws[:, -1] - starts == count * rate - 1).all() and draws.max() < num_frames
    shape = rule.validation(1000, count) - rule.validation(1000, count)[0]
    # Positions are rounded down from a start that is an integer, so that all windows have one shape.
    assert (draws - starts[:, None] == shape).all()


def test_draws_of_the_sparse_rule_spread_over_their_range() -> None:
    rng = np.random.default_rng(0)
    draws = np.stack([KineticsSparse().train(41, 4, rng) for _ in range(4400)])
    for frame, low in zip(draws.T, (0, 10, 20, 30), strict=True):
        share = np.bincount(frame - low, minlength=11) / 4400
        assert len(share) == 11 and abs(share - 1 / 11).max() < 5 * np.sqrt(1 / 11 / 4400)


def test_clips_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="segment 4 of 4"):
        KineticsSparse().test(100, 8, 4, 4)
    with pytest.raises(ValueError, match="3 test segments"):
        Ssv2().test(100, 8, 3, 0)
    for rule in RULES.values():
        with pytest.raises(ValueError, match="video of 0 frames"):
            rule.validation(0, 8)
