"""F.interpolate's bicubic resize as matrix products: the same weights, many planes at once.

On a GPU F.interpolate gives each pixel of the result one thread, which walks over all planes: 38,416 threads for CLIP L/14's
196 pixels a side, where a GPU holds 200,000, and 1,536 planes a step. A resize is one product along each axis. Its matrix
has four numbers a row, around the diagonal, so the axis is cut into overlapping windows and each multiplied by its own
small block: a sixth of the full product's work. A compiler generates a kernel of F.interpolate that fills the GPU, and on a
CPU it is as fast; there it stays.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Blocks this narrow still fill a tile of a matrix product.
_NARROWEST = 16


@functools.cache
def _windows(source: int, target: int) -> tuple[int, int, int]:
    """(blocks, window, stride): block b of target / blocks results needs nothing outside [b * stride, b * stride + window).

    The windows cover the source from end to end, and are as short as can be.
    """
    best = (1, source, 0)
    for blocks in range(2, target // _NARROWEST + 1):
        if target % blocks:
            continue
        results = target // blocks
        needed = []
        for block in range(blocks):
            low, high = (
                math.floor((i + 0.5) * source / target - 0.5) for i in (block * results, (block + 1) * results - 1)
            )
            needed.append((max(0, low - 1), min(source, high + 3)))
        for stride in range(source // (blocks - 1), 0, -1):
            window = source - (blocks - 1) * stride
            if all(n * stride <= low and high <= n * stride + window for n, (low, high) in enumerate(needed)):
                best = min(best, (blocks, window, stride), key=lambda found: found[1])
                break
    return best


def _blocks(source: int, target: int, like: Tensor) -> Tensor:
    """(blocks, window, results) of the transposed matrix that resizes an axis."""
    blocks, window, stride = _windows(source, target)
    # What torch itself makes of each unit vector; the other axis keeps its size, where bicubic changes nothing.
    matrix = F.interpolate(
        torch.eye(source, device=like.device, dtype=like.dtype)[None, None],
        (target, source),
        mode="bicubic",
        align_corners=False,
    )[0, 0]
    results = target // blocks
    return matrix.as_strided((blocks, window, results), (results * source + stride, 1, source))


def bicubic(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """F.interpolate(frames, size, mode="bicubic", align_corners=False), without gradient.

    frames: fp32 (R, C, H, W). Returns (R, C, *size), contiguous, within rounding of fp32 sums.
    """
    rows, channels, height, width = frames.shape
    planes = rows * channels
    across = _blocks(width, size[1], frames)
    blocks, window, results = across.shape
    stride = _windows(width, size[1])[2]
    narrow = frames.new_empty(planes, height, size[1])
    # Strided views on both sides: nothing is copied.
    parts = frames.contiguous().as_strided((blocks, planes * height, window), (stride, width, 1))
    torch.bmm(parts, across, out=narrow.view(-1, blocks, results).transpose(0, 1))
    down = _blocks(height, size[0], frames).transpose(1, 2)
    blocks, results, window = down.shape
    stride = _windows(height, size[0])[2]
    out = frames.new_empty(planes, *size)
    for block in range(blocks):
        part = narrow[:, block * stride : block * stride + window]
        torch.bmm(down[block].expand(planes, -1, -1), part, out=out[:, block * results : (block + 1) * results])
    return out.view(rows, channels, *size)
