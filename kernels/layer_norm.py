"""layer_norm: a LayerNorm and its gradients, behind the sum of a residual stream and a branch where there is one.

    z = x + branch * scale,  y = (z - mean(z)) / sqrt(variance(z) + eps) * weight + bias

The scale is a number for each row, or none. Bytes moved for each number of an fp32 stream with a bf16 branch and result:
forward 12, where sum, norm and cast apart move 24. Backward reads dy, z and the stream's own gradient, and writes their sum and
the branch's gradient: 16, where norm, sum and casts apart move 36. Multiplied apart, the branch and its gradient are read and
written once more. 8 bytes a row of statistics are kept. The gradients of weight and bias are summed in fp32 in a fixed order.
About 20 FLOPs a number.
"""

from __future__ import annotations

from typing import Any

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
    no_forward_mode,
    no_second_gradient,
    on_device,
    one_device,
    power_of_two,
    row_scale,
    rows_per_program,
    use_triton,
    warps_for,
)
from kernels._operator import operator, register_autograd, register_fake


@triton.jit
def layer_norm_fwd_kernel(
    y, z, mean, rstd, x, branch, scale, weight, bias, x_row, branch_row, eps, K: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row; the two-pass formula, which does not cancel."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < K
    value = tl.load(x + i_row * x_row + o, mask=inside, other=0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + i_row * branch_row + o, mask=inside, other=0).to(tl.float32)
        value += added if scale is None else added * tl.load(scale + i_row)
        # The statistics are of the sum as it is stored: backward reads that.
        stored = value.to(z.dtype.element_ty)
        tl.store(z + i_row * K + o, stored, mask=inside)
        value = stored.to(tl.float32)
    center = tl.sum(value, 0) / K
    centered = tl.where(inside, value - center, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centered * centered, 0) / K + eps)
    tl.store(mean + i_row, center)
    tl.store(rstd + i_row, inverse)
    b_weight = tl.load(weight + o, mask=inside, other=0).to(tl.float32)
    b_bias = tl.load(bias + o, mask=inside, other=0).to(tl.float32)
    tl.store(y + i_row * K + o, (centered * inverse * b_weight + b_bias).to(y.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_bwd_kernel(
    dx,
    dbranch,
    dweight,
    dbias,
    dy,
    dz,
    z,
    mean,
    rstd,
    scale,
    weight,
    rows,
    dy_row,
    dz_row,
    z_row,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per ROWS rows, whose part of the weight's and bias' gradients it writes."""
    o = tl.arange(0, BLOCK)
    inside = o < K
    b_weight = tl.load(weight + o, mask=inside, other=0).to(tl.float32)
    acc_weight = tl.zeros((BLOCK,), tl.float32)
    acc_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        # Behind the last row nothing is added or stored: that row is read again from cache.
        here = first + i < rows
        i_row = tl.minimum(first + i, rows - 1)
        value = tl.load(z + i_row * z_row + o, mask=inside, other=0).to(tl.float32)
        inverse = tl.load(rstd + i_row)
        standard = tl.where(inside, (value - tl.load(mean + i_row)) * inverse, 0.0)
        upstream = tl.load(dy + i_row * dy_row + o, mask=tl.where(here, inside, False), other=0).to(tl.float32)
        acc_weight += upstream * standard
        acc_bias += upstream
        slope = upstream * b_weight
        slope -= tl.sum(slope, 0) / K + standard * (tl.sum(slope * standard, 0) / K)
        slope *= inverse
        if dz is not None:
            slope += tl.load(dz + i_row * dz_row + o, mask=inside, other=0).to(tl.float32)
        stored = tl.where(here, inside, False)
        tl.store(dx + i_row * K + o, slope.to(dx.dtype.element_ty), mask=stored)
        if dbranch is not None:
            if scale is not None:
                slope *= tl.load(scale + i_row)
            tl.store(dbranch + i_row * K + o, slope.to(dbranch.dtype.element_ty), mask=stored)
    part = tl.program_id(0).to(tl.int64) * K + o
    tl.store(dweight + part, acc_weight, mask=inside)
    tl.store(dbias + part, acc_bias, mask=inside)


def warps(width: int) -> int:
    """One for each 512 channels: the backward pass holds five numbers of each."""
    return warps_for(2 * width)


def _rows_apart(matrix: Tensor) -> Tensor:
    """Rows may lie apart; the numbers of a row may not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@operator("layer_norm")
def _layer_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    x, branch = _rows_apart(x), None if branch is None else _rows_apart(branch)
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    z = torch.empty((0,) if branch is None else (rows, width), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        with on_device(x):
            layer_norm_fwd_kernel[(rows,)](
                y,
                z,
                mean,
                rstd,
                x,
                branch,
                scale,
                weight.contiguous(),
                bias.contiguous(),
                x.stride(0),
                0 if branch is None else branch.stride(0),
                eps,
                K=width,
                BLOCK=power_of_two(width),
                num_warps=warps(width),
                **COMPILER_OPTIONS,
            )
    return y, z, mean, rstd


@register_fake(_layer_norm)
def _(x, branch, scale, weight, bias, eps, dtype):
    z = x.new_empty((0,) if branch is None else x.shape)
    return x.new_empty(x.shape, dtype=dtype), z, *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


@operator("layer_norm_backward")
def _layer_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    branch: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, and that of the branch where it is asked for in a dtype."""
    rows, width = z.shape
    dy, z, dz = _rows_apart(dy), _rows_apart(z), None if dz is None else _rows_apart(dz)
    per_program = rows_per_program(rows)
    parts = -(-rows // per_program)
    dx = torch.empty(rows, width, dtype=z.dtype, device=z.device)
    dbranch = torch.empty((0,) if branch is None else dx.shape, dtype=branch or z.dtype, device=z.device)
    partial = torch.empty(2, parts, width, dtype=torch.float32, device=z.device)
    if rows:
        with on_device(z):
            layer_norm_bwd_kernel[(parts,)](
                dx,
                None if branch is None else dbranch,
                partial[0],
                partial[1],
                dy,
                dz,
                z,
                mean,
                rstd,
                scale,
                weight.contiguous(),
                rows,
                dy.stride(0),
                0 if dz is None else dz.stride(0),
                z.stride(0),
                K=width,
                BLOCK=power_of_two(width),
                ROWS=per_program,
                num_warps=warps(width),
                **COMPILER_OPTIONS,
            )
    # Summed apart: an operator's results must not share memory.
    return dx, partial[0].sum(0), partial[1].sum(0), dbranch


@register_fake(_layer_norm_backward)
def _(dy, dz, z, mean, rstd, scale, weight, branch):
    affine = (z.new_empty(z.shape[1], dtype=torch.float32) for _ in range(2))
    return z.new_empty(z.shape), *affine, z.new_empty((0,) if branch is None else z.shape, dtype=branch or z.dtype)


register_autograd(_layer_norm_backward, no_second_gradient)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, branch, scale, weight, bias, _, _ = inputs
    _, z, mean, rstd = output
    ctx.save_for_backward(x if branch is None else z, mean, rstd, scale, weight)
    ctx.mark_non_differentiable(mean, rstd, *([z] if branch is None else []))
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    z, mean, rstd, scale, weight = ctx.saved_tensors
    dweight = dbias = None
    total, kind = dz, ctx.branch_dtype
    # The branch's gradient is the stream's own where nothing tells them apart.
    apart = kind is not None and (kind != z.dtype or scale is not None)
    if dy is not None:
        total, dweight, dbias, branch = _layer_norm_backward(
            dy, dz, z, mean, rstd, scale, weight, kind if apart else None
        )
        dweight, dbias = dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)
    elif apart and dz is not None:
        branch = (dz if scale is None else dz * scale[:, None]).to(kind)
    branch = None if total is None or kind is None else branch if apart else total
    return total, branch, None, dweight, dbias, None, None


register_autograd(_layer_norm, _backward, setup_context=_setup)


class _WithStream(torch.autograd.Function):
    """(x, weight, bias, eps, dtype) -> the norm and x itself. What comes back for x is added in the norm's backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, _, mean, rstd = _layer_norm(x, None, None, weight, bias, eps, dtype)
        ctx.save_for_backward(x, mean, rstd, None, weight)
        ctx.set_materialize_grads(False)
        ctx.branch_dtype, ctx.bias_dtype = None, bias.dtype
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        total, _, _, dweight, dbias, _, _ = _backward(ctx, dy, dz)
        return total, dweight, dbias, None, None


def _reference(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if branch is not None:
        branch = branch.to(kind) if scale is None else branch.to(kind) * scale[:, None]
    z = x if branch is None else (x.to(kind) + branch).to(x.dtype)
    return F.layer_norm(z.to(kind), x.shape[1:], weight.to(kind), bias.to(kind), eps).to(dtype), z


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    with_stream: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x + branch * branch_scale) over the last axis, and that sum; without a branch LayerNorm(x) alone.

    Args:
        x: (..., K) fp32, bf16 or fp16, a residual stream; on the Triton backend K is at most 16384.
        weight, bias: (K,), floating. Statistics and affine are fp32 whatever x is.
        eps: of the LayerNorm.
        branch: (..., K), floating, added to x; or None.
        branch_scale: fp32 that broadcasts to (..., 1), a factor for each row of the branch, as stochastic depth has them; or
            None. It has no gradient.
        with_stream: without a branch return x too, to go on with: what comes back for it is then added in the norm's backward
            pass, in place of one of its own. With a branch the sum is returned in any case.
        dtype: of the norm; x's by default. An fp32 stream can give bf16 to the product behind it, and gets fp32 gradients.
        backend: "auto", "reference" or "triton".

    Returns:
        (..., K) in dtype; with a branch also the sum, or with_stream x, (..., K) in x's dtype. Differentiable in x, branch,
        weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, more channels than a program holds.
    """
    width = x.shape[-1] if x.ndim else 0
    if not width or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be floating (..., K)")
    affine = weight, bias
    if any(part.shape != (width,) or not part.is_floating_point() for part in affine):
        kinds = " and ".join(f"{part.dtype} {tuple(part.shape)}" for part in affine)
        raise ValueError(f"weight and bias are {kinds}; they must be floating ({width},)")
    if branch is not None and (branch.shape != x.shape or not branch.is_floating_point()):
        raise ValueError(f"branch is {branch.dtype} {tuple(branch.shape)}; it must be floating {tuple(x.shape)}")
    if branch is None and branch_scale is not None:
        raise ValueError("branch_scale is that of a branch; pass branch too")
    one_device(x=x, weight=weight, bias=bias, branch=branch)
    scale = row_scale(branch_scale, x)
    dtype = dtype or x.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating one")
    rows, flat = x.reshape(-1, width), None if branch is None else branch.reshape(-1, width)
    if use_triton(backend, x):
        kinds = {x.dtype, dtype, x.dtype if branch is None else branch.dtype}
        if not kinds <= set(FLOATING) or width > MAX_CHANNELS:
            raise ValueError(
                f"{width} channels of {', '.join(sorted(map(str, kinds)))}; the kernel takes at most {MAX_CHANNELS}, of "
                "float32, bfloat16 and float16; use backend='reference'"
            )
        no_forward_mode(x, weight, bias, branch)
        if with_stream and branch is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y, z = _WithStream.apply(rows, weight, bias, eps, dtype)
            return y.view(x.shape), z.view(x.shape)
        y, z, _, _ = _layer_norm(rows, flat, scale, weight, bias, eps, dtype)
    else:
        y, z = _reference(rows, flat, scale, weight, bias, eps, dtype)
    if branch is None:
        return (y.view(x.shape), x) if with_stream else y.view(x.shape)
    return y.view(x.shape), z.view(x.shape)
