"""A trained action detector to be used: which actions do the people in these boxes perform?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umt_fast.config import DataConfig, KeyFrameConfig
from umt_fast.data.decode.detection_view import batched, test_sample
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.given import Decoded, frames_of
from umt_fast.data.loaders.key_frames import rule_of
from umt_fast.data.sources.detections import KeyFrame
from umt_fast.models.description import vit_config
from umt_fast.models.detector import Detector
from umt_fast.models.vit import VisionTransformer
from umt_fast.models.weights import fit_detector
from umt_fast.pretrained.base import PretrainedModel


class DetectorModel(PretrainedModel):
    """An action detector. `features` sees the centered square of a clip, and frames that lie apart as in training."""

    task = "detection"
    network: Detector

    @classmethod
    def empty(cls, description: dict[str, Any]) -> Detector:
        return Detector(vit_config(description), description["num_classes"])

    @classmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        fit_detector(network, state, source)

    @property
    def tower(self) -> VisionTransformer:
        return self.network

    @property
    def clips(self) -> KeyFrameConfig:
        """How it sees clips."""
        return KeyFrameConfig(**self.description["clips"])

    @property
    def view(self) -> DataConfig:
        return DataConfig(sampling="dense", sampling_rate=self.clips.stride, augment="center")

    @torch.no_grad()
    def detect(self, video: str | Path | Decoded, boxes: np.ndarray | Tensor | list) -> Tensor:
        """Probabilities fp32 (N, K) of each class for each box, on the model's device; classes are independent.

        Args:
            video: a path, or uint8 frames (T, H, W, 3). The boxes belong to frame T // 2; the frames around it are chosen and
                resized as `eval` does.
            boxes: (N, 4), left, top, right, bottom in pixels of the frames; right and bottom are the last pixels inside, one
                less than left + width. They are widened and cut to the picture as in `eval`.

        Raises DataError: a file that cannot be read, float or empty frames, boxes of another shape, not finite, with sides
        exchanged, or without a pixel of the picture.
        """
        rule = rule_of(self.clips, self.vit)
        frames = frames_of(video, lambda count: _around_middle(rule.temporal, count))
        corners = _corners(boxes)
        size = (frames.shape[2], frames.shape[1])
        _check_inside(corners, size)
        key = KeyFrame("", 0, size, corners, None, torch.ones(len(corners)))
        batch = batched([test_sample(0, key, frames, rule.view)], multiple=self.vit.patch_size)
        names = ("video", "boxes", "box_clip", "sizes")
        with self._autocast():
            logits = self.network(*(batch[name].to(self.device) for name in names))
        return logits.float().sigmoid()

    def _outputs(self, video: Tensor, count: int) -> list[Tensor]:
        # Its mean and deviation are not those of the other towers.
        return VisionTransformer.forward(self.network, self.network.normalized(video), None, count)

    def _finish(self, last: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.network.norm(last)
        return tokens, tokens.mean(1)


def _around_middle(temporal: Any, count: int) -> np.ndarray:
    """The chosen ones of `count` frames, with frame count // 2 as the key frame."""
    window = min(count, temporal.span)
    return temporal.indices(window) + count // 2 - window // 2


def _corners(boxes: np.ndarray | Tensor | list) -> Tensor:
    corners = torch.as_tensor(boxes, dtype=torch.float32, device="cpu")
    corners = corners.reshape(0, 4) if corners.numel() == 0 else corners
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise DataError(f"boxes have the shape {tuple(corners.shape)}; give (N, 4): left, top, right, bottom in pixels")
    wrong = ~(corners.isfinite().all(1) & (corners[:, 2:] >= corners[:, :2]).all(1))
    if wrong.any():
        box = corners[wrong][0].tolist()
        raise DataError(f"a box is {box}; it must be finite, with left <= right and top <= bottom")
    return corners


def _check_inside(corners: Tensor, size: tuple[int, int]) -> None:
    """Raises DataError: boxes that show nothing of a picture of size (width, height), and shares in place of pixels."""
    if len(corners) and corners.min() >= 0 and corners.max() <= 1:
        raise DataError(
            f"boxes reach from {corners.min():g} to {corners.max():g}; give pixels of the frames, here {size[0]} x {size[1]}"
        )
    outside = (corners[:, 2:] < 0).any(1) | (corners[:, :2] > torch.tensor(size) - 1).any(1)
    if outside.any():
        box = corners[outside][0].tolist()
        raise DataError(f"a box is {box}, outside the frames of {size[0]} x {size[1]} pixels; leave it out")
