"""token_gather: the visible tokens of a sequence, with their position rows added in the same pass.

    out[b, i] = x[b, visible[b, i]] + table[visible[b, i]]

Forward moves 2 * B*n*C elements (and n*C of the table, which stays in cache); backward writes each of the B*N*C gradient
elements once and reads B*n*C. Indices within a row are unique, so backward scatters without atomics.

gather_norm: the visible tokens through a LayerNorm in the same pass, for the intermediate features of a frozen teacher.

    out[b, i] = (x[b, j] - mean) / sqrt(variance + eps) * weight + bias,   j = visible[b, i]

2 * B*n*C elements moved, where gathering and normalizing apart move three times that.
"""

from __future__ import annotations

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
    check_out,
    check_visible,
    no_forward_mode,
    no_second_gradient,
    on_device,
    one_device,
    power_of_two,
    use_triton,
    warps_for,
)
from kernels._operator import operator, register_autograd, register_fake


@triton.jit
def token_gather_fwd_kernel(
    out, x, visible, table, n, tokens, C: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    token = tl.load(visible + i_row).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < C
    value = tl.load(x + ((tl.program_id(0) // n).to(tl.int64) * tokens + token) * C + o, mask=inside)
    if TABLE:
        # The table is rounded to x's dtype first, as the reference casts it; the sum is fp32 and rounded once.
        row = tl.load(table + token * C + o, mask=inside).to(value.dtype)
        value = value.to(tl.float32) + row.to(tl.float32)
    tl.store(out + i_row * C + o, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def token_gather_bwd_kernel(dx, dout, visible, n, tokens, C: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    token = tl.load(visible + i_row).to(tl.int64)
    o = tl.arange(0, BLOCK)
    value = tl.load(dout + i_row * C + o, mask=o < C)
    tl.store(dx + ((tl.program_id(0) // n).to(tl.int64) * tokens + token) * C + o, value, mask=o < C)


@triton.jit
def gather_norm_kernel(
    out, x, visible, weight, bias, n, tokens, eps, C: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr
):
    """One program per row; statistics in fp32, as the two-pass formula that does not cancel."""
    i_row = tl.program_id(0).to(tl.int64)
    i_source = i_row
    if GATHER:
        i_source = (tl.program_id(0) // n).to(tl.int64) * tokens + tl.load(visible + i_row)
    o = tl.arange(0, BLOCK)
    inside = o < C
    value = tl.load(x + i_source * C + o, mask=inside, other=0).to(tl.float32)
    centered = tl.where(inside, value - tl.sum(value, 0) / C, 0.0)
    # A division for each channel would be half of the kernel's instructions.
    standard = centered * (1 / tl.sqrt(tl.sum(centered * centered, 0) / C + eps))
    b_weight = tl.load(weight + o, mask=inside, other=0).to(tl.float32)
    b_bias = tl.load(bias + o, mask=inside, other=0).to(tl.float32)
    tl.store(out + i_row * C + o, tl.fma(standard, b_weight, b_bias).to(out.dtype.element_ty), mask=inside)


def _token_gather_into(out: Tensor, x: Tensor, visible: Tensor, table: Tensor | None) -> None:
    x, visible = x.contiguous(), visible.contiguous()
    batch, tokens, width = x.shape
    n = visible.shape[1]
    if out.numel():
        with on_device(out):
            token_gather_fwd_kernel[(batch * n,)](
                out,
                x,
                visible,
                None if table is None else table.contiguous(),
                n,
                tokens,
                C=width,
                BLOCK=power_of_two(width),
                TABLE=table is not None,
                num_warps=4,
                **COMPILER_OPTIONS,
            )


_token_gather_out = operator("token_gather_out", mutates_args=("out",))(_token_gather_into)


@operator("token_gather")
def _token_gather(x: Tensor, visible: Tensor, table: Tensor | None) -> Tensor:
    out = torch.empty(*visible.shape, x.shape[2], dtype=x.dtype, device=x.device)
    _token_gather_into(out, x, visible, table)
    return out


@register_fake(_token_gather)
def _(x, visible, table):
    return x.new_empty(*visible.shape, x.shape[2])


@operator("token_gather_backward")
def _token_gather_backward(dout: Tensor, visible: Tensor, tokens: int) -> Tensor:
    dout, visible = dout.contiguous(), visible.contiguous()
    batch, n, width = dout.shape
    dx = torch.zeros(batch, tokens, width, dtype=dout.dtype, device=dout.device)
    if dout.numel():
        with on_device(dx):
            token_gather_bwd_kernel[(batch * n,)](
                dx, dout, visible, n, tokens, C=width, BLOCK=power_of_two(width), num_warps=4, **COMPILER_OPTIONS
            )
    return dx


@register_fake(_token_gather_backward)
def _(dout, visible, tokens):
    return dout.new_empty(dout.shape[0], tokens, dout.shape[2])


register_autograd(_token_gather_backward, no_second_gradient)


def _setup(ctx, inputs, output):
    x, visible, _ = inputs
    ctx.save_for_backward(visible)
    ctx.tokens = x.shape[1]


def _backward(ctx, dout):
    (visible,) = ctx.saved_tensors
    return _token_gather_backward(dout, visible, ctx.tokens), None, None


register_autograd(_token_gather, _backward, setup_context=_setup)


def _gather_norm_into(out: Tensor, x: Tensor, visible: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    x, visible = x.contiguous(), None if visible is None else visible.contiguous()
    batch, tokens, width = x.shape
    n = out.shape[1]
    if out.numel():
        with on_device(out):
            gather_norm_kernel[(batch * n,)](
                out,
                x,
                visible,
                weight.contiguous(),
                bias.contiguous(),
                n,
                tokens,
                eps,
                C=width,
                BLOCK=power_of_two(width),
                GATHER=visible is not None,
                num_warps=warps_for(width),
                **COMPILER_OPTIONS,
            )


_gather_norm_out = operator("gather_norm_out", mutates_args=("out",))(_gather_norm_into)


def _shape(x: Tensor, visible: Tensor | None) -> tuple[int, ...]:
    return tuple(x.shape) if visible is None else (*visible.shape, x.shape[2])


@operator("gather_norm")
def _gather_norm(x: Tensor, visible: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = torch.empty(_shape(x, visible), dtype=x.dtype, device=x.device)
    _gather_norm_into(out, x, visible, weight, bias, eps)
    return out


@register_fake(_gather_norm)
def _(x, visible, weight, bias, eps):
    return x.new_empty(_shape(x, visible))


def _reference(x: Tensor, visible: Tensor, table: Tensor | None) -> Tensor:
    index = visible.long()
    out = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return out if table is None else out + table.to(x.dtype)[index]


def _check_rows(x: Tensor, taken: bool, arithmetic: bool) -> None:
    """arithmetic: whether the kernel computes with the numbers, or copies them."""
    if x.ndim != 3 or x.dtype not in (*FLOATING, torch.float64):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be float64, float32, bfloat16 or float16 (B, N, C)")
    if taken and (x.shape[2] > MAX_CHANNELS or arithmetic and x.dtype == torch.float64):
        raise ValueError(
            f"x has {x.shape[2]} channels of {x.dtype}; the kernel takes at most {MAX_CHANNELS} and computes in float32; use "
            "backend='reference'"
        )


def token_gather(
    x: Tensor,
    visible: Tensor,
    table: Tensor | None = None,
    backend: Backend = "auto",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of x at visible, plus the same rows of a position table.

    Args:
        x: (B, N, C) fp64, fp32, bf16 or fp16; on the Triton backend C is at most 16384, and fp64 takes no table.
        visible: int32 or int64 (B, n); the indices of one row are unique where x takes a gradient.
        table: (N, C) added after a cast to x's dtype, or None. Constant: one that requires a gradient is refused.
        backend: "auto", "reference" or "triton".
        out: written in place and returned: contiguous, of the result's shape, dtype and device; x then takes no gradient.
            None: a new one.

    Returns:
        (B, n, C) in x's dtype; differentiable with respect to x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an out beside an x that requires a gradient. IndexError: an
            index out of range (on a GPU within checked() only).
    """
    taken = use_triton(backend, x)
    _check_rows(x, taken, table is not None)
    one_device(x=x, visible=visible, table=table)
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        raise ValueError("table requires a gradient and would get none; pass table.detach(), or add it outside")
    if table is not None and table.shape != x.shape[1:]:
        raise ValueError(f"table has shape {tuple(table.shape)}; it must be {tuple(x.shape[1:])}, a row for each token")
    check_visible(visible, x.shape[0], x.shape[1])
    table = None if table is None else table.detach()
    if taken:
        no_forward_mode(x)
    if out is None:
        return (_token_gather if taken else _reference)(x, visible, table)
    check_out(out, _shape(x, visible), x.dtype, x)
    if not taken:
        return out.copy_(_reference(x, visible, table))
    _token_gather_out(out, x.detach(), visible, table)
    return out


def gather_norm(
    x: Tensor,
    visible: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Rows of x at visible, through a LayerNorm; for frozen towers, so nothing gets a gradient.

    Args:
        x: (B, N, C) fp32, bf16 or fp16, on the reference also fp64; on the Triton backend C is at most 16384.
        visible: int32 or int64 (B, n); None for all rows in their order.
        weight, bias: (C,) of the LayerNorm. Statistics and affine are fp32 whatever x is.
        eps: of the LayerNorm.
        out: written in place and returned: contiguous, of the result's shape, dtype and device. None: a new one.
        backend: "auto", "reference" or "triton".

    Returns:
        (B, n, C) in x's dtype, or (B, N, C), detached.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. IndexError: an index out of range (see token_gather).
    """
    taken = use_triton(backend, x)
    _check_rows(x, taken, True)
    one_device(x=x, visible=visible, weight=weight, bias=bias)
    if weight.shape != x.shape[2:] or bias.shape != x.shape[2:]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be (B, N, C), (C,), (C,)"
        )
    if visible is not None:
        check_visible(visible, x.shape[0], x.shape[1])
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if out is not None:
        check_out(out, _shape(x, visible), x.dtype, x)
    if taken:
        if out is None:
            return _gather_norm(x, visible, weight, bias, eps)
        _gather_norm_out(out, x, visible, weight, bias, eps)
        return out
    rows = x if visible is None else _reference(x, visible, None)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(rows.to(kind), x.shape[2:], weight.to(kind), bias.to(kind), eps).to(x.dtype)
    return normed if out is None else out.copy_(normed)
