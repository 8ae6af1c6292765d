"""The sample world's boxes lie on its things, and a detector's whole comparison runs."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest

from umt_fast import recipe
from umt_fast.data.sources import ava_csv
from umt_fast.sample_world import boxes, detection, world
from umt_fast.tasks.frame_map import read_label_map

FRAME = boxes.KEY_SECOND * boxes.RATE


def test_a_box_holds_its_thing_and_tells_where_it_goes() -> None:
    """Against pixels of two frames: what changed in color lies where the patterned thing's box says, and moves as its class."""
    seen = hidden = 0
    for number in range(60):
        scene = world.draw_scene(2, number)
        found = boxes.boxes_of(scene)
        corners, label = found[-1]  # the patterned thing is painted last, so that nothing hides it
        mask = world.foreground(scene, FRAME)
        rows, columns = np.nonzero(mask)
        inside = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.allclose(np.array(corners) * world.SIZE, inside)
        later = np.argwhere(world.foreground(scene, FRAME + 3)).mean(0)[::-1] - np.argwhere(mask).mean(0)[::-1]
        direction = list(world.DIRECTIONS.values())[label - 1]
        assert tuple(np.sign(np.round(later / 3)).astype(int)) == direction
        assert all(0 <= value <= 1 for box, _ in found for value in box) and {c for _, c in found} <= {1, 2, 3, 4}
        seen += len(found)
        hidden += 3 - len(found)
    assert seen > 2 * 60 and hidden > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.build(tmp_path_factory.mktemp("small") / "world", seed=0, train=24, test=8, labeled=24)


def test_lists_in_avas_format(small: Path) -> None:
    truth = boxes.write_lists(small, "test", 5)
    keys = ava_csv.training_frames(truth, {f"test/{number:05d}": (48, 48) for number in range(5)}, 4)
    assert keys.places() == [(f"test/{number:05d}", 1) for number in range(5)]
    detected = list(csv.reader(open(small / "test_detected.csv", newline="")))
    assert len(detected) == keys.count_boxes() and {row[7] for row in detected} == {"1.000"}
    names = read_label_map(small / "motions.pbtxt")
    assert names == {1: "moves left", 2: "moves right", 3: "moves up", 4: "moves down"}


def test_a_still_detector_differs_in_its_frames_alone() -> None:
    motions, still = recipe.load("sample_world_tasks:motions"), recipe.load("sample_world_tasks:still")
    assert still.clips.frames == "still" and motions.clips.frames == "released"
    for section in ("run", "data", "student", "optim"):
        assert getattr(motions, section) == getattr(still, section)


def test_the_comparison_runs(small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two steps of each start; that it is skipped once it is there."""
    pytest.importorskip("torchvision", reason="the detector needs torchvision")
    pytest.importorskip("cv2", reason="views are resized by OpenCV: pip install opencv-python-headless")
    load = detection.detector_config

    def short(*arguments: object) -> object:
        config = load(*arguments)
        config.run.max_steps, config.data.workers, config.run.epochs = 2, 0, 3
        return config

    monkeypatch.setattr(detection, "detector_config", short)
    boxes.write_lists(small, "train", 24)
    boxes.write_lists(small, "test", 8)
    caplog.set_level(logging.INFO, "umt_fast")
    found = {start: [detection.train_and_judge(small.parent, start, "", 0)] for start in ("scratch", "still")}
    assert all(0 < value[0] < 1 for value in found.values())
    assert (small.parent / "detection" / "scratch_0" / "detections.csv").is_file()
    lines = detection.table(found).splitlines()
    assert len(lines) == 4 and lines[3].startswith("| from pre-training, the key frame alone |")
