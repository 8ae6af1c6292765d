"""Frame numbers against the official readers: every frames_*.safetensors is a case.

Tables of random draws give the lowest and highest value of each; generators that always draw the one or the other must give
exactly these.
"""

import json
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.parity_files import parity_files
from umt_fast.config import DataConfig
from umt_fast.data.decode import sampling
from umt_fast.data.decode.video import limited
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.sources.lists import Clip

Case = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture(params=parity_files("frames"), ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    with safe_open(request.param, "np") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}


class Extreme:
    """A generator whose every integer is the lowest, or the highest, that numpy's could give."""

    def __init__(self, highest: bool) -> None:
        self.highest = highest

    def integers(self, low: Any, high: Any = None, size: Any = None) -> np.ndarray:
        low, high = (0, low) if high is None else (low, high)
        assert (np.asarray(low) < high).all()
        value = np.asarray(high) - 1 if self.highest else np.asarray(low)
        return np.broadcast_to(value, value.shape if size is None else size).copy()


def reader(count: int, train: bool, **data: Any) -> ClipReader:
    return ClipReader([Clip(path="x")], DataConfig(**data), num_frames=count, image_size=32, seed=0, train=train)


def rows(case: Case, name: str, columns: tuple[str, ...]) -> list[list[np.ndarray]]:
    """(n, T, and the columns without their padding) of a table."""
    config, tables = case
    if f"{name}.query" not in tables:
        pytest.skip(f"the file has no table {name}")
    padding = config["padding"]
    found = [
        [*query, *(tables[f"{name}.{column}"][row] for column in columns)]
        for row, query in enumerate(tables[f"{name}.query"].tolist())
    ]
    assert found
    return [[n, count, *(values[values != padding] for values in columns)] for n, count, *columns in found]


def listed(case: Case, name: str) -> list[Any]:
    """A list of the file's configuration."""
    if name not in case[0]:
        pytest.skip(f"the file lists no {name}")
    return case[0][name]


@pytest.mark.parametrize(
    ("name", "rule"), [("pretrain.train", sampling.sparse_train), ("video_text.rand", sampling.interval_train)]
)
def test_ranges_of_random_draws(name: str, rule: Any, case: Case) -> None:
    for n, count, low, high in rows(case, name, ("low", "high")):
        assert rule(n, count, Extreme(False)).tolist() == low.tolist(), (n, count)
        assert rule(n, count, Extreme(True)).tolist() == high.tolist(), (n, count)


@pytest.mark.parametrize(("data_sampling", "name"), [("sparse", "pretrain.train"), ("intervals", "video_text.rand")])
def test_training_draws_by_the_rule_of_its_configuration(data_sampling: str, name: str, case: Case) -> None:
    """Also that draws spread: over all clips and keys the mean place within a range is its middle."""
    places = []
    for n, count, low, high in rows(case, name, ("low", "high")):
        for key in range(8):
            frames = reader(count, True, sampling=data_sampling).chooser((key, n))(n)
            assert frames.shape == (count,) and (frames >= low).all() and (frames <= high).all(), (n, count, frames)
            wide = high > low
            places.append(((frames - low) / np.maximum(high - low, 1))[wide])
    places = np.concatenate(places)
    # The mean of m values with the variance of a fair coin at most: five standard errors.
    assert len(places) and abs(places.mean() - 0.5) < 2.5 / np.sqrt(len(places))


def test_middle_frames_of_evaluation(case: Case) -> None:
    for n, count, frames in rows(case, "video_text.middle", ("frames",)):
        assert reader(count, False, sampling="intervals").chooser((0,))(n).tolist() == frames.tolist(), (n, count)


def test_fall_back_draws_different_frames_of_the_whole_clip(case: Case) -> None:
    for n, count in listed(case, "rand_fallback"):
        draws = np.stack([sampling.interval_train(n, count, np.random.default_rng(key)) for key in range(800)])
        own = min(n, count)
        assert draws.shape == (800, count) and (np.diff(draws[:, :own], axis=1) > 0).all()
        assert (draws[:, own:] == draws[:, own - 1 : own]).all()
        share = np.bincount(draws[:, :own].ravel(), minlength=n) / 800
        # Every frame is drawn equally often: own of n times, five standard errors.
        assert len(share) == n and abs(share - own / n).max() <= 5 * np.sqrt(0.25 / 800) * (own < n)


def test_first_30_seconds(case: Case) -> None:
    for entry in listed(case, "first_30_seconds"):
        choose = reader(len(entry["middle"]), False, sampling="intervals").chooser((0,))
        assert limited("x", choose, entry["fps"], 30.0)(entry["frames"]).tolist() == entry["middle"], entry
