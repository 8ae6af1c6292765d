"""Windows and pixels of fine-tuning against the official transforms: every crop and pixel table of every frames_* file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.parity_files import parity_files
from umt_fast.data.decode import classification_crops as crops
from umt_fast.data.decode import erasing
from umt_fast.data.decode.classification_frames import KineticsSparse
from umt_fast.data.decode.rand_augment import Policy, augment

FILES = [pytest.param(path, id=path.stem) for path in parity_files("frames")]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def tables(path: Path, *names: str) -> list[torch.Tensor]:
    with safe_open(path, "pt") as file:
        for name in names:
            if name not in file.keys():  # noqa: SIM118, it is no dictionary
                pytest.skip(f"{path.name} has no table {name}")
        return [file.get_tensor(name) for name in names]


def rows(path: Path, name: str, column: str) -> list[tuple[list[int], list[int]]]:
    query, found = tables(path, f"{name}.query", f"{name}.{column}")
    assert len(query)
    return list(zip(query.tolist(), found.tolist(), strict=True))


def normalized(video: np.ndarray) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> (3, T, H, W) as the model sees it."""
    planes = torch.from_numpy(video).permute(3, 0, 1, 2).float() / 255
    return (planes - MEAN.view(3, 1, 1, 1)) / STD.view(3, 1, 1, 1)


@pytest.mark.parametrize("path", FILES)
def test_short_side_sizes_parity(path: Path) -> None:
    for query, size in rows(path, "resize", "size"):
        assert list(crops.short_side_size(*query)) == size, query


@pytest.mark.parametrize("path", FILES)
def test_center_crops_parity(path: Path) -> None:
    for query, corner in rows(path, "center_crop", "corner"):
        assert crops.center_window(*query) == (*corner, query[2], query[2]), query


@pytest.mark.parametrize("path", FILES)
def test_test_crops_parity(path: Path) -> None:
    for (height, width, side, count, crop), box in rows(path, "crop", "box"):
        assert min(height, width) == side
        assert list(crops.test_window(height, width, count, crop)) == box, (height, width, count, crop)


@pytest.fixture(params=["opencv", "integers"])
def resize_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of resizing bytes."""
    if request.param == "integers":
        monkeypatch.setattr(crops, "_opencv_resize", lambda: None)
    else:
        pytest.importorskip("cv2", reason="the other way of resizing: pip install opencv-python-headless")
        assert crops._opencv_resize() is not None, "this OpenCV resizes otherwise, and is not used"
    return request.param


def test_an_opencv_that_resizes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2", reason="the other way of resizing: pip install opencv-python-headless")
    used, real = crops._opencv_resize.__wrapped__, cv2.resize
    assert used() is real
    monkeypatch.setattr(
        cv2, "resize", lambda picture, *rest: real(picture, *rest, interpolation=cv2.INTER_LINEAR_EXACT)
    )
    assert used() is None


@pytest.mark.parametrize("size", [(20, 27), (64, 85), (30, 17), (48, 64)])
def test_both_resizers_fill_the_same_bytes(size: tuple[int, int]) -> None:
    """Also of pictures whose rows are padded or turned, as decoders and rotated files give them."""
    padded = np.random.default_rng(1).integers(0, 256, (48, 70, 3), dtype=np.uint8)[:, :64]
    for picture in (padded, np.rot90(padded, 3)):
        found, expected = (np.zeros((*size, 3), np.uint8) for _ in range(2))
        crops.resizer(picture.shape[:2], size)(picture, found)
        crops.IntegerResize(picture.shape[:2], size)(np.ascontiguousarray(picture), expected)
        assert np.array_equal(found, expected) and expected.any()


@pytest.mark.parametrize("path", FILES)
def test_pixels_of_validation_and_test_views_parity(path: Path, resize_backend: str) -> None:
    """Every byte of the resize, every bit of the normalized views."""
    frames, resized, view = tables(path, "pixels.in", "pixels.resized", "pixels.val")
    size = view.shape[-1]
    sized = crops.short_side_resized(frames.numpy(), size)
    assert torch.equal(torch.from_numpy(sized), resized)
    assert torch.equal(normalized(crops.validation_view(frames.numpy(), size)), view)
    with safe_open(path, "pt") as file:
        views = [file.get_tensor(key) for key in sorted(file.keys()) if key.startswith("pixels.test_crop_")]
    assert views
    # The reader chose among the clip's frames before it cut: by its rule, the first of two frames twice.
    shown = sized[KineticsSparse().test(len(sized), views[0].shape[1], 1, 0)]
    for crop, wanted in enumerate(views):
        window = crops.test_window(*sized.shape[1:3], len(views), crop)
        found = [normalized(crops.cut(each, window)) for each in (shown, sized)]
        assert torch.equal(found[0], wanted) or torch.equal(found[1], wanted), crop


@pytest.mark.parametrize("path", FILES)
def test_resized_training_crops_parity(path: Path) -> None:
    """The boxes that were drawn, cut and resized on floats: bit for bit."""
    video, boxes, wanted = tables(
        path, "random_resized_crop.in", "random_resized_crop.boxes", "random_resized_crop.out"
    )
    for box, out in zip(boxes.tolist(), wanted, strict=True):
        top, left, height, width = box
        planes = video[:, :, top : top + height, left : left + width].transpose(0, 1).contiguous()
        assert torch.equal(crops.resized_tensor(planes, out.shape[-1]).transpose(0, 1), out), box


class NeverFits:
    """A generator whose crops are far too large, ten times and more."""

    def uniform(self, low: float, high: float) -> float:
        return 100.0

    def random(self) -> float:
        return 0.9


@pytest.mark.parametrize("path", FILES)
def test_fall_back_of_training_crops_parity(path: Path) -> None:
    for (height, width), box in rows(path, "random_resized_crop_fallback", "box"):
        assert crops.training_crop(height, width, True, NeverFits()) == (tuple(box), False), (height, width)


@pytest.mark.parametrize("path", FILES)
def test_limits_of_training_crops_parity(path: Path) -> None:
    """Draws fill the official limits of area and aspect, and the file's own boxes are such as can be drawn."""
    with safe_open(path, "pt") as file:
        limits = json.loads(file.metadata()["config"])["random_resized_crop"]
    (low, high), (narrow, widest) = limits["area"], map(float, re.findall(r"\d+\.\d+", limits["aspect"]))
    rng, height, width = np.random.default_rng(0), 256, 340
    windows = np.array([crops.training_crop(height, width, False, rng)[0] for _ in range(4000)])
    top, left, tall, wide = windows.T
    assert ((top >= 0) & (top + tall <= height) & (left >= 0) & (left + wide <= width)).all()
    area, aspect = tall * wide / (height * width), wide / tall
    # A pixel of rounding on each side.
    assert (area > low - 0.01).all() and area.min() < low + 0.02 and area.max() > high - 0.1
    assert (aspect > narrow * 0.97).all() and (aspect < widest * 1.03).all()
    assert aspect.min() < narrow * 1.02 and aspect.max() > widest * 0.98


def test_half_of_the_crops_are_mirrored_where_asked() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([crops.training_crop(256, 340, True, rng)[1] for _ in range(2000)])
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(2000)
    assert not any(crops.training_crop(256, 340, False, rng)[1] for _ in range(50))


def test_bytes_are_half_a_level_from_the_official_float_order() -> None:
    """Normalize, crop, resize (official) against crop, resize, round, normalize (here): half a level a value, no more."""
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
    worst = 0.0
    for _ in range(20):
        window, _ = crops.training_crop(120, 160, False, rng)
        floats = crops.cut(normalized(frames).permute(1, 2, 3, 0), window).permute(0, 3, 1, 2)
        wanted = torch.nn.functional.interpolate(floats, (64, 64), mode="bilinear", align_corners=False)
        ours = normalized(crops.resized_crop(frames, window, 64)).transpose(0, 1)
        levels = (ours - wanted).abs() * STD.view(3, 1, 1) * 255
        worst = max(worst, levels.max().item())
    assert 0.45 < worst < 0.501


def test_a_training_view_follows_the_official_order() -> None:
    """The same draws, applied one by one: RandAugment on whole frames, crop, mirror, box."""
    policy, size = Policy.parse("rand-m7-n4-mstd0.5-inc1"), 32
    frames = np.random.default_rng(1).integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)
    boxes = mirrored = augmented = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        drawn = policy.draw(rng)
        pictures = np.stack([np.asarray(p) for p in augment([Image.fromarray(f) for f in frames], drawn)])
        window, flip = crops.training_crop(60, 80, True, rng)
        wanted = crops.resized_crop(pictures, window, size)
        wanted = wanted[:, :, ::-1] if flip else wanted
        box = erasing.draw_box(size, size, 0.25, rng)
        for given in (frames, [Image.fromarray(frame) for frame in frames]):
            found = crops.training_view(
                given, size, np.random.default_rng(seed), policy=policy, flip=True, erasing=0.25
            )
            assert found.video.dtype == np.uint8 and np.array_equal(found.video, wanted) and found.boxes == [box]
        boxes, mirrored, augmented = boxes + any(box), mirrored + flip, augmented + bool(drawn)
    assert 0 < boxes < 40 and 0 < mirrored < 40 and 0 < augmented


def test_windows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="resize its short side to 224 first"):
        crops.center_window(223, 400, 224)
    with pytest.raises(ValueError, match="crop 3 of 3"):
        crops.test_window(224, 298, 3, 3)
