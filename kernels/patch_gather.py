"""patch_gather: the visible patches of a video as normalized rows, ready for the patch-embedding GEMM.

    out[b, i, (c, dt, dy, dx)] = (video[b, t*tubelet + dt, y*p + dy, x*p + dx, c] / 255 - mean[c]) / std[c]
    with (t, y, x) the grid cell of visible[b, i].

A row is ordered like a flattened Conv3d weight (3, tubelet, p, p), so embedding is one matrix product. Only visible pixels
are read: at B/16, batch 64, 15.7 MB of uint8 in and 31.5 MB of bf16 out, where normalizing the whole video and a dense
Conv3d input move 5 times that. One multiplication and one addition per element.

With order="channels_last" a row is (dt, dy, dx, c), as the pixels lie in memory: 48 bytes of uint8 side by side at p = 16,
which a thread loads 16 at a time; in the other order it loads single bytes. fold_pixels gives a frozen weight in that order,
with std in it, so that the rows are whole numbers: pixels less the rounded mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import (
    COMPILER_OPTIONS,
    Backend,
    check_grid,
    check_out,
    check_visible,
    on_device,
    one_device,
    power_of_two,
    use_triton,
    values_can_be_checked,
)
from kernels._operator import operator, register_fake

Order = Literal["channels_first", "channels_last"]
# Bytes of uint8 that a thread loads at once where a row is ordered as the pixels lie.
_VECTOR = 16
# Numbers of a row that one program can hold.
MAX_NUMBERS = 32768


@triton.jit
def _of_channel(within, r, g, b):
    """r, g or b of each place in a line of pixels, for channel within % 3.

    A thread holds 16 places side by side. So the remainder by 3 is known to the compiler within 16, and between them it is one
    choice for all 16: a handful of instructions, where the plain choice would take some for every place.
    """
    turn, place = within // 16 % 3, within % 16 % 3
    first = tl.where(turn == 0, r, tl.where(turn == 1, g, b))
    second = tl.where(turn == 0, g, tl.where(turn == 1, b, r))
    third = tl.where(turn == 0, b, tl.where(turn == 1, r, g))
    return tl.where(place == 0, first, tl.where(place == 1, second, third))


@triton.jit
def patch_gather_kernel(
    out,
    video,
    visible,
    origin,
    n,
    stride_b,
    stride_t,
    stride_y,
    stride_x,
    stride_c,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    LAST: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One program per visible token, on the grid (n, B); offsets in int64 because a batch of videos exceeds 2^31 bytes.

    A row is a tile of lines. LAST: a line is (dx, c) of one dy, and rows are (dt, dy, dx, c); else it is dx of one dy and c.
    PACKED: the channels of a pixel and the pixels of a line lie side by side.
    """
    i_token, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = i_batch * n + i_token
    # Divided by constants: the grid is one for a whole run, and a division by a number costs as much as a line of pixels.
    cell = tl.load(visible + i_row).to(tl.int32)
    frame = (cell // (GRID_ROWS * GRID_COLUMNS) * TUBELET).to(tl.int64)
    top = (cell // GRID_COLUMNS % GRID_ROWS * PATCH).to(tl.int64)
    left = (cell % GRID_COLUMNS * PATCH).to(tl.int64)
    if WINDOW:
        top += tl.load(origin + i_batch * 2)
        left += tl.load(origin + i_batch * 2 + 1)
    pixels = video + i_batch * stride_b + frame * stride_t + top * stride_y + left * stride_x
    line, within = tl.arange(0, LINES)[:, None], tl.arange(0, WIDTH)[None, :]
    if LAST:
        count: tl.constexpr = TUBELET * PATCH
        length: tl.constexpr = 3 * PATCH
        channel = 0
        step = within if PACKED else (within // 3).to(tl.int64) * stride_x + (within % 3).to(tl.int64) * stride_c
    else:
        count: tl.constexpr = 3 * TUBELET * PATCH
        length: tl.constexpr = PATCH
        channel = line // (TUBELET * PATCH)
        step = within.to(tl.int64) * stride_x
    dt, dy = line // PATCH % TUBELET, line % PATCH
    lines = dt.to(tl.int64) * stride_t + dy.to(tl.int64) * stride_y + channel * stride_c
    inside = (line < count) & (within < length)
    value = tl.load(pixels + lines + step, mask=inside, other=0).to(tl.float32)
    if SCALED:
        if LAST:
            scale, shift = (
                _of_channel(within, scale_r, scale_g, scale_b),
                _of_channel(within, shift_r, shift_g, shift_b),
            )
        else:
            scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
            shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
        value = value * scale + shift
    row = out + i_row * (count * length) + line * length + within
    tl.store(row, value.to(out.dtype.element_ty), mask=inside)


def _channel_last(video: Tensor) -> Tensor:
    """A (B, T, H, W, 3) view of uint8 (B, T, H, W, 3) or float (B, 3, T, H, W) video."""
    return video if video.dtype == torch.uint8 else video.permute(0, 2, 3, 4, 1)


def tile(patch: int, tubelet: int, last: bool) -> dict[str, int]:
    """Lines of a row, numbers of a line, and warps of a program, whose threads have 16 numbers each."""
    lines, width = (tubelet * patch, 3 * patch) if last else (3 * tubelet * patch, patch)
    lines, width = power_of_two(lines), power_of_two(width)
    return {"LINES": lines, "WIDTH": width, "num_warps": min(8, max(1, lines * width // (32 * _VECTOR)))}


def _patch_gather_into(
    out: Tensor,
    video: Tensor,
    visible: Tensor,
    scale: Sequence[float] | None,
    shift: Sequence[float] | None,
    origin: Tensor | None,
    rows: int,
    columns: int,
    patch: int,
    tubelet: int,
    last: bool,
) -> None:
    view, visible = _channel_last(video), visible.contiguous()
    batch, n, _ = out.shape
    if out.numel():
        with on_device(out):
            patch_gather_kernel[(n, batch)](
                out,
                view,
                visible,
                None if origin is None else origin.contiguous(),
                n,
                *view.stride(),
                *(scale or (1.0,) * 3),
                *(shift or (0.0,) * 3),
                GRID_ROWS=rows,
                GRID_COLUMNS=columns,
                TUBELET=tubelet,
                PATCH=patch,
                SCALED=scale is not None,
                WINDOW=origin is not None,
                LAST=last,
                PACKED=view.stride()[3:] == (3, 1),
                **tile(patch, tubelet, last),
                **COMPILER_OPTIONS,
            )


_patch_gather_out = operator("patch_gather_out", mutates_args=("out",))(_patch_gather_into)


@operator("patch_gather")
def _patch_gather(
    video: Tensor,
    visible: Tensor,
    scale: Sequence[float] | None,
    shift: Sequence[float] | None,
    origin: Tensor | None,
    rows: int,
    columns: int,
    patch: int,
    tubelet: int,
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    out = torch.empty(*visible.shape, 3 * tubelet * patch * patch, dtype=dtype, device=video.device)
    _patch_gather_into(out, video, visible, scale, shift, origin, rows, columns, patch, tubelet, last)
    return out


@register_fake(_patch_gather)
def _(video, visible, scale, shift, origin, rows, columns, patch, tubelet, dtype, last):
    return video.new_empty(*visible.shape, 3 * tubelet * patch * patch, dtype=dtype)


def _reference(
    video: Tensor,
    visible: Tensor,
    scale: Sequence[float] | None,
    shift: Sequence[float] | None,
    origin: Tensor | None,
    rows: int,
    columns: int,
    patch: int,
    tubelet: int,
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    view, index = _channel_last(video), visible.long()
    frame, row, column = index // (rows * columns), index // columns % rows, index % columns
    if origin is None:
        batch, frames = view.shape[:2]
        cells = view.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).unflatten(1, (-1, tubelet))
        # Indexing the strided view copies the visible patches alone; pixels are converted after that.
        cells = cells.permute(0, 1, 3, 5, 2, 4, 6, 7) if last else cells.permute(0, 1, 3, 5, 7, 2, 4, 6)
        picked = cells[torch.arange(batch, device=index.device)[:, None], frame, row, column]
    else:
        step = torch.arange(patch, device=index.device)
        clip = torch.arange(len(index), device=index.device)[:, None, None, None, None]
        t = (frame * tubelet)[..., None] + torch.arange(tubelet, device=index.device)
        y = (row * patch + origin[:, :1])[..., None] + step
        x = (column * patch + origin[:, 1:])[..., None] + step
        picked = view[clip, t[..., None, None], y[:, :, None, :, None], x[:, :, None, None, :]]
        picked = picked if last else picked.movedim(-1, 2)
    if scale is not None:
        picked = picked.float()
        scale, shift = (picked.new_tensor(values).view(3 if last else (3, 1, 1, 1)) for values in (scale, shift))
        picked = picked * scale + shift
    return picked.flatten(2).to(dtype)


def patch_gather(
    video: Tensor,
    visible: Tensor,
    *,
    patch_size: int,
    tubelet_size: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    origin: Tensor | None = None,
    crop_size: tuple[int, int] | None = None,
    order: Order = "channels_first",
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Rows of the visible patches of a video, or of a window of each clip.

    Args:
        video: uint8 (B, T, H, W, 3), scaled to [0, 1] and normalized with mean and std when these are given; or floating
            (B, 3, T, H, W), taken as it is. T is a multiple of tubelet_size, and H and W, or crop_size, of patch_size.
            Any strides.
        visible: int32 or int64 (B, n), flat cells of the (T / tubelet, H / p, W / p) grid.
        mean, std: three numbers each on the [0, 1] scale, or both None (uint8 then stays 0..255).
        dtype: of the result; that of out by default, else float32.
        origin: int32 or int64 (B, 2), the top and left pixel of each clip's window of crop_size; the window is cut on the
            way, so that frames larger than the crop need no copy. None: the whole frame.
        crop_size: (height, width) of the windows; takes the place of (H, W) above.
        order: of a row: "channels_first" is that of a Conv3d weight, (3, tubelet, p, p), "channels_last" that of the pixels in
            memory, (tubelet, p, p, 3).
        out: written in place and returned: contiguous, of the result's shape and dtype, on the video's device. None: a new one.
        backend: "auto", "reference" or "triton".

    Returns:
        (B, n, 3 * tubelet * p * p) in dtype. There is no gradient to the video.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit. IndexError: an index or a window out of range (on the CPU; on
            a GPU within kernels.checked() only, because such a check stalls the stream).
    """
    if video.requires_grad and torch.is_grad_enabled():
        raise ValueError("patch_gather has no gradient with respect to the video; pass video.detach()")
    view = _channel_last(video)
    if video.ndim != 5 or view.shape[-1] != 3 or not (video.dtype == torch.uint8 or video.is_floating_point()):
        raise ValueError(
            f"video is {video.dtype} {tuple(video.shape)}; it must be uint8 (B, T, H, W, 3) or floating (B, 3, T, H, W)"
        )
    batch, frames, *size, _ = view.shape
    if patch_size < 1 or tubelet_size < 1:
        raise ValueError(f"patch_size is {patch_size} and tubelet_size {tubelet_size}; both must be at least 1")
    if (origin is None) != (crop_size is None):
        raise ValueError("give origin and crop_size together, or neither")
    if crop_size is not None:
        _check_windows(origin, batch, size, crop_size)
    height, width = crop_size or size
    if height % patch_size or width % patch_size or frames % tubelet_size:
        raise ValueError(
            f"a video of {frames} x {height} x {width} is not divisible into tubelets of "
            f"{tubelet_size} x {patch_size} x {patch_size}"
        )
    if (mean is None) != (std is None) or (mean is not None and video.dtype != torch.uint8):
        raise ValueError("give mean and std together, and only for uint8 video: floating video is taken as it is")
    if mean is not None and (len(mean) != 3 or len(std) != 3 or 0 in std):
        raise ValueError(
            f"mean is {tuple(mean)} and std {tuple(std)}; they must be three numbers each, and none of std 0"
        )
    if order not in ("channels_first", "channels_last"):
        raise ValueError(f"order is {order!r}; choose channels_first or channels_last")
    rows, columns = height // patch_size, width // patch_size
    check_visible(visible, batch, frames // tubelet_size * rows * columns)
    scale = shift = None
    if mean is not None:
        # Numbers, not tensors: making a tensor of them on a GPU would make the host wait for the copy.
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
    dtype = dtype or (torch.float32 if out is None else out.dtype)
    if mean is not None and not dtype.is_floating_point:
        raise ValueError(
            f"dtype is {dtype}, which holds no normalized pixels; leave out mean and std, or give a floating one"
        )
    if not dtype.is_floating_point and dtype != torch.uint8:
        raise ValueError(f"dtype is {dtype}; it must be a floating one, or uint8")
    one_device(video=video, visible=visible, origin=origin)
    last, taken = order == "channels_last", use_triton(backend, video)
    if taken:
        check_grid(batch)
    if taken and 3 * tubelet_size * patch_size**2 > MAX_NUMBERS:
        raise ValueError(
            f"a row of {3 * tubelet_size * patch_size**2} numbers exceeds the limit of {MAX_NUMBERS}; use backend='reference'"
        )
    where = (video, visible, scale, shift, origin, rows, columns, patch_size, tubelet_size)
    if out is None:
        return (_patch_gather if taken else _reference)(*where, dtype, last)
    check_out(out, (*visible.shape, 3 * tubelet_size * patch_size**2), dtype, video)
    if not taken:
        return out.copy_(_reference(*where, dtype, last))
    _patch_gather_out(out, *where, last)
    return out


def _check_windows(origin: Tensor, batch: int, size: Sequence[int], crop: tuple[int, int]) -> None:
    if len(crop) != 2 or min(crop) <= 0:
        raise ValueError(f"crop_size is {crop}; it must be a height and a width above 0")
    if origin.shape != (batch, 2) or origin.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"origin is {origin.dtype} {tuple(origin.shape)}; it must be int32 or int64 ({batch}, 2)")
    if values_can_be_checked(origin):
        (top, left), (bottom, right) = origin.amin(0).tolist(), (origin.amax(0) + origin.new_tensor(crop)).tolist()
        if min(top, left) < 0 or bottom > size[0] or right > size[1]:
            raise IndexError(
                f"windows of {crop[0]} x {crop[1]} reach from ({top}, {left}) to ({bottom}, {right}), "
                f"outside frames of {size[0]} x {size[1]}"
            )


class FoldedPixels(NamedTuple):
    """A frozen patch embedding of whole numbers, from fold_pixels."""

    weight: Tensor
    """(N, tubelet * p * p * 3), std in it."""
    bias: Tensor
    """fp32 (N,), what is left of the mean in it."""
    pixels: dict[str, object]
    """Options of patch_gather that make its rows."""


def fold_pixels(
    weight: Tensor, bias: Tensor | None, *, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> FoldedPixels:
    """A frozen patch embedding of whole numbers: rows @ weight.T + bias is, up to rounding, what the Conv3d makes of pixels
    normalized with mean and std.

    The rows are pixels less 255 * mean, rounded to a whole number. bf16 and fp16 hold them exactly, and their mean is small:
    nothing large is rounded before it is taken off.

    Args:
        weight: (N, 3, tubelet, p, p) of a Conv3d. bias: (N,) or None.
        mean, std: three numbers each on the [0, 1] scale.
        dtype: of the product.

    Returns:
        Weight in dtype, bias, and the options of patch_gather for uint8 video. Detached.

    Raises:
        ValueError: a weight or bias of another shape, a std of 0, a dtype that is not floating.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating one")
    if weight.ndim != 5 or weight.shape[1] != 3 or len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, mean {tuple(mean)} and std {tuple(std)}; they must be (N, 3, tubelet, p, p) and "
            "three numbers each, none of std 0"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    whole = [round(255 * m) for m in mean]
    left = weight.new_tensor([255 * m - w for m, w in zip(mean, whole, strict=True)], dtype=torch.float64)
    rows = (weight.detach().permute(0, 2, 3, 4, 1) / (255 * weight.new_tensor(std, dtype=torch.float64))).to(dtype)
    # Of the weight as it was rounded, so that a gray video of the mean gives the bias alone.
    shift = (rows.double() * left).flatten(1).sum(1)
    options = {"order": "channels_last", "mean": tuple(w / 255 for w in whole), "std": (1 / 255,) * 3}
    return FoldedPixels(rows.flatten(1), ((0 if bias is None else bias.detach()) - shift).float(), options)
