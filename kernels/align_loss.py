"""align_loss: LayerNorm and normalization of the student's heads, distance to the teacher, mean over K layers.

    y = LayerNorm(student) * weight[k] + bias[k];  s = y / |y|;  t = target / |target|
    loss = mean over k, b, i of (2 - 2 s.t)                      (paper section 3.1; the official code's form of MSE)

A forward pass reads student and target once (2 * K*B*n*D elements) and writes one fp32 number per row; nothing of size
(K, B, n, D) is stored for backward, which recomputes a row's statistics from the same two reads and writes the student's
gradient. About 20 FLOPs an element: at this many, instructions are as scarce as bytes, and the kernels are written for few of
them. Targets may be all N teacher tokens: the kernel then reads only the visible rows.
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
    FLOATING,
    FUSED_OPTIONS,
    MAX_CHANNELS,
    Backend,
    check_grid,
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
def _inverse_norm(x, NORMALIZE: tl.constexpr):
    """1 / |x|, zero for a row of zeros; one where nothing is normalized."""
    inverse = 1.0
    if NORMALIZE:
        square = tl.sum(x * x, 0)
        inverse = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    return inverse


@triton.jit
def _row(student, target, weight, bias, o, eps, D: tl.constexpr):
    """A row from its pointers: standardized x, inverse deviation, the head's output y, the target."""
    inside = o < D
    x = tl.load(student + o, mask=inside, other=0).to(tl.float32)
    t = tl.load(target + o, mask=inside, other=0).to(tl.float32)
    centered = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / D + eps)
    standard = centered * rstd
    return standard, rstd, standard * weight + bias, t


@triton.jit
def align_loss_fwd_kernel(
    out,
    student,
    target,
    visible,
    weight,
    bias,
    n,
    tokens,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LOSS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """One program per row; the grid is (n, B, K), because a division costs as much as a sum over the row."""
    i_token, i_layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_clip = i_layer * tl.num_programs(1) + tl.program_id(1)
    i_row = i_clip * n + i_token
    i_target = i_row
    if GATHER:
        i_target = i_clip * tokens + tl.load(visible + tl.program_id(1).to(tl.int64) * n + i_token)
    o = tl.arange(0, BLOCK)
    b_weight = tl.load(weight + i_layer * D + o, mask=o < D, other=0).to(tl.float32)
    b_bias = tl.load(bias + i_layer * D + o, mask=o < D, other=0).to(tl.float32)
    _, _, y, t = _row(student + i_row * D, target + i_target * D, b_weight, b_bias, o, eps, D)
    s_inverse, t_inverse = _inverse_norm(y, NORMALIZE), _inverse_norm(t, NORMALIZE)
    if LOSS == 0:
        # Both rows are scaled behind their product, which saves a pass over each.
        value = 2 - 2 * tl.sum(y * t, 0) * s_inverse * t_inverse
    elif LOSS == 1:
        distance = y * s_inverse - t * t_inverse
        value = tl.sum(distance * distance, 0) / D
    else:
        distance = tl.abs(y * s_inverse - t * t_inverse)
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
    i_part, i_layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < D
    b_weight = tl.load(weight + i_layer * D + o, mask=inside, other=0).to(tl.float32)
    b_bias = tl.load(bias + i_layer * D + o, mask=inside, other=0).to(tl.float32)
    acc_weight = tl.zeros((BLOCK,), tl.float32)
    acc_bias = tl.zeros((BLOCK,), tl.float32)
    first = i_part * ROWS
    i_first = i_layer * rows_per_layer
    # The target's first token of the row's clip: counted on from row to row, because a division costs as much as a sum.
    i_token = first % n
    clip_target = (i_layer * (rows_per_layer // n) + first // n) * tokens
    for i in tl.range(ROWS, num_stages=2):
        # Behind the layer's last row its gradient is zero and nothing is stored: the last row is read again from cache.
        here = first + i < rows_per_layer
        i_row = i_first + tl.minimum(first + i, rows_per_layer - 1)
        i_target = i_row
        if GATHER:
            i_target = clip_target + tl.load(visible + i_row - i_first)
            i_token += 1
            ends = (i_token == n) & (first + i + 1 < rows_per_layer)
            clip_target += tl.where(ends, tokens, 0)
            i_token = tl.where(ends, 0, i_token)
        standard, rstd, y, t = _row(student + i_row * D, target + i_target * D, b_weight, b_bias, o, eps, D)
        s_inverse, t_inverse = _inverse_norm(y, NORMALIZE), _inverse_norm(t, NORMALIZE)
        upstream = tl.load(dout + i_row, mask=here, other=0)
        # The loss' gradient with respect to the normalized student is slope * factor.
        if LOSS == 0:
            slope, factor = t, -2 * upstream * t_inverse
        elif LOSS == 1:
            slope, factor = y * s_inverse - t * t_inverse, 2 * upstream / D
        else:
            slope = tl.minimum(tl.maximum(y * s_inverse - t * t_inverse, -1.0), 1.0)
            factor = upstream / D
        dy = slope * (factor * s_inverse)
        if NORMALIZE:
            dy -= y * (tl.sum(slope * y, 0) * factor * s_inverse * s_inverse * s_inverse)
        acc_weight += dy * standard
        acc_bias += dy
        dstandard = tl.where(inside, dy * b_weight, 0.0)
        mean = tl.sum(dstandard, 0) / D
        along = tl.sum(dstandard * standard, 0) / D
        dx = dstandard * rstd - (standard * (along * rstd) + mean * rstd)
        # Not inside & here: broadcast by an operator, a scalar comparison is no mask to triton 3.9's interpreter.
        tl.store(dstudent + i_row * D + o, dx.to(dstudent.dtype.element_ty), mask=tl.where(here, inside, False))
    part = (i_layer * tl.num_programs(0) + i_part) * D + o
    tl.store(dweight + part, acc_weight, mask=inside)
    tl.store(dbias + part, acc_bias, mask=inside)


def _arguments(student: Tensor, target: Tensor, visible: Tensor | None, weight: Tensor, bias: Tensor) -> tuple:
    pointers = (student.contiguous(), target.contiguous(), None if visible is None else visible.contiguous())
    return *pointers, weight.contiguous(), bias.contiguous()


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
            align_loss_fwd_kernel[(n, batch, layers)](
                out,
                *_arguments(student, target, visible, weight, bias),
                n,
                target.shape[2],
                eps,
                D=width,
                BLOCK=power_of_two(width),
                NORMALIZE=normalize,
                LOSS=loss,
                GATHER=visible is not None,
                num_warps=warps_for(width),
                **FUSED_OPTIONS,
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
                batch * n,
                n,
                target.shape[2],
                eps,
                D=width,
                BLOCK=power_of_two(width),
                NORMALIZE=normalize,
                LOSS=loss,
                GATHER=visible is not None,
                ROWS=per_program,
                num_warps=warps_for(width),
                **FUSED_OPTIONS,
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
    if run is _align_loss:
        check_grid(max(batch, layers))
    rows = run(student, target.detach(), visible, weight, bias, eps, normalize == "l2", _LOSSES[loss])
    return rows.mean(1) if per_layer else rows.mean()
