"""Mixup and CutMix of a batch on the device, with the soft targets that belong to them.

Mixup (arXiv 1710.09412) adds clips by their shares; CutMix (arXiv 1905.04899) puts a box of one clip into another. Clip i is
mixed with clip B - 1 - i, as timm and the official fine-tuning do. The host draws a few numbers a step; the device applies them
with static shapes and never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umt_fast.config import MixConfig
from umt_fast.tasks.base import Loader


class Mix(NamedTuple):
    """share: fp32 (B,), what of clip i stays its own. box: int64 (B, 4), top, bottom, left, right of CutMix in pixels, the ends
    excluded; all 0 where clip i is mixed by Mixup or left alone."""

    share: np.ndarray
    box: np.ndarray


def draw(mix: MixConfig, batch: int, height: int, width: int, rng: np.random.Generator) -> Mix:
    """The numbers of one step for B clips of height x width pixels."""
    share, box = np.ones(batch, np.float32), np.zeros((batch, 4), np.int64)
    rows = [slice(None)] if mix.per == "batch" else range(batch)
    for row in rows:
        if mix.on and rng.random() < mix.probability:
            share[row], box[row] = _draw_one(mix, height, width, rng)
    return Mix(share, box)


def _draw_one(
    mix: MixConfig, height: int, width: int, rng: np.random.Generator
) -> tuple[float, tuple[int, int, int, int]]:
    cutmix = 1.0 if mix.cutmix_minmax else mix.cutmix_alpha
    cut = cutmix > 0 and (mix.mixup_alpha == 0 or rng.random() < mix.switch)
    alpha = cutmix if cut else mix.mixup_alpha
    share = rng.beta(alpha, alpha)
    if not cut:
        return share, (0, 0, 0, 0)
    if mix.cutmix_minmax:
        low, high = mix.cutmix_minmax
        tall, wide = (_integer(rng, int(side * low), int(side * high)) for side in (height, width))
        top, left = _integer(rng, 0, height - tall), _integer(rng, 0, width - wide)
        box = (top, top + tall, left, left + wide)
    else:
        box = cut_box(height, width, share, _integer(rng, 0, height), _integer(rng, 0, width))
    return kept_share(height, width, box), box


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """A uniform integer in [low, high), or low where there is none."""
    return int(rng.integers(low, max(high, low + 1)))


def cut_box(height: int, width: int, share: float, y: int, x: int) -> tuple[int, int, int, int]:
    """CutMix's box (top, bottom, left, right) around (y, x): 1 - share of the picture, cut at its edges."""
    ratio = (1 - share) ** 0.5
    tall, wide = int(height * ratio), int(width * ratio)
    rows = (min(max(y + half, 0), height) for half in (-(tall // 2), tall // 2))
    columns = (min(max(x + half, 0), width) for half in (-(wide // 2), wide // 2))
    return (*rows, *columns)


def kept_share(height: int, width: int, box: tuple[int, int, int, int]) -> float:
    """What of the picture lies outside the box."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (height * width)


def mixed(video: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """The mixed clips, in video's dtype.

    Args:
        video: floating (B, 3, T, H, W).
        share, box: a Mix as tensors on the video's device.
    """
    top, bottom, left, right = (column.view(-1, 1, 1) for column in box.unbind(1))
    y = torch.arange(video.shape[3], device=video.device).view(1, -1, 1)
    x = torch.arange(video.shape[4], device=video.device).view(1, 1, -1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    # Where a box is cut, clips are not added, whatever the share says.
    cut = (bottom > top) & (right > left)
    own = torch.where(cut, (~inside).to(video.dtype), share.view(-1, 1, 1).to(video.dtype))
    own = own[:, None, None]
    return video * own + video.flip(0) * (1 - own)


def soft_targets(label: Tensor, num_classes: int, share: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Targets (B, num_classes) fp32 of mixed clips: smoothed one-hot rows, added by their shares.

    Args:
        label: int64 (B,).
        share: fp32 (B,), a Mix's; None: nothing is mixed.
        smoothing: what of each row is spread evenly over all classes.
    """
    rows = torch.full((len(label), num_classes), smoothing / num_classes, device=label.device)
    rows.scatter_(1, label[:, None], 1 - smoothing + smoothing / num_classes)
    if share is None:
        return rows
    share = share.view(-1, 1).to(rows.dtype)
    return rows * share + rows.flip(0) * (1 - share)


class MixingLoader:
    """A loader whose batches also say how their clips are mixed: `mix_share` fp32 (B,) and `mix_box` int64 (B, 4), a Mix.

    The numbers of a batch follow from (seed, epoch, place of the batch in it, rank), whoever draws them.
    """

    def __init__(self, loader: Loader, mix: MixConfig, *, size: int, seed: int, rank: int) -> None:
        """size: height and width of the clips in pixels."""
        self.loader, self.mix, self.size, self.seed, self.rank = loader, mix, size, seed, rank
        self.kinds = loader.kinds

    @property
    def bad_files(self) -> dict[str, str]:
        return self.loader.bad_files

    @property
    def identity(self) -> str:
        return self.loader.identity

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            place = self.loader.state_dict()
            # The fourth number is the stream's: 0 to 2 are those of data/loaders/reader.py.
            rng = np.random.default_rng((self.seed, place["epoch"], place["position"], 3, self.rank))
            share, box = draw(self.mix, len(batch["label"]), self.size, self.size, rng)
            yield batch | {"mix_share": torch.from_numpy(share), "mix_box": torch.from_numpy(box)}

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)

    def name_of(self, index: int) -> str:
        return self.loader.name_of(index)
