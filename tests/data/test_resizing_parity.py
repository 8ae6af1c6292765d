"""Pixels and windows of stage 2 and retrieval against torchvision's transforms of uint8 tensors, as the official code has them.

torchvision 0.13 resized tensors without antialiasing; today's needs antialias=False for the same.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms import functional as torchvision

from umt_fast.config import DataConfig, Stage2Config
from umt_fast.data.decode import transforms
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.lists import Clip, read_list
from umt_fast.data.sources.prepared import Settings, read_prepared

BICUBIC = InterpolationMode.BICUBIC
KIND = {"num_frames": 4, "image_size": 32, "seed": 0}


def official(frames: np.ndarray, crop: transforms.Crop, size: int) -> np.ndarray:
    """uint8 (T, H, W, 3) -> (T, size, size, 3) as RandomResizedCrop and RandomHorizontalFlip treat one window."""
    tensor = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)
    out = torchvision.resized_crop(
        tensor, crop.top, crop.left, crop.height, crop.width, [size, size], BICUBIC, antialias=False
    )
    out = torchvision.hflip(out) if crop.flip else out
    return out.permute(0, 2, 3, 1).numpy()


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Black and white runs beside noise: overshoot below 0 and above 255 must be cut off."""
    picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture[:, : shape[1] // 2] = np.where(picture[:, : shape[1] // 2] > 127, 255, 0)
    return picture


@pytest.mark.parametrize("size", [16, 33, 224])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (256, 340), (19, 90), (224, 224)])
def test_bicubic_windows_equal_torchvision(size: int, height: int, width: int) -> None:
    rng = np.random.default_rng(size * height)
    frames = noise(rng, 2, height, width)
    for number in range(6):
        crop = transforms.random_resized_crop(width, height, True, rng) if number else transforms.whole(width, height)
        found = transforms.apply(frames, crop, size)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, official(frames, crop, size))
        # Prepared clips come as Pillow's pictures.
        pictures = [Image.fromarray(frame) for frame in frames]
        np.testing.assert_array_equal(transforms.apply(pictures, crop, size), found)


def test_bicubic_is_the_cubic_convolution_of_four_by_four_pixels() -> None:
    """Against the sum over Keys' kernel with -3/4, written out: no pixel further off counts, however much it shrinks."""
    frames = noise(np.random.default_rng(0), 1, 50, 70)

    def weights(far: int, size: int) -> np.ndarray:
        table = np.zeros((size, far))
        for target in range(size):
            center = (target + 0.5) * far / size - 0.5
            for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
                x = abs(center - tap)
                inner, outer = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                table[target, min(max(tap, 0), far - 1)] += inner if x <= 1 else outer
        return table

    rows, columns = weights(50, 16), weights(70, 16)
    expected = np.einsum("ah,hwc,bw->abc", rows, frames[0].astype(float), columns).clip(0, 255)
    found = transforms.apply(frames, transforms.whole(70, 50), 16)[0]
    assert abs(found - expected).max() < 0.501


@pytest.mark.parametrize("augment", ["random_resized_crop", "whole", "multi_scale_crop", "center"])
def test_the_way_of_cutting_decides_how_frames_are_resized(augment: str) -> None:
    frames = noise(np.random.default_rng(1), 3, 61, 83)
    reader = ClipReader([Clip(path="x")], DataConfig(augment=augment), **KIND, train=True)
    (crop,) = reader.windows(83, 61, (4,))
    found = reader.crops(frames, (4,))[0]
    if augment in ("random_resized_crop", "whole"):
        np.testing.assert_array_equal(found, official(frames, crop, 32))
        return
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    for frame, picture in zip(found, frames, strict=True):
        expected = Image.fromarray(picture).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(frame[:, :: -1 if crop.flip else 1], np.asarray(expected))


def test_retrieval_sees_what_the_official_test_transform_gives() -> None:
    frames = noise(np.random.default_rng(2), 4, 72, 96)
    reader = ClipReader([Clip(path="x")], DataConfig(augment="whole"), **KIND, train=False)
    expected = Resize((32, 32), BICUBIC, antialias=False)(torch.from_numpy(frames).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(reader.crops(frames, (0,))[0], expected.permute(0, 2, 3, 1).numpy())


def test_prepared_clips_are_resized_alike(tiny_list: Path, tmp_path: Path) -> None:
    data = Stage2Config().data
    settings = Settings(segments=4, sampling=data.sampling)
    prepare(tiny_list, tmp_path / "out", settings=settings, workers=0)
    (clip, _) = read_list(tmp_path / "out", DataConfig())
    reader = ClipReader([clip], data, **KIND, train=True)
    key = (0, 0, 0)
    frames = np.stack([np.asarray(picture) for picture in read_prepared(clip, reader.stored_chooser(key))])
    (crop,) = reader.windows(frames.shape[2], frames.shape[1], key)
    np.testing.assert_array_equal(reader.read(0, 0).video[0], official(frames, crop, 32))


def largest_gap(first: np.ndarray, second: np.ndarray) -> float:
    """Between the two empirical distribution functions (Kolmogorov and Smirnov)."""
    both = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(values), both, side="right") / len(values) for values in (first, second)]
    return float(abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(("height", "width"), [(256, 340), (240, 240), (100, 190), (320, 180), (20, 400), (300, 21)])
def test_windows_are_drawn_as_torchvision_draws_them(height: int, width: int) -> None:
    """Shapes of 1.9 leave the fall-back a part of the draws, those of 20 all of them."""
    count, rng = 3000, np.random.default_rng(height)
    torch.manual_seed(width)
    picture = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(picture, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    crops = [transforms.random_resized_crop(width, height, True, rng) for _ in range(count)]
    ours = np.array([(crop.top, crop.left, crop.height, crop.width) for crop in crops])
    # Beyond this once in ten thousand pairs of equal distributions.
    limit = 2.23 * np.sqrt(2 / count)
    for column in range(4):
        assert largest_gap(ours[:, column], theirs[:, column]) < limit
    area, aspect = (lambda boxes: boxes[:, 2] * boxes[:, 3]), (lambda boxes: boxes[:, 3] / boxes[:, 2])
    places = [lambda boxes: boxes[:, 0] + boxes[:, 2] / 2, lambda boxes: boxes[:, 1] + boxes[:, 3] / 2]
    for value in (area, aspect, *places):
        assert largest_gap(value(ours), value(theirs)) < limit
    assert abs(np.mean([crop.flip for crop in crops]) - 0.5) < 0.05
