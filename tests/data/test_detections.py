"""Lists of key frames with boxes: the rules at their edges, and what a mistake in a file says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from umt_fast.data.errors import DataError
from umt_fast.data.sources import ava_csv, detections


def image(number: int, movie: str = "m", second: int = 902, width: int = 100, height: int = 80) -> dict[str, Any]:
    return {"id": number, "movie": movie, "timestamp": second, "width": width, "height": height}


def annotation(number: int, box: list[float], *labels: int) -> dict[str, Any]:
    return {"image_id": number, "bbox": box, "action_ids": list(labels)}


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def training(folder: Path, images: list, annotations: list, classes: int = 80) -> detections.KeyFrames:
    file = written(folder / "train.json", {"images": images, "annotations": annotations})
    return detections.training_frames(file, classes)


def test_a_box_outside_the_picture_vanishes_and_its_key_frame_stays(tmp_path: Path) -> None:
    images = [image(2, second=903), image(1), image(3, second=904)]
    outside, across = [-30.0, 4.0, 20.0, 9.0], [90.0, 70.0, 40.0, 40.0]
    keys = training(tmp_path, images, [annotation(1, outside, 5), annotation(2, across, 7), annotation(2, outside, 8)])
    assert [key.second for key in keys] == [902, 903]  # by id, and without the one that has no annotation
    assert keys[0].boxes.shape == (0, 4) and keys[0].labels.shape == (0, 80)
    assert keys[1].boxes.tolist() == [[90, 70, 99, 79]]
    assert keys[1].labels.nonzero().tolist() == [[0, 6]]


def test_what_a_transform_does_to_boxes_does_not_reach_the_list(tmp_path: Path) -> None:
    keys = training(tmp_path, [image(1)], [annotation(1, [1.0, 2.0, 30.0, 40.0], 1)])
    first = keys[0]
    first.boxes.zero_(), first.labels.zero_()
    assert keys[0].boxes.tolist() == [[1, 2, 30, 41]] and keys[0].labels.sum() == 1
    with pytest.raises(IndexError):
        keys[1]


def test_boxes_of_low_score_and_of_other_images_are_not_tested(tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", {"images": [image(1), image(2, second=903)]})
    rows = [(1, 0.79), (2, 0.8), (9, 0.99), (2, 1.0)]
    boxes = [{"image_id": number, "bbox": [0, 0, 9, 9], "score": score} for number, score in rows]
    keys = detections.test_frames(file, written(tmp_path / "d.json", boxes))
    assert [key.second for key in keys] == [903] and keys[0].labels is None
    torch.testing.assert_close(keys[0].scores, torch.tensor([0.8, 1.0]))
    assert len(detections.test_frames(file, tmp_path / "d.json", 0.5)) == 2
    with pytest.raises(DataError, match=r"no box of score 1\.5 or more.*the best score is 1\.0.*lower least score"):
        detections.test_frames(file, tmp_path / "d.json", 1.5)


@pytest.mark.parametrize("label", [0, 81, -1])
def test_a_class_out_of_range_is_refused(tmp_path: Path, label: int) -> None:
    with pytest.raises(DataError, match=rf"annotations\[1\]: action_ids holds {label}; classes run from 1 to 80"):
        training(tmp_path, [image(1)], [annotation(1, [0, 0, 9, 9], 80), annotation(1, [0, 0, 9, 9], 3, label)])
    truth = written(tmp_path / "truth.csv", f"m,0902,0.1,0.1,0.5,0.5,80,0\nm,0902,0.1,0.1,0.5,0.5,{label},0\n")
    with pytest.raises(DataError, match=rf"line 2: class {label}; classes run from 1 to 80"):
        ava_csv.training_frames(truth, {"m": (100, 80)})


ONE = annotation(1, [0, 0, 9, 9], 1)
MISTAKES = {
    "no JSON": ("{", "is no JSON file"),
    "a list": ([], "an annotation file is an object"),
    "no images": ({"images": [], "annotations": []}, "lists no images"),
    "images missing": ({"annotations": []}, "`images` is NoneType"),
    "annotations missing": ({"images": [image(1)]}, "`annotations` is NoneType"),
    "no annotation": ({"images": [image(1)], "annotations": []}, "none of its 1 images has an annotation"),
    "a field missing": ({"images": [{"id": 1, "movie": "m"}], "annotations": []}, "has no timestamp and no width"),
    "a size of 0": ({"images": [image(1, width=0)], "annotations": []}, "width and height are 0 and 80"),
    "three numbers": (
        {"images": [image(1)], "annotations": [annotation(1, [0, 0, 9], 1)]},
        r"\[0\]: bbox is \[0, 0, 9\]",
    ),
    "not finite": ({"images": [image(1)], "annotations": [annotation(1, [0, 0, float("nan"), 9], 1)]}, "bbox is"),
    "labels": ({"images": [image(1)], "annotations": [ONE | {"action_ids": "12"}]}, "must be a list of class numbers"),
    "ids of two kinds": (
        {"images": [image(1), image("x")], "annotations": [ONE, ONE | {"image_id": "x"}]},  # type: ignore[arg-type]
        "must be of one kind",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_an_annotation_file_is_named(tmp_path: Path, name: str) -> None:
    content, said = MISTAKES[name]
    with pytest.raises(DataError, match=said) as caught:
        detections.training_frames(written(tmp_path / "a.json", content))
    assert str(tmp_path / "a.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_score_that_is_no_number_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation file at"):
        detections.training_frames(tmp_path / "absent.json")
    file = written(tmp_path / "a.json", {"images": [image(1)]})
    boxes = written(tmp_path / "d.json", [{"image_id": 1, "bbox": [0, 0, 9, 9], "score": None}])
    with pytest.raises(DataError, match=r"\[0\]: score is None"):
        detections.test_frames(file, boxes)


def test_images_of_other_sizes_and_unknown_annotations_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [image(1), image(2, second=903, width=50)]
    keys = training(tmp_path, images, [annotation(2, [60.0, 0, 9, 9], 1), annotation(7, [0, 0, 9, 9], 1)])
    assert keys[0].size == (100, 80) and len(keys[0].boxes) == 1  # the first image's size, as officially
    assert "1 images have another size" in caplog.text and "1 annotations are of images" in caplog.text
