"""A detector to be used: from a run's checkpoint, a folder, and a file that does not describe itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import umt_fast
from tests.detection_world import COLORS, HEIGHT, WIDTH, configured, encode, write_world
from umt_fast.__main__ import main
from umt_fast.config import ConfigError
from umt_fast.data.decode import detection_view as views
from umt_fast.data.errors import DataError
from umt_fast.models import description
from umt_fast.models.weights import WeightsError, kind_of, save_state
from umt_fast.tasks.detection import Detection
from umt_fast.train import train

pytest.importorskip("torchvision", reason="the detector needs torchvision")
pytest.importorskip("cv2", reason="views are resized by OpenCV: pip install opencv-python-headless")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return max(train(configured(root, root / "run")).glob("*.pt"))


BOXES = [[8, 10, 43, 45], [52, 14, 87, 49]]


def picture(first: int, second: int) -> np.ndarray:
    """Two people in the colors of two classes, as the world has them."""
    out = np.full((HEIGHT, WIDTH, 3), 110, np.uint8)
    for (left, top, right, bottom), label in zip(BOXES, (first, second), strict=True):
        out[top : bottom + 1, left : right + 1] = COLORS[label]
    return out


@pytest.mark.parametrize("pair", [(1, 2), (3, 1), (2, 3)])
def test_it_tells_who_is_red_blue_and_green(checkpoint: Path, pair: tuple[int, int], tmp_path: Path) -> None:
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    assert isinstance(model, umt_fast.DetectorModel)
    frames = np.stack([picture(*pair)] * 8)
    found = model.detect(frames, BOXES)
    assert found.shape == (2, 3) and tuple((found.argmax(1) + 1).tolist()) == pair
    encode(tmp_path / "clip.mp4", list(frames))
    of_file = model.detect(tmp_path / "clip.mp4", torch.tensor(BOXES))
    torch.testing.assert_close(of_file, found, rtol=0, atol=0.1)  # but for compression
    assert model.detect(frames, []).shape == (0, 3)


def test_it_sees_the_frames_and_boxes_that_evaluation_sees(checkpoint: Path) -> None:
    """Eight frames, of which two are chosen: from the middle of 4 = num_frames * stride, in even parts as described."""
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, HEIGHT, WIDTH, 3)).astype(np.uint8)
    sample_frames = frames[
        [2, 4]
    ]  # around frame 4 = 9 // 2: the window is 2 to 5, two frames `stride` apart from its first
    view = views.resized(sample_frames, torch.tensor(BOXES, dtype=torch.float32), (WIDTH, HEIGHT), 48)
    pad = (view.boxes[:, 2:] - view.boxes[:, :2] + 1) * torch.tensor([0.05, 0.025])
    boxes = torch.cat([view.boxes[:, :2] - pad, view.boxes[:, 2:] + pad], 1).clamp_min(0)
    video, sizes = views.padded([view.frames])
    with torch.no_grad():
        expected = model.network(video, boxes, torch.zeros(2, dtype=torch.int64), sizes).sigmoid()
    torch.testing.assert_close(model.detect(frames, BOXES), expected)


def test_features_and_folders(checkpoint: Path, tmp_path: Path) -> None:
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    frames = np.stack([picture(1, 2)] * 8)
    found = model.features(frames, layers=[0])
    assert found.tokens.shape == (1, 2, 2, 2, 32) and found.layers[0].shape == (1, 2, 2, 2, 32)
    maps = model.network.feature_map(model.pixels(frames))
    torch.testing.assert_close(found.tokens.mean(1).permute(0, 3, 1, 2), maps)
    torch.testing.assert_close(found.pooled, found.tokens.mean((1, 2, 3)))
    model.save_pretrained(tmp_path / "folder")
    again = umt_fast.from_pretrained(tmp_path / "folder", device="cpu")
    assert isinstance(again, umt_fast.DetectorModel) and again.description == model.description
    assert torch.equal(again.detect(frames, BOXES), model.detect(frames, BOXES))


def test_an_official_file_is_told_by_its_keys(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Official files are state dicts under `model`, and hold a position table that is not read."""
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    state = model.network.state_dict()
    assert kind_of(state) == "detector" and {"norm.weight", "head.weight"} <= state.keys()
    torch.save({"model": state | {"pos_embed": torch.zeros(1, 8, 32)}, "epoch": 3}, tmp_path / "ava.pth")
    with pytest.raises(WeightsError, match="does not say which model it is of"):
        umt_fast.load_model(weights=tmp_path / "ava.pth")
    # The official sizes, but for a tower of this size.
    small = {key: model.description[key] for key in ("vit", "clips")}
    made = description.MODELS["umt_b16_ava"]()
    assert made["clips"] == {"sparse": True, "frames": "released", "stride": 8, "short_side": 256}
    assert made["vit"]["num_frames"] == 8 and made["vit"]["position_grid"] == [8, 14, 14] and made["dtype"] == "bf16"
    monkeypatch.setitem(description.MODELS, "umt_b16_ava", lambda: made | small)
    loaded = umt_fast.load_model("umt_b16_ava", weights=tmp_path / "ava.pth", device="cpu", dtype="fp32")
    assert loaded.description["num_classes"] == 3
    frames = np.stack([picture(1, 2)] * 8)
    torch.testing.assert_close(loaded.detect(frames, BOXES), model.detect(frames, BOXES))
    with pytest.raises(WeightsError, match="holds detector weights .* and 'umt_b16_ft' is of classifier"):
        umt_fast.load_model("umt_b16_ft", weights=tmp_path / "ava.pth")
    save_state({key: value for key, value in state.items() if key != "norm.bias"}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"missing: norm\.bias"):
        umt_fast.load_model("umt_b16_ava", weights=tmp_path / "part.pth")


def test_a_converted_file_is_the_same_detector(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "detector.safetensors")]) == 0
    model, other = (
        umt_fast.load_model(weights=f, device="cpu") for f in (checkpoint, tmp_path / "detector.safetensors")
    )
    assert other.description == model.description and other.fingerprint() == model.fingerprint()


def test_a_detector_starts_another_one(checkpoint: Path) -> None:
    source = umt_fast.load_model(weights=checkpoint, device="cpu")
    vit = source.vit
    loaded = Detection(vit, num_classes=3, bf16=False, init=str(checkpoint)).detector.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.network.state_dict().items())


@pytest.mark.parametrize(
    "boxes,said",
    [
        ([1, 2, 3, 4], r"boxes have the shape \(4,\); give \(N, 4\)"),
        ([[1, 2, 3]], r"boxes have the shape \(1, 3\)"),
        ([[9, 2, 3, 4]], r"a box is \[9.0, 2.0, 3.0, 4.0\]; it must be finite, with left <= right"),
        ([[0, 0, 1, float("nan")]], "it must be finite"),
        ([[0.1, 0.2, 0.5, 1.0]], "boxes reach from 0.1 to 1; give pixels of the frames, here 8 x 8"),
        ([[1, 1, 4, 4], [50, 2, 60, 4]], r"a box is \[50.0, 2.0, 60.0, 4.0\], outside the frames of 8 x 8 pixels"),
        ([[-9, 2, -1, 4]], "outside the frames"),
    ],
)
def test_boxes_that_are_none(checkpoint: Path, boxes: list, said: str) -> None:
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    with pytest.raises(DataError, match=said):
        model.detect(np.zeros((4, 8, 8, 3), np.uint8), boxes)


def test_videos_that_are_none(checkpoint: Path, tmp_path: Path) -> None:
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    with pytest.raises(DataError, match="absent.mp4 is no video file"):
        model.detect(tmp_path / "absent.mp4", BOXES)
    with pytest.raises(DataError, match="2 clips were given, and one is wanted"):
        model.detect(np.zeros((2, 4, 8, 8, 3), np.uint8), BOXES)
    with pytest.raises(ConfigError, match="untrained umt_b16_ava needs num_classes"):
        umt_fast.load_model("umt_b16_ava", weights="untrained")
