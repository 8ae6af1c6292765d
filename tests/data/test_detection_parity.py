"""Lists of key frames, chosen frames, pixels and boxes against the official reader and transforms, file by file.

Every `boxes_*.safetensors` is a case; sizes, options and draws come from its metadata.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.parity_files import parity_files
from umt_fast.config import VitConfig
from umt_fast.data.decode import detection_view as views
from umt_fast.data.decode.boxes import short_side_size
from umt_fast.data.decode.detection_clip import Temporal
from umt_fast.data.sources import detections
from umt_fast.models.detector import PIXEL_MEAN, PIXEL_STD, Detector


@pytest.fixture(scope="module", params=parity_files("boxes"), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(request.param, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}


def write(folder: Path, files: dict) -> tuple[Path, Path]:
    annotations, detected = folder / "annotations.json", folder / "detected.json"
    annotations.write_text(json.dumps({name: files[name] for name in ("images", "annotations")}))
    detected.write_text(json.dumps(files["detections"]))
    return annotations, detected


def close(ours: torch.Tensor, theirs: list) -> None:
    torch.testing.assert_close(ours, torch.tensor(theirs).view(ours.shape), rtol=1e-6, atol=1e-4)


def test_parity_of_training_lists(case: tuple, tmp_path: Path) -> None:
    config, _ = case
    annotations, _ = write(tmp_path, config["files"])
    keys, theirs = detections.training_frames(annotations), config["train_clips"]
    assert [(key.movie, key.second) for key in keys] == [(clip["movie"], clip["timestamp"]) for clip in theirs]
    for key, clip in zip(keys, theirs, strict=True):
        assert key.scores is None
        close(key.boxes, clip["boxes"])
        assert [(row.nonzero().flatten() + 1).tolist() for row in key.labels] == clip["actions"]


def test_parity_of_test_lists(case: tuple, tmp_path: Path) -> None:
    config, _ = case
    keys = detections.test_frames(*write(tmp_path, config["files"]), config["files"]["box_thresh"])
    theirs = config["test_clips"]
    assert [(key.movie, key.second) for key in keys] == [(clip["movie"], clip["timestamp"]) for clip in theirs]
    for key, clip in zip(keys, theirs, strict=True):
        assert key.labels is None
        close(key.boxes, clip["boxes"])
        close(key.scores, clip["scores"])


def test_parity_of_chosen_frames(case: tuple) -> None:
    config, _ = case
    assert config["temporal"]
    for row in config["temporal"]:
        temporal = Temporal.official(sparse=row["sparse_flag"], num_frames=row["frames"], rate=row["rate"])
        assert temporal.indices(row["decoded"]).tolist() == row["indices"], row
    spans = {str(sparse): Temporal.official(sparse=sparse).span for sparse in (True, False)}
    assert spans == config["frame_span"]


def rule_of(config: dict) -> views.ViewRule:
    made = config["transform"]
    return views.ViewRule(short_side=made["short_side"], crop=made["crop"])


def test_parity_of_published_sizes(case: tuple) -> None:
    config, _ = case
    made, ours = config["transform"], views.ViewRule()
    assert (ours.short_side, ours.crop) == (made["published_short_side"], made["published_crop"])
    for row in config["resize"]:
        assert list(short_side_size(row["width"], row["height"], ours.short_side)) == row["size_w_h"]
    assert list(PIXEL_MEAN) == made["mean"] and list(PIXEL_STD) == made["std"]


def normalized(frames: np.ndarray) -> torch.Tensor:
    """(3, T, h, w)."""
    detector = Detector(VitConfig(width=8, depth=1, num_heads=1, image_size=16, num_frames=1))
    return detector.normalized(torch.from_numpy(frames)[None])[0]


def by_group(tensors: dict[str, torch.Tensor], kind: str) -> list[str]:
    return sorted({".".join(key.split(".")[:2]) for key in tensors if key.startswith(f"{kind}.")})


def given(config: dict, tensors: dict[str, torch.Tensor], kind: str) -> tuple:
    """Frames, boxes, the frames' size, the rule, and the names of the outputs of a kind, of which there are some."""
    frames, groups = tensors["frames.in"].numpy(), by_group(tensors, kind)
    assert groups
    return frames, tensors["frames.boxes"], (frames.shape[2], frames.shape[1]), rule_of(config), groups


def test_parity_of_training_pixels_and_boxes(case: tuple) -> None:
    pytest.importorskip("cv2", reason="training views are resized by OpenCV: pip install opencv-python-headless")
    pytest.importorskip("torchvision", reason="the detector needs torchvision")
    config, tensors = case
    frames, boxes, size, rule, groups = given(config, tensors, "train")
    for group in groups:
        x, y, hue, saturation, brightness, mirror = config[group]["draws"]
        draws = views.Draws(x, y, int(hue), int(saturation), int(brightness), mirror)
        view = views.training_view(frames, boxes, size, rule, draws)
        torch.testing.assert_close(view.boxes, tensors[f"{group}.boxes"], rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(normalized(view.frames), tensors[f"{group}.out"], rtol=1e-6, atol=1e-5)
        # The colors alone, bit for bit, before the mirror.
        cut = views.cropped(views.resized(frames, boxes, size, rule.short_side), rule.crop, x, y)
        colored = views.colored(cut.frames, draws.hue, draws.saturation, draws.brightness)
        assert np.array_equal(colored, tensors[f"{group}.after_jitter"].numpy())


def test_parity_of_test_pixels_and_boxes(case: tuple) -> None:
    pytest.importorskip("cv2", reason="test views are resized by OpenCV: pip install opencv-python-headless")
    pytest.importorskip("torchvision", reason="the detector needs torchvision")
    config, tensors = case
    frames, boxes, size, rule, groups = given(config, tensors, "test")
    for group in groups:
        view = views.test_view(frames, boxes, size, rule)
        assert np.array_equal(view.frames, tensors["frames.resized"].numpy())
        torch.testing.assert_close(view.boxes, tensors[f"{group}.boxes"], rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(normalized(view.frames), tensors[f"{group}.out"], rtol=1e-6, atol=1e-5)
