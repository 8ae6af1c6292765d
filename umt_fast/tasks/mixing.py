"""Mixup and CutMix of a batch on the device, with the soft targets that belong to them.

Mixup (arXiv 1710.09412) adds clips by their shares; CutMix (arXiv 1905.04899) puts a box of one clip into another. Clip i is
mixed with clip B - 1 - i, as timm and the official fine-tuning do. The host draws a few numbers a step; the device applies them
with static shapes and never makes the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umt_fast.config.core import require


class Mix(NamedTuple):
    """share: fp32 (B,), what of clip i stays its own. box: int64 (B, 4), top, bottom, left, right of CutMix in pixels, the ends
    excluded; all 0 where clip i is mixed by Mixup or left alone."""

    share: np.ndarray
    box: np.ndarray


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """How clips of a batch are mixed; the defaults are those of the official fine-tuning."""

    mixup_alpha: float = 0.8
    """Both parameters of the Beta distribution of Mixup's share; 0 switches Mixup off."""
    cutmix_alpha: float = 1.0
    """The same for CutMix."""
    cutmix_minmax: tuple[float, ...] = ()
    """Least and largest side of CutMix's box as a share of the picture's, in place of cutmix_alpha; empty: not used."""
    probability: float = 1.0
    """Share of the batches (or clips) that are mixed."""
    switch: float = 0.5
    """Share of CutMix where both are on."""
    per: Literal["batch", "clip"] = "batch"
    """One draw for a batch, or one for each clip."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            require(getattr(self, name) >= 0, f"mix.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("probability", "switch"):
            require(0 <= getattr(self, name) <= 1, f"mix.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        limits = self.cutmix_minmax
        require(
            not limits or (len(limits) == 2 and 0 <= limits[0] < limits[1] <= 1),
            f"mix.cutmix_minmax is {limits}; give two shares, least < largest, in [0, 1], or none",
        )

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0 or bool(self.cutmix_minmax))

    def draw(self, batch: int, height: int, width: int, rng: np.random.Generator) -> Mix:
        """The numbers of one step for B clips of height x width pixels."""
        share, box = np.ones(batch, np.float32), np.zeros((batch, 4), np.int64)
        rows = [slice(None)] if self.per == "batch" else range(batch)
        for row in rows:
            if self.on and rng.random() < self.probability:
                share[row], box[row] = self._draw_one(height, width, rng)
        return Mix(share, box)

    def _draw_one(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, tuple[int, int, int, int]]:
        cutmix = 1.0 if self.cutmix_minmax else self.cutmix_alpha
        cut = cutmix > 0 and (self.mixup_alpha == 0 or rng.random() < self.switch)
        alpha = cutmix if cut else self.mixup_alpha
        share = rng.beta(alpha, alpha)
        if not cut:
            return share, (0, 0, 0, 0)
        if self.cutmix_minmax:
            low, high = self.cutmix_minmax
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
