"""The action detector of AVA: a video ViT, its feature map averaged over time, and a linear head on each person's box.

The rule of the official detection code: all tokens are normed, the token grid is averaged over time to a map of one cell a
patch, RoIAlign cuts 7 x 7 bins out of it for each box, their maximum goes through a linear head of independent classes.
Parameter names are the official ones. Legend: B clips, N boxes of all of them, h x w patches of a frame, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import ConfigError, VitConfig
from umt_fast.masking import TokenGrid
from umt_fast.models.vit import VisionTransformer, draw_linear, resized_table, sinusoid_table

PIXEL_MEAN, PIXEL_STD = (122.7717, 115.9465, 102.9801), (57.375, 57.375, 57.375)
"""Of red, green and blue on the scale 0 to 255. The official detection normalizes otherwise than the other stages."""


class RoiRule(NamedTuple):
    """RoIAlign's arguments. bins: rows and columns a box is cut into. scale: cells of the map per pixel; 0: one cell a patch.
    sampling_ratio: points along a side of a bin; 0: as many as it has cells, rounded up."""

    bins: tuple[int, int] = (7, 7)
    scale: float = 0.0
    sampling_ratio: int = 0
    aligned: bool = False


class Detector(VisionTransformer):
    """Clip and boxes -> logits of each box.

    Pictures need not be square, and each batch may have another size. The position table is made for config.position_grid,
    by default for config's own clip (8 x 14 x 14 for 8 frames of 224 pixels), and resized to each batch's grid.
    """

    def __init__(
        self, config: VitConfig, num_classes: int = 80, head_scale: float = 0.001, roi: RoiRule | None = None
    ) -> None:
        super().__init__(config)
        _roi_align()
        self.roi = roi or RoiRule()
        self.head = nn.Linear(config.width, num_classes)
        draw_linear(self)
        with torch.no_grad():
            self.head.weight.mul_(head_scale)
        self.table_grid = TokenGrid(*(config.position_grid or config.grid))
        self.position = sinusoid_table(self.table_grid.size, config.width)
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1, 1), persistent=False)

    def grid_of(self, video: Tensor) -> TokenGrid:
        """The token grid of a normalized video (B, 3, T, H, W). Raises ValueError where patches do not tile it."""
        patch, tubelet = self.config.patch_size, self.config.tubelet_size
        frames, height, width = video.shape[2:]
        if height % patch or width % patch or frames % tubelet:
            raise ValueError(
                f"a clip of {frames} frames of {height} x {width} pixels is not a multiple of {tubelet} x {patch} x {patch}; "
                "pad the batch as data.decode.detection_view.padded does"
            )
        return TokenGrid(frames // tubelet, height // patch, width // patch)

    def normalized(self, video: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Pixels as the tower sees them.

        Args:
            video: uint8 (B, T, H, W, 3); or floating (B, 3, T, H, W), normalized and padded: returned as it is.
            sizes: integers (B, 2), height and width of each clip before it was padded at right and bottom; None: no padding.

        Returns:
            fp32 (B, 3, T, H, W), zero in the padding. Zero is the mean color, not black: the padding comes after the mean.
        """
        if video.dtype != torch.uint8:
            return video
        pixels = (video.permute(0, 4, 1, 2, 3).float() - self.pixel_mean) / self.pixel_std
        if sizes is None:
            return pixels
        y = torch.arange(pixels.shape[3], device=video.device)[:, None]
        x = torch.arange(pixels.shape[4], device=video.device)
        height, width = (column.view(-1, 1, 1) for column in sizes.unbind(1))
        inside = (y < height) & (x < width)
        return pixels * inside[:, None, None]

    def _tokens(self, video: Tensor, visible: Tensor) -> Tensor:
        table = resized_table(self.position, self.table_grid, self.grid_of(video))
        return self.patch_embed(video, visible) + table

    def feature_map(self, video: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(B, C, h, w): the normed tokens averaged over time. Padding takes part in attention, as officially."""
        video = self.normalized(video, sizes)
        grid = self.grid_of(video)
        every = torch.arange(grid.size, dtype=torch.int32, device=video.device).expand(len(video), -1)
        (tokens,) = super().forward(video, every)
        cells = self.norm(tokens).unflatten(1, (grid.frames, grid.rows, grid.columns))
        return cells.mean(1).permute(0, 3, 1, 2)

    def pooled(self, maps: Tensor, boxes: Tensor, box_clip: Tensor) -> Tensor:
        """(N, C, bins, bins) of boxes fp32 (N, 4), in pixels of the clips box_clip (N,), on maps (B, C, h, w)."""
        maps = maps.float()  # boxes take its dtype, and 8 bits would not tell pixels apart
        rows = torch.cat([box_clip[:, None].to(maps.dtype), boxes.to(maps.dtype)], 1)
        scale = self.roi.scale or 1 / self.config.patch_size
        return _roi_align()(
            maps,
            rows,
            self.roi.bins,
            spatial_scale=scale,
            sampling_ratio=self.roi.sampling_ratio,
            aligned=self.roi.aligned,
        )

    def forward(self, video: Tensor, boxes: Tensor, box_clip: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Logits (N, num_classes) of boxes.

        Args:
            video, sizes: see normalized.
            boxes: fp32 (N, 4), left, top, right, bottom in pixels.
            box_clip: integers (N,), the clip of each box, in [0, B). Boxes may be padded: give those clip 0 and no extent.
        """
        bins = self.pooled(self.feature_map(video, sizes), boxes, box_clip)
        # Max pooling keeps one index for its backward pass, where amax would keep all bins.
        return self.head(F.max_pool2d(bins, self.roi.bins).flatten(1))


def _roi_align():
    try:
        from torchvision.ops import roi_align
    except ImportError as error:
        raise ConfigError("the detector needs torchvision; pip install 'umt_fast[detection]'") from error
    return roi_align
