"""quantize_rows: activations to 8 bits with a scale for each row; norm_quantize: those of a LayerNorm, in the same pass;
dequantize_product: the int32 product back to floats.

    r = max|x[i]| / largest,  a[i, k] = round(x[i, k] / r)        largest: 127 (int8), 448 (float8_e4m3fn)
    out[i, j] = product[i, j] * r[i] * c[j] + bias[j]

Bytes moved for each number of bf16: quantizing 3, a LayerNorm with it no more, rescaling 6. Plain PyTorch, run eagerly, moves
23 (int8) or 15 (fp8), the LayerNorm's besides, and 22: it passes over the tensor for each of its operations.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import (
    COMPILER_OPTIONS,
    FLOATING,
    MAX_CHANNELS,
    Backend,
    both,
    check_out,
    on_device,
    one_device,
    power_of_two,
    use_triton,
    warps_for,
)
from kernels._operator import operator, register_fake

Precision = Literal["int8", "fp8"]
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Keeps a row of zeros from dividing by zero; any smaller row is as good as zero.
TINY = 1e-30


def tile(columns: int) -> dict[str, int]:
    """Rows and columns of a program of dequantize_kernel: 16 numbers a thread, in loads of 16 bytes."""
    block = min(256, power_of_two(columns))
    return {"ROWS": 2048 // block, "BLOCK": block}


@triton.jit
def _store_eight(values, scale, row, i_row, o, inside, K: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr):
    """A row of fp32, zero outside, in 8 bits, and its scale."""
    # Without their signs the bits are ordered as the numbers, NaN above infinity: a maximum of floats would drop NaN.
    bits = row.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 0).to(tl.float32, bitcast=True)
    tl.store(scale + i_row, tl.div_rn(largest, LARGEST))
    # The reciprocal is rounded, then its product: so does the reference.
    scaled = row * (tl.div_rn(1.0, tl.maximum(largest, TINY)) * LARGEST)
    if values.dtype.element_ty == tl.int8:
        # Adding 1.5 * 2^23 rounds to an integer, halves to even, and leaves it in the low bits.
        rounded = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = scaled.to(values.dtype.element_ty)
    tl.store(values + i_row * K + o, rounded, mask=inside)


@triton.jit
def quantize_rows_kernel(
    values, scale, x, x_row, K: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr
):
    """One program per row."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < K
    row = tl.load(x + i_row * x_row + o, mask=inside, other=0).to(tl.float32)
    _store_eight(values, scale, row, i_row, o, inside, K, LARGEST, TINY)


@triton.jit
def norm_quantize_kernel(
    values,
    scale,
    x,
    weight,
    bias,
    x_row,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):
    """One program per row; statistics by the two-pass formula, which does not cancel."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < K
    row = tl.load(x + i_row * x_row + o, mask=inside, other=0).to(tl.float32)
    centered = tl.where(inside, row - tl.sum(row, 0) / K, 0.0)
    # A division for each channel would be most of the kernel's instructions.
    standard = centered * (1 / tl.sqrt(tl.sum(centered * centered, 0) / K + eps))
    b_weight = tl.load(weight + o, mask=inside, other=0).to(tl.float32)
    b_bias = tl.load(bias + o, mask=inside, other=0).to(tl.float32)
    _store_eight(values, scale, tl.fma(standard, b_weight, b_bias), i_row, o, inside, K, LARGEST, TINY)


@triton.jit
def dequantize_kernel(out, product, rows, scale, bias, M, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per tile; the tiles of a row are neighbors."""
    across = tl.cdiv(N, BLOCK)
    i_row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    i_row, below, inside = i_row.to(tl.int64)[:, None], (i_row < M)[:, None], (o < N)[None, :]
    value = tl.load(product + i_row * N + o[None, :], mask=below & inside, other=0).to(tl.float32)
    value = value * tl.load(rows + i_row, mask=below, other=0) * tl.load(scale + o[None, :], mask=inside, other=0)
    value += tl.load(bias + o[None, :], mask=inside, other=0)
    tl.store(out + i_row * N + o[None, :], value.to(out.dtype.element_ty), mask=below & inside)


def _options(values: Tensor) -> dict[str, Any]:
    """What a launch over rows says of the 8-bit values it writes. Raises ValueError on a GPU without such numbers."""
    if values.dtype != torch.int8 and values.is_cuda and torch.cuda.get_device_capability(values.device) < (8, 9):
        raise ValueError(
            f"{values.device} has no {values.dtype}, which needs compute capability 8.9; use backend='reference'"
        )
    width = values.shape[1]
    options = {"K": width, "BLOCK": power_of_two(width), "LARGEST": LARGEST[values.dtype], "TINY": TINY}
    # Fused with the sum behind it, the product would not be rounded by itself.
    return options | {"num_warps": warps_for(width)} | COMPILER_OPTIONS


def _empty(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Values and scales of x (M, K), to be written."""
    values = torch.empty(x.shape, dtype=DTYPES[precision], device=x.device)
    return values, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _quantize_rows_into(values: Tensor, scale: Tensor, x: Tensor) -> None:
    # Rows may lie apart; the numbers of a row may not.
    x, options = x if x.stride(1) == 1 else x.contiguous(), _options(values)
    if len(x):
        with on_device(x):
            quantize_rows_kernel[(len(x),)](values, scale, x, x.stride(0), **options)


_quantize_rows_out = operator("quantize_rows_out", mutates_args=("values", "scale"))(_quantize_rows_into)


@operator("quantize_rows")
def _quantize_rows(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    values, scale = _empty(x, precision)
    _quantize_rows_into(values, scale, x)
    return values, scale


@register_fake(_quantize_rows)
def _(x, precision):
    return x.new_empty(x.shape, dtype=DTYPES[precision]), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _norm_quantize_into(values: Tensor, scale: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    x, options = x if x.stride(1) == 1 else x.contiguous(), _options(values)
    if len(x):
        affine = weight.contiguous(), bias.contiguous()
        with on_device(x):
            norm_quantize_kernel[(len(x),)](values, scale, x, *affine, x.stride(0), eps, **options)


_norm_quantize_out = operator("norm_quantize_out", mutates_args=("values", "scale"))(_norm_quantize_into)


@operator("norm_quantize")
def _norm_quantize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, precision: str) -> tuple[Tensor, Tensor]:
    values, scale = _empty(x, precision)
    _norm_quantize_into(values, scale, x, weight, bias, eps)
    return values, scale


@register_fake(_norm_quantize)
def _(x, weight, bias, eps, precision):
    return x.new_empty(x.shape, dtype=DTYPES[precision]), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@operator("dequantize_product")
def _dequantize_product(product: Tensor, rows: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    product, rows, scale, bias = (tensor.contiguous() for tensor in (product, rows, scale, bias))
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    if out.numel():
        height, width = product.shape
        tiles = tile(width)
        with on_device(out):
            dequantize_kernel[(triton.cdiv(height, tiles["ROWS"]) * triton.cdiv(width, tiles["BLOCK"]),)](
                out, product, rows, scale, bias, height, N=width, num_warps=4, **tiles, **COMPILER_OPTIONS
            )
    return out


@register_fake(_dequantize_product)
def _(product, rows, scale, bias, dtype):
    return product.new_empty(product.shape, dtype=dtype)


def largest_of_rows(x: Tensor) -> Tensor:
    """(M, K) -> fp32 (M, 1): the largest magnitude of each row, not finite where a number is not."""
    # Two reductions are faster than one over a copy of absolute values.
    return torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).float()


def _on_triton(x: Tensor, precision: Precision, backend: Backend) -> bool:
    if x.ndim != 2 or not x.shape[1] or x.dtype not in FLOATING:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be float32, bfloat16 or float16 (M, K)")
    if precision not in DTYPES:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(DTYPES)}")
    taken = use_triton(backend, x)
    if taken and x.shape[1] > MAX_CHANNELS:
        raise ValueError(f"{x.shape[1]} channels in a row exceed the limit of {MAX_CHANNELS}; use backend='reference'")
    return taken


def _given(out: tuple[Tensor, Tensor], x: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """The two tensors of an out that fit the values and scales of x."""
    values, scale = both(out)
    check_out(values, tuple(x.shape), DTYPES[precision], x, name="out of the values")
    check_out(scale, (x.shape[0], 1), torch.float32, x, name="out of the scales")
    return values, scale


def _plain(x: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    dtype = DTYPES[precision]
    largest = largest_of_rows(x)
    values = x * (LARGEST[dtype] / largest.clamp_min(TINY))
    if dtype == torch.int8:
        values = values.round_()
    return values.to(dtype), largest / LARGEST[dtype]


def _copied(out: tuple[Tensor, Tensor] | None, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return made if out is None else (out[0].copy_(made[0]), out[1].copy_(made[1]))


def quantize_rows(
    x: Tensor, precision: Precision, *, out: tuple[Tensor, Tensor] | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The rows of x in 8 bits, each with a scale of its own: x = values * scales up to rounding.

    Args:
        x: (M, K) fp32, bf16 or fp16; K at least 1, on the Triton backend at most 16384.
        precision: "int8" or "fp8" (float8_e4m3fn).
        out: values and scales, written in place and returned: contiguous, of the results' shapes, dtypes and device. None:
            new ones.
        backend: "auto", "reference" or "triton"; for fp8 the latter needs compute capability 8.9.

    Returns:
        values (M, K) int8 or float8_e4m3fn, rounded to the nearest, halves to even; scales (M, 1) fp32. A row of zeros gives
        zeros; one with a number that is not finite gets a scale that is not finite, and any values. Detached.

    Raises:
        ValueError: an x, precision or out of another kind, more channels than a program holds, a GPU without fp8.
    """
    x = x.detach()
    taken = _on_triton(x, precision, backend)
    out = None if out is None else _given(out, x, precision)
    if not taken:
        return _copied(out, _plain(x, precision))
    if out is None:
        return _quantize_rows(x, precision)
    _quantize_rows_out(*out, x)
    return out


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    precision: Precision,
    *,
    eps: float = 1e-5,
    out: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """quantize_rows of LayerNorm(x), in one pass over x, for frozen layers; between the two nothing is rounded.

    Args:
        x: (M, K) fp32, bf16 or fp16; K at least 1, on the Triton backend at most 16384.
        weight, bias: (K,) of the LayerNorm, floating. Statistics and affine are fp32 whatever x is.
        precision: "int8" or "fp8" (float8_e4m3fn).
        eps: of the LayerNorm.
        out: as of quantize_rows.
        backend: "auto", "reference" or "triton"; for fp8 the latter needs compute capability 8.9.

    Returns:
        values (M, K) and scales fp32 (M, 1) as of quantize_rows: what scaled_linear takes. Detached.

    Raises:
        ValueError: shapes, dtypes, a precision or an out that do not fit, more channels than a program holds, a GPU without
            fp8.
    """
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    taken = _on_triton(x, precision, backend)
    if weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({x.shape[1]},)")
    one_device(x=x, weight=weight, bias=bias)
    out = None if out is None else _given(out, x, precision)
    if not taken:
        normed = F.layer_norm(x.float(), x.shape[1:], weight.float(), bias.float(), eps)
        return _copied(out, _plain(normed, precision))
    if out is None:
        return _norm_quantize(x, weight, bias, eps, precision)
    _norm_quantize_out(*out, x, weight, bias, eps)
    return out


def dequantize_product(
    product: Tensor, rows: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype, *, backend: Backend = "auto"
) -> Tensor:
    """product * rows * scale + bias: what a product of int8 matrices stands for.

    Args:
        product: int32 (M, N).
        rows: fp32 (M, 1), the scales of its rows.
        scale, bias: fp32 (N,), of its columns.
        dtype: of the result; computed in fp32 and rounded once.
        backend: "auto", "reference" or "triton".

    Returns:
        (M, N) of that dtype. Detached.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if product.ndim != 2 or product.dtype != torch.int32 or rows.shape != (product.shape[0], 1):
        raise ValueError(
            f"product is {product.dtype} {tuple(product.shape)} and rows {tuple(rows.shape)}; they must be int32 (M, N) and "
            "(M, 1)"
        )
    if {rows.dtype, scale.dtype, bias.dtype} != {torch.float32}:
        raise ValueError(f"rows are {rows.dtype}, scale {scale.dtype} and bias {bias.dtype}; all must be float32")
    if dtype not in FLOATING:
        raise ValueError(f"dtype is {dtype!r}; it must be torch.float32, torch.bfloat16 or torch.float16")
    if scale.shape != product.shape[1:] or bias.shape != product.shape[1:]:
        raise ValueError(f"scale {tuple(scale.shape)} and bias {tuple(bias.shape)} must be ({product.shape[1]},)")
    one_device(product=product, rows=rows, scale=scale, bias=bias)
    rows, scale, bias = rows.detach(), scale.detach(), bias.detach()
    if use_triton(backend, product):
        return _dequantize_product(product, rows, scale, bias, dtype)
    return torch.addcmul(bias, product * rows, scale).to(dtype)
