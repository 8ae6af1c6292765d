"""Order, shards, state, sampling and crops."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from umt_fast.config import DataConfig
from umt_fast.data.decode import sampling, transforms
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.lists import Clip


@pytest.fixture
def clips(tiny_list: Path) -> list[Clip]:
    folder = tiny_list.parent
    return [Clip(path=str(folder / f"video{number % 2}.mp4"), label=number) for number in range(10)]


def loader(clips: list[Clip], workers: int = 0, **changes: object) -> ClipLoader:
    kind = {"num_frames": 4, "image_size": 32, "batch_size": 2, "seed": 5} | changes
    return ClipLoader(clips, DataConfig(workers=workers, num_sample=2), **kind)


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in ("video", "index", "label")
    )


def test_worker_count_changes_nothing_and_the_seed_everything(clips: list[Clip]) -> None:
    here = list(loader(clips))
    assert here[0]["video"].shape == (4, 4, 32, 32, 3) and here[0]["video"].dtype == torch.uint8
    assert same(here, list(loader(clips, workers=2)))
    assert not same(here, list(loader(clips, seed=6)))


def test_restored_state_gives_the_rest_of_the_epoch(clips: list[Clip]) -> None:
    whole = list(loader(clips))
    first = loader(clips)
    iterator = iter(first)
    next(iterator), next(iterator)
    second = loader(clips)
    second.load_state_dict(first.state_dict())
    assert same(list(second), whole[2:])


@pytest.mark.process
def test_workers_outlive_epochs_also_when_one_is_left_early(clips: list[Clip]) -> None:
    """What was prefetched of an epoch that was left must not turn up in the next one."""
    here, there = loader(clips), loader(clips, workers=2)
    left = iter(there)
    next(left)
    left.close()
    workers = {process.pid for process in multiprocessing.active_children()}
    for epoch in (1, 2):
        here.set_epoch(epoch), there.set_epoch(epoch)
        assert same(list(there), list(here))
    assert workers and {process.pid for process in multiprocessing.active_children()} == workers


def test_epochs_differ_and_cover_the_list(clips: list[Clip]) -> None:
    it = loader(clips)
    orders = []
    for epoch in range(2):
        it.set_epoch(epoch)
        orders.append([index for batch in it.order(epoch) for index in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]


def test_ranks_share_an_epoch_without_overlap(clips: list[Clip]) -> None:
    ranks = [loader(clips, rank=rank, world_size=2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 2
    seen = [index for rank in ranks for batch in rank.order(0) for index in batch]
    assert len(seen) == len(set(seen)) == 8


def test_sparse_draws_are_uniform_within_their_segment() -> None:
    rng = np.random.default_rng(0)
    draws = np.stack([sampling.sparse_train(23, 4, rng) for _ in range(6000)])
    for segment in range(4):
        values, counts = np.unique(draws[:, segment], return_counts=True)
        assert values.tolist() == list(range(5 * segment, 5 * segment + 5))
        # chi-square with 4 degrees of freedom: 18.5 is exceeded once in a thousand
        assert ((counts - 1200) ** 2 / 1200).sum() < 18.5


def test_short_clips_follow_the_official_rule() -> None:
    rng = np.random.default_rng(0)
    assert sampling.sparse_train(7, 8, rng).tolist() == sampling.sparse_train(1, 8, rng).tolist() == [0] * 8
    assert sampling.dense_train(5, 4, 4, rng).tolist() == [0, 4, 4, 4]
    assert sampling.sparse_center(8, 4).tolist() == [1, 3, 5, 7]


def test_crops_come_from_the_official_sizes_and_places() -> None:
    rng = np.random.default_rng(0)
    sizes, places, flips = set(), set(), 0
    for _ in range(3000):
        crop = transforms.multi_scale_crop(340, 256, 224, True, rng)
        sizes.add((crop.width, crop.height))
        if (crop.width, crop.height) == (224, 224):
            places.add((crop.left, crop.top))
        flips += crop.flip
    # 256 * (1, .875, .75, .66), 256 * .875 being the wanted size itself
    sides = [256, 224, 192, 168]
    assert sizes == {(sides[i], sides[j]) for i in range(4) for j in range(4) if abs(i - j) < 2}
    assert len(places) == 13 and (58, 16) in places and (116, 32) in places and (29, 24) in places
    assert 1350 < flips < 1650


def test_crop_equals_pil_and_flip_mirrors() -> None:
    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 256, (1, 60, 80, 3), dtype=np.uint8)
    crop = transforms.Crop(10, 5, 50, 40)
    expected = Image.fromarray(frame[0]).crop((10, 5, 60, 45)).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(transforms.apply(frame, crop, 32)[0], np.asarray(expected))
    mirrored = transforms.apply(frame, transforms.Crop(10, 5, 50, 40, True), 32)
    np.testing.assert_array_equal(mirrored[0], np.asarray(expected)[:, ::-1])


def test_random_resized_crops_cover_half_to_all_of_the_area() -> None:
    rng = np.random.default_rng(0)
    crops = [transforms.random_resized_crop(340, 256, True, rng) for _ in range(500)]
    areas = np.array([crop.width * crop.height / (340 * 256) for crop in crops])
    aspects = np.array([crop.width / crop.height for crop in crops])
    assert 0.49 < areas.min() < 0.55 and 0.95 < areas.max() <= 1.0
    assert 0.74 < aspects.min() and aspects.max() < 1.34
    assert all(c.left >= 0 and c.left + c.width <= 340 and c.top >= 0 and c.top + c.height <= 256 for c in crops)
    assert 0.4 < np.mean([crop.flip for crop in crops]) < 0.6
    narrow = transforms.random_resized_crop(400, 20, False, rng)  # no such window fits: the widest allowed, centered
    assert (narrow.height, narrow.width, narrow.flip) == (20, 27, False)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.process
@pytest.mark.slow
def test_workers_end_when_their_process_is_killed(tiny_list: Path) -> None:
    program = (
        "import sys, time\n"
        "from umt_fast.config import DataConfig\n"
        "from umt_fast.data.loaders.clips import ClipLoader\n"
        "from umt_fast.data.sources.lists import read_list\n"
        "if __name__ == '__main__':\n"
        "    data = DataConfig(workers=1)\n"
        "    loader = ClipLoader(read_list(sys.argv[1], data), data, num_frames=2, image_size=16, batch_size=1)\n"
        "    batches = iter(loader)\n"
        "    next(batches)\n"
        "    print(loader._loader._iterator._workers[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = tiny_list.with_name("program.py")
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, str(script), str(tiny_list)], stdout=subprocess.PIPE, env=environment)
    worker = int(process.stdout.readline())
    assert alive(worker)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(worker)
