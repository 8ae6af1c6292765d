"""Windows and pixels of the official classification fine-tuning: test views, the validation view, training's augmentation.

The official readers resize twice in different ways. Validation and test pictures go through OpenCV's bilinear filter for bytes
(fixed-point weights of 11 bits, no antialiasing); here it is written in integers and gives the same bytes. Training resizes
normalized float tensors bilinearly, without antialiasing; here the same filter runs on bytes, and rounding moves a value by
half a level at most (1/255 of the range of a channel), because normalizing and bilinear resizing commute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from umt_fast.data.decode import transforms
from umt_fast.data.decode.erasing import draw_boxes
from umt_fast.extras import packages_of

if TYPE_CHECKING:
    from PIL import Image

    from umt_fast.data.decode.rand_augment import Policy

AREA, ASPECT = (0.08, 1.0), (0.75, 1.3333)
"""Share of the frame that a training crop covers, uniform; its width over its height, log-uniform. 1.3333 is meant."""


class Window(NamedTuple):
    """A rectangle of a picture in pixels."""

    top: int
    left: int
    height: int
    width: int


def short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of a picture once its short side is `side`; the long one is rounded down."""
    return (side * height // width, side) if width < height else (side, side * width // height)


def center_window(height: int, width: int, size: int) -> Window:
    """The square in the middle. Official quirk: an odd margin is halved to the nearest even number.

    Raises ValueError: the picture is smaller than the square.
    """
    if min(height, width) < size:
        raise ValueError(
            f"a {height} x {width} picture has no {size} x {size} crop; resize its short side to {size} first"
        )
    return Window(round((height - size) / 2), round((width - size) / 2), size, size)


def test_window(height: int, width: int, crops: int, crop: int) -> Window:
    """Crop `crop` of `crops`, squares equally spaced along the long side from end to end; a single one lies in the middle.

    Raises ValueError: such a crop does not exist.
    """
    if not 0 <= crop < crops:
        raise ValueError(f"crop {crop} of {crops} does not exist; crops are numbered from 0")
    side = min(height, width)
    spare = max(height, width) - side
    # As the official code rounds it: the step is a float, its multiple is cut.
    start = int(spare / 2) if crops == 1 else int(crop * (spare / (crops - 1)))
    return Window(start, 0, side, side) if height >= width else Window(0, start, side, side)


def training_crop(
    height: int,
    width: int,
    flip: bool,
    rng: np.random.Generator,
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
) -> tuple[Window, bool]:
    """A random window of these limits, and whether it is mirrored (in half of the draws if flip is on).

    Where ten draws do not fit: the largest centered window of an allowed aspect.
    """
    crop = transforms.random_resized_crop(width, height, flip, rng, area, aspect)
    return Window(crop.top, crop.left, crop.height, crop.width), crop.flip


@functools.lru_cache(maxsize=256)
def _fixed_point(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each result, the two source indices and their int32 weights, in 1/2048. Beyond the ends both are the outermost."""
    place = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
    first = np.floor(place)
    share, first = place - first, first.astype(np.int64)
    weights = (np.rint(part * np.float32(2048)).astype(np.int32) for part in (np.float32(1) - share, share))
    indices = (np.clip(first + step, 0, source - 1) for step in (0, 1))
    return *indices, *weights


Resize = Callable[[np.ndarray, np.ndarray], Any]
"""Of a picture uint8 (h, w, 3) and the array uint8 (*size, 3), contiguous, that it fills."""


def resizer(source: tuple[int, int], size: tuple[int, int]) -> Resize:
    """Resizes pictures of source (h, w) byte for byte as cv2.resize(..., INTER_LINEAR) of OpenCV 5.0; a picture of `size` is
    copied. Where OpenCV is installed it does the work."""
    if source == size:
        return lambda picture, out: np.copyto(out, picture)
    resize = _opencv_resize()
    if resize is None:
        return IntegerResize(source, size)
    return lambda picture, out: resize(picture, size[::-1], out)


@functools.cache
def _opencv_resize() -> Callable[..., Any] | None:
    """cv2.resize, if it is installed and this version of it gives the bytes that integers give."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)  # parallelism is over clips
    sample = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for size in ((29, 41), (50, 71), (11, 80)):
        expected = np.empty((*size, 3), np.uint8)
        IntegerResize(sample.shape[:2], size)(sample, expected)
        if not np.array_equal(cv2.resize(sample, size[::-1]), expected):
            return None
    return cv2.resize


class IntegerResize:
    """What OpenCV computes, in integers: the definition, and five times its cost."""

    def __init__(self, source: tuple[int, int], size: tuple[int, int]) -> None:
        left, right, left_weight, right_weight = _fixed_point(source[1], size[1])
        upper, lower, upper_weight, lower_weight = _fixed_point(source[0], size[0])
        self.rows, places = np.unique(np.stack([upper, lower]), return_inverse=True)
        self.all_rows = len(self.rows) == source[0]
        # Rows as flat bytes: gathering bytes, and multiplying long rows, is several times as fast as triples of channels.
        columns = [(3 * index[:, None] + np.arange(3)).ravel() for index in (left, right)]
        weights = [torch.from_numpy(weight.repeat(3)) for weight in (left_weight, right_weight)]
        heights = [torch.from_numpy(weight[:, None]) for weight in (upper_weight, lower_weight)]
        self.columns = list(zip(columns, weights, strict=True))
        self.lines = list(zip(torch.from_numpy(places.reshape(2, -1)), heights, strict=True))
        wide = 3 * size[1]
        self.gathered = np.empty((len(self.rows), wide), np.uint8)
        self.across = [torch.empty((len(self.rows), wide), dtype=torch.int32) for _ in range(2)]
        self.down = [torch.empty((size[0], wide), dtype=torch.int32) for _ in range(2)]

    def __call__(self, picture: np.ndarray, out: np.ndarray) -> None:
        flat = picture.reshape(len(picture), -1)
        flat = flat if self.all_rows else flat[self.rows]
        for (index, weight), part in zip(self.columns, self.across, strict=True):
            # The indices are in range; mode "clip" only spares the check of each.
            flat.take(index, 1, self.gathered, "clip")
            part.copy_(torch.from_numpy(self.gathered)).mul_(weight)
        rows = self.across[0].add_(self.across[1]).bitwise_right_shift_(4)
        for (index, weight), part in zip(self.lines, self.down, strict=True):
            torch.index_select(rows, 0, index, out=part).mul_(weight).bitwise_right_shift_(16)
        above, below = self.down
        torch.from_numpy(out.reshape(above.shape)).copy_(above.add_(below).add_(2).bitwise_right_shift_(2))


def resized_bytes(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (T, h, w, 3) -> uint8 (T, *size, 3) by a resizer. Frames that have the size already are returned as they are."""
    if frames.shape[1:3] == size:
        return frames
    resize, out = resizer(frames.shape[1:3], size), np.empty((len(frames), *size, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        resize(frame, target)
    return out


def short_side_resized(frames: np.ndarray, side: int) -> np.ndarray:
    """uint8 (T, h, w, 3) with the short side resized to `side`."""
    return resized_bytes(frames, short_side_size(*frames.shape[1:3], side))


def cut(frames: np.ndarray, window: Window) -> np.ndarray:
    """The window of (T, h, w, 3), a view."""
    return frames[:, window.top : window.top + window.height, window.left : window.left + window.width]


def validation_view(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 (T, h, w, 3) -> uint8 (T, size, size, 3): short side resized to `size`, the middle."""
    sized = short_side_resized(frames, size)
    return cut(sized, center_window(*sized.shape[1:3], size))


def resized_tensor(planes: Tensor, size: int) -> Tensor:
    """Floating (T, 3, h, w) -> (T, 3, size, size): bilinear, without antialiasing, as training crops are resized."""
    return interpolate(planes, (size, size), mode="bilinear", align_corners=False)


class Augmented(NamedTuple):
    """video: uint8 (T, S, S, 3). boxes: (top, left, height, width) in its pixels, to be filled with noise once the pixels are
    normalized (decode.erasing); without area: nothing is erased."""

    video: np.ndarray
    boxes: list[tuple[int, int, int, int]]


def training_view(
    frames: np.ndarray | Sequence[Image.Image],
    size: int,
    rng: np.random.Generator,
    *,
    policy: Policy | None,
    flip: bool,
    erasing: float,
    erasing_count: int = 1,
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
    interpolation: str = "bicubic",
) -> Augmented:
    """One augmented view of a clip, in the official order: RandAugment on whole frames, crop, mirror, box.

    Args:
        frames: uint8 (T, h, w, 3), or Pillow's RGB pictures of one size.
        size: height and width of the view.
        rng: draws everything, in that order; once for all frames.
        policy: None: no RandAugment.
        flip: whether half of the views are mirrored (not for SSV2, whose labels know left from right).
        erasing: probability of boxes, of which there are erasing_count.
        area, aspect: limits of the crop.
        interpolation: for RandAugment, bicubic or bilinear.
    """
    if policy is not None:
        drawn = policy.draw(rng)
        if drawn:
            with packages_of("video"):
                from PIL import Image

                from umt_fast.data.decode.rand_augment import augment
            pictures = [Image.fromarray(f) for f in frames] if isinstance(frames, np.ndarray) else frames
            frames = augment(pictures, drawn, interpolation)
    if not isinstance(frames, np.ndarray):
        frames = np.stack([np.asarray(frame) for frame in frames])
    window, mirrored = training_crop(*frames.shape[1:3], flip, rng, area, aspect)
    video = resized_crop(frames, window, size)
    boxes = draw_boxes(size, size, erasing, erasing_count, rng)
    return Augmented(np.ascontiguousarray(video[:, :, ::-1]) if mirrored else video, boxes)


def resized_crop(frames: np.ndarray, window: Window, size: int) -> np.ndarray:
    """uint8 (T, h, w, 3) -> uint8 (T, size, size, 3): the window, resized in fp32 and rounded half to even."""
    planes = torch.from_numpy(cut(frames, window)).permute(0, 3, 1, 2)
    planes = planes.to(torch.float32, memory_format=torch.contiguous_format)
    sized = resized_tensor(planes, size).round_()
    out = torch.empty((len(frames), size, size, 3), dtype=torch.uint8)
    out.permute(0, 3, 1, 2).copy_(sized)
    return out.numpy()
