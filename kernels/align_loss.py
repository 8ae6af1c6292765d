"""align_loss: LayerNorm and normalization of the student's heads, distance to the teacher, mean over K layers.

    y = LayerNorm(student) * weight[k] + bias[k];  s = y / |y|;  t = target / |target|
    loss = mean over k, b, i of (2 - 2 s.t)                      (paper section 3.1; the official code's form of MSE)

A forward pass reads student and target once (2 * K*B*n*D elements) and writes one fp32 number per row; nothing of size
(K, B, n, D) is stored for backward, which recomputes a row's statistics from the same two reads and writes the student's
gradient. About 20 FLOPs an element. Targets may be all N teacher tokens: the kernel then reads only the visible rows.
A row of zeros has no direction: its normalized value and its gradient are defined as zero.
"""

from __future__ import annotations

from typing import Literal

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
    check_visible,
    no_forward_mode,
    no_second_gradient,
    on_device,
    one_device,
    power_of_two,
    rows_per_program,
    use_triton,
    warps_for,
)
from kernels._operator import operator, register_autograd, register_fake

Normalize = Literal["l2", "none"]
Loss = Literal["l2", "mse", "smooth_l1"]
_LOSSES = {"l2": 0, "mse": 1, "smooth_l1": 2}


@triton.jit
def _unit(x, NORMALIZE: tl.constexpr):
    """x / |x| and 1 / |x|, zero for a row of zeros."""
    inverse = 1.0
    if NORMALIZE:
        square = tl.sum(x * x, 0)
        inverse = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        x = x * inverse
    return x, inverse


@triton.jit
def _row(
    student,
    target,
    visible,
    i_row,
    i_layer,
    weight,
    bias,
    rows_per_layer,
    n,
    tokens,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """One row: standardized x, inverse deviation, affine weight, normalized student, its inverse norm, the target."""
    o = tl.arange(0, BLOCK)
    inside = o < D
    x = tl.load(student + i_row * D + o, mask=inside, other=0).to(tl.float32)
    centered = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / D + eps)
    standard = centered * rstd
    b_weight = tl.load(weight + i_layer * D + o, mask=inside, other=0).to(tl.float32)
    y = standard * b_weight + tl.load(bias + i_layer * D + o, mask=inside, other=0).to(tl.float32)
    s, inverse = _unit(y, NORMALIZE)
    i_target = i_row
    if GATHER:
        within = i_row - i_layer * rows_per_layer
        token = tl.load(visible + within).to(tl.int64)
        i_target = (i_layer * (rows_per_layer // n) + within // n) * tokens + token
    t = tl.load(target + i_target * D + o, mask=inside, other=0).to(tl.float32)
    t, _ = _unit(t, NORMALIZE)
    return standard, rstd, b_weight, s, inverse, t


@triton.jit
def align_loss_fwd_kernel(
    out,
    student,
    target,
    visible,
    weight,
    bias,
    rows_per_layer,
    n,
    tokens,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LOSS: tl.constexpr,
    GATHER: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    _, _, _, s, _, t = _row(
        student,
        target,
        visible,
        i_row,
        i_row // rows_per_layer,
        weight,
        bias,
        rows_per_layer,
        n,
        tokens,
        eps,
        D,
        BLOCK,
        NORMALIZE,
        GATHER,
    )
    if LOSS == 0:
        value = 2 - 2 * tl.sum(s * t, 0)
    elif LOSS == 1:
        value = tl.sum((s - t) * (s - t), 0) / D
    else:
        distance = tl.abs(s - t)
        value = tl.sum(tl.where(distance < 1, 0.5 * distance * distance, distance - 0.5), 0) / D
    tl.store(out + i_row, value)


@triton.jit
def align_loss_bwd_kernel(
    dstudent,
    dweight,
    dbias,
    dout,
    student,
    target,
    visible,
    weight,
    bias,
    rows_per_layer,
    n,
    tokens,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LOSS: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per ROWS rows of one layer; their LayerNorm gradients are summed in fp32 in a fixed order."""
    i_part, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < D
    acc_weight = tl.zeros((BLOCK,), tl.float32)
    acc_bias = tl.zeros((BLOCK,), tl.float32)
    first = i_part * ROWS
    for i in range(ROWS):
        # Behind the layer's last row its gradient is zero and nothing is stored: the last row is read again from cache.
        here = first + i < rows_per_layer
        i_row = i_layer * rows_per_layer + tl.minimum(first + i, rows_per_layer - 1)
        standard, rstd, b_weight, s, inverse, t = _row(
            student,
            target,
            visible,
            i_row,
            i_layer,
            weight,
            bias,
            rows_per_layer,
            n,
            tokens,
            eps,
            D,
            BLOCK,
            NORMALIZE,
            GATHER,
        )
        if LOSS == 0:
            ds = -2 * t
        elif LOSS == 1:
            ds = 2 * (s - t) / D
        else:
            ds = tl.minimum(tl.maximum(s - t, -1.0), 1.0) / D
        ds *= tl.load(dout + i_row, mask=here, other=0)
        dy = ds
        if NORMALIZE:
            dy = inverse * (ds - s * tl.sum(ds * s, 0))
        acc_weight += dy * standard
        acc_bias += dy
        dstandard = tl.where(inside, dy * b_weight, 0.0)
        mean = tl.sum(dstandard, 0) / D
        along = tl.sum(dstandard * standard, 0) / D
        dx = rstd * (dstandard - mean - standard * along)
        # Not inside & here: broadcast by an operator, a scalar comparison is no mask to triton 3.9's interpreter.
        tl.store(dstudent + i_row * D + o, dx.to(dstudent.dtype.element_ty), mask=tl.where(here, inside, False))
    part = (i_layer * tl.num_programs(0) + i_part) * D + o
    tl.store(dweight + part, acc_weight, mask=inside)
    tl.store(dbias + part, acc_bias, mask=inside)


def _arguments(student: Tensor, target: Tensor, visible: Tensor | None, weight: Tensor, bias: Tensor) -> tuple:
    layers, batch, n, width = student.shape
    tokens = target.shape[2]
    pointers = (student.contiguous(), target.contiguous(), None if visible is None else visible.contiguous())
    return (*pointers, weight.contiguous(), bias.contiguous(), batch * n, n, tokens)


@operator("align_loss")
def _align_loss(
    student: Tensor,
    target: Tensor,
    visible: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normalize: bool,
    loss: int,
) -> Tensor:
    layers, batch, n, width = student.shape
    out = torch.empty(layers, batch * n, dtype=torch.float32, device=student.device)
    if out.numel():
        with on_device(out):
            align_loss_fwd_kernel[(out.numel(),)](
                out,
                *_arguments(student, target, visible, weight, bias),
                eps,
                D=width,
                BLOCK=power_of_two(width),
                NORMALIZE=normalize,
                LOSS=loss,
                GATHER=visible is not None,
                num_warps=warps_for(width),
                **COMPILER_OPTIONS,
            )
    return out


@register_fake(_align_loss)
def _(student, target, visible, weight, bias, eps, normalize, loss):
    return student.new_empty(student.shape[0], student.shape[1] * student.shape[2], dtype=torch.float32)


@operator("align_loss_backward")
def _align_loss_backward(
    dout: Tensor,
    student: Tensor,
    target: Tensor,
    visible: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normalize: bool,
    loss: int,
) -> tuple[Tensor, Tensor, Tensor]:
    layers, batch, n, width = student.shape
    per_program = rows_per_program(layers * batch * n)
    parts = -(-batch * n // per_program)
    dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
    partial = torch.empty(2, layers, parts, width, dtype=torch.float32, device=student.device)
    if dstudent.numel():
        with on_device(dstudent):
            align_loss_bwd_kernel[(parts, layers)](
                dstudent,
                partial[0],
                partial[1],
                dout.contiguous(),
                *_arguments(student, target, visible, weight, bias),
                eps,
                D=width,
                BLOCK=power_of_two(width),
                NORMALIZE=normalize,
                LOSS=loss,
                GATHER=visible is not None,
                ROWS=per_program,
                num_warps=warps_for(width),
                **COMPILER_OPTIONS,
            )
    # Summed apart: an operator's results must not share memory.
    return dstudent, partial[0].sum(1).to(weight.dtype), partial[1].sum(1).to(bias.dtype)


@register_fake(_align_loss_backward)
def _(dout, student, target, visible, weight, bias, eps, normalize, loss):
    return student.new_empty(student.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


register_autograd(_align_loss_backward, no_second_gradient)


def _setup(ctx, inputs, output):
    student, target, visible, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(student, target, visible, weight, bias)


def _backward(ctx, dout):
    student, target, visible, weight, bias = ctx.saved_tensors
    gradients = _align_loss_backward(dout, student, target, visible, weight, bias, *ctx.options)
    return gradients[0], None, None, gradients[1], gradients[2], None, None, None


register_autograd(_align_loss, _backward, setup_context=_setup)


def _check_kinds(on_triton: bool, channels: int, *dtypes: torch.dtype) -> None:
    allowed = FLOATING if on_triton else (*FLOATING, torch.float64)
    if not set(dtypes) <= set(allowed) or on_triton and channels > MAX_CHANNELS:
        instead = "; use backend='reference'" if on_triton else ""
        raise ValueError(
            f"{channels} channels of {', '.join(map(str, dtypes))}; student, target, weight and bias must be "
            f"{', '.join(map(str, allowed))}, on the Triton backend with at most {MAX_CHANNELS} channels{instead}"
        )


def l2_normalize(x: Tensor) -> Tensor:
    """x / |x| over the last axis; a row of zeros stays zero and has a zero gradient."""
    square = x.square().sum(-1, keepdim=True)
    possible = square > 0
    return x * torch.where(possible, torch.where(possible, square, 1.0).rsqrt(), 0.0)


def align_features(
    student: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, normalize: Normalize = "l2"
) -> Tensor:
    """The student's side of the loss, (K, B, n, D): LayerNorm of each layer's rows, then L2 norm. Plain PyTorch, in
    fp32, or float64 where student is."""
    x = student if student.dtype == torch.float64 else student.float()
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * weight[:, None, None] + bias[:, None, None]
    return l2_normalize(y) if normalize == "l2" else y


def _reference(
    student: Tensor,
    target: Tensor,
    visible: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normalize: bool,
    loss: int,
) -> Tensor:
    s = align_features(student, weight, bias, eps, "l2" if normalize else "none")
    if visible is not None:
        index = visible.long()[None, :, :, None].expand(*target.shape[:2], -1, target.shape[3])
        target = target.gather(2, index.expand(target.shape[0], -1, -1, -1))
    t = target.to(s.dtype)
    t = l2_normalize(t) if normalize else t
    if loss == 0:
        value = 2 - 2 * (s * t).sum(-1)
    elif loss == 1:
        value = (s - t).square().mean(-1)
    else:
        value = F.smooth_l1_loss(s, t, reduction="none").mean(-1)
    return value.flatten(1)


def align_loss(
    student: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    visible: Tensor | None = None,
    eps: float = 1e-6,
    normalize: Normalize = "l2",
    loss: Loss = "l2",
    per_layer: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Distance between the student's aligned outputs and the teacher's.

    Args:
        student: (K, B, n, D) outputs of the K linear heads, before their LayerNorm.
        target: (K, B, n, D) teacher outputs at the visible tokens, or (K, B, N, D) at all tokens with `visible` given;
            not yet normalized. No gradient.
        weight, bias: (K, D) of the heads' LayerNorms.
        visible: int32 or int64 (B, n) rows of target, or None.
        eps: of the LayerNorm.
        normalize: "l2" puts both sides on the unit sphere, "none" leaves them.
        loss: "l2" is 2 - 2 s.t per token, "mse" and "smooth_l1" (beta 1) average over channels.
        per_layer: return the K means instead of their mean.
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 scalar, or (K,). Differentiable with respect to student, weight and bias. Empty input gives NaN, as any mean.

    Raises:
        ValueError: shapes or options that do not fit. IndexError: an index out of range (on a GPU within checked()
            only).
    """
    if student.ndim != 4 or target.ndim != 4 or weight.shape != (student.shape[0], student.shape[3]):
        raise ValueError(
            f"student {tuple(student.shape)}, target {tuple(target.shape)} and weight {tuple(weight.shape)} "
            "must be (K, B, n, D), (K, B, n or N, D) and (K, D)"
        )
    layers, batch, n, width = student.shape
    rows = n if visible is None else target.shape[2]
    if target.shape != (layers, batch, rows, width) or bias.shape != weight.shape:
        raise ValueError(
            f"target {tuple(target.shape)} does not match student {tuple(student.shape)}, "
            f"or bias {tuple(bias.shape)} not weight {tuple(weight.shape)}"
        )
    one_device(student=student, target=target, weight=weight, bias=bias, visible=visible)
    _check_kinds(use_triton(backend, student), width, student.dtype, target.dtype, weight.dtype, bias.dtype)
    if use_triton(backend, student):
        no_forward_mode(student, weight, bias)
    if loss not in _LOSSES or normalize not in ("l2", "none"):
        raise ValueError(f"loss is {loss!r} and normalize {normalize!r}; choose l2, mse or smooth_l1, and l2 or none")
    if visible is not None:
        check_visible(visible, batch, target.shape[2])
        if visible.shape[1] != n:
            raise ValueError(f"visible has {visible.shape[1]} indices a clip, student {n} rows")
    run = _align_loss if use_triton(backend, student) else _reference
    rows = run(student, target.detach(), visible, weight, bias, eps, normalize == "l2", _LOSSES[loss])
    return rows.mean(1) if per_layer else rows.mean()
