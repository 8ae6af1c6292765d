"""AVA's mAP and the movements of boxes against the official evaluation and transforms, file by file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity_files import cases_or_skip, read_case
from umt_fast.data.decode import boxes as moves
from umt_fast.data.errors import DataError
from umt_fast.tasks import frame_map


def write(folder: Path, config: dict) -> dict[str, Path]:
    written = {}
    for name in ("ground_truth_csv", "detections_csv", "excluded_csv", "labelmap_pbtxt"):
        written[name] = folder / name.replace("_", ".")
        written[name].write_text(config[name])
    return written


@pytest.mark.parametrize("path", cases_or_skip("map"))
def test_mean_average_precision_parity(path: Path, tmp_path: Path) -> None:
    config, tensors = read_case(path)
    files = write(tmp_path, config)
    truth, detected = (frame_map.read_boxes(files[name]) for name in ("ground_truth_csv", "detections_csv"))
    names, excluded = frame_map.read_label_map(files["labelmap_pbtxt"]), frame_map.read_excluded(files["excluded_csv"])
    assert list(names) == tensors["class_ids"].tolist()
    found = frame_map.frame_map(truth, detected, names, excluded)
    np.testing.assert_allclose(list(found.per_class.values()), tensors["per_class_ap"].numpy(), rtol=1e-12)
    assert found.mean == pytest.approx(tensors["map"].item(), rel=1e-12)
    assert {name for name, value in found.per_class.items() if np.isnan(value)} == {
        name for name, value in config["per_class"].items() if value is None
    }


def rows(*entries: tuple) -> frame_map.Boxes:
    return frame_map.Boxes.of(entries)


def test_a_true_box_is_taken_once_and_by_the_best_score() -> None:
    frame, box = ("m", 902), (0.1, 0.1, 0.5, 0.5)
    truth = rows((frame, box, 1, 1.0))
    detected = rows((frame, (0.1, 0.1, 0.5, 0.48), 1, 0.4), (frame, box, 1, 0.9), (("m", 903), box, 1, 0.6))
    # Right, then two wrong ones: of a frame without the class, and of a box that is taken.
    assert frame_map.frame_map(truth, detected, {1: "sit"}).mean == 1.0
    detected = rows((frame, box, 1, 0.4), (("m", 903), box, 1, 0.6))
    assert frame_map.frame_map(truth, detected, {1: "sit"}).mean == 0.5
    assert frame_map.frame_map(truth, detected, {1: "sit"}, {("m", 903)}).mean == 1.0


def test_nothing_to_find_is_no_number_and_nothing_found_is_zero() -> None:
    truth = rows((("m", 1), (0, 0, 1, 1), 1, 1.0))
    found = frame_map.frame_map(truth, rows(), {1: "sit", 2: "stand"})
    assert found.per_class["sit"] == 0 and np.isnan(found.per_class["stand"]) and found.mean == 0
    assert np.isnan(frame_map.frame_map(rows(), truth, {1: "sit"}).mean)


@pytest.mark.parametrize("line", ["m,902,0.1,0.2,0.3", "m,902,a,0,1,1,3", "m,x,0,0,1,1,3", "m,902,0,0,nan,1,3"])
def test_a_line_that_is_no_box_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "boxes.csv").write_text(f"m,902,0,0,1,1,3\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        frame_map.read_boxes(tmp_path / "boxes.csv")


@pytest.mark.parametrize("path", cases_or_skip("boxes"))
def test_movements_of_boxes_parity(path: Path) -> None:
    config, tensors = read_case(path)
    made = config["operations"]
    size = tuple(made["size_w_h"])
    # The official operation cuts boxes in place: all others saw what it left.
    boxes = moves.clipped(tensors["boxes.in"], size)
    jitter = made["jitter"]
    assert (moves.OUTWARD, moves.INWARD) == ((jitter["out_x"], jitter["out_y"]), (jitter["in_x"], jitter["in_y"]))
    found = {
        "clipped": boxes,
        "extended": moves.extended(boxes, size, tuple(made["extension"])),
        "flipped": moves.flipped(boxes, size),
        "resized": moves.resized(boxes, size, tuple(made["resized_to"])),
        "cropped": moves.cropped(boxes, tuple(made["crop"])),
        "jittered": moves.jittered(boxes, size, tensors["boxes.jitter_uniforms"]),
        "as_xywh": moves.to_xywh(boxes),
        "from_xywh": moves.from_xywh(boxes),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[f"boxes.{name}"], rtol=1e-6, atol=1e-4, msg=name)
    for case in config["resize"]:
        side = config["transform"]["published_short_side"]
        assert list(moves.short_side_size(case["width"], case["height"], side)) == case["size_w_h"]


def test_boxes_outside_the_picture_become_empty_and_are_told() -> None:
    boxes = torch.tensor([[-20.0, 5, -3, 9], [2, 3, 8, 9]])
    assert moves.not_empty(moves.clipped(boxes, (10, 12))).tolist() == [False, True]
