"""linear and mlp: matrix products whose bias, activation, residual and LayerNorm cost no pass of their own.

    linear:  out = act(x @ W.T + bias) + residual
    norm:    x @ W.T of a LayerNorm's output from its input: rstd * (x @ (gW).T - mean * (gW 1)) + (W b + bias)
    mlp:     out = (act(x @ W1.T + b1) @ W2.T + b2) * scale + residual, with a scale for each row or none

GELU is the exact one, QuickGELU x * sigmoid(1.702 x). Sums are fp32, the epilogue too; a result is rounded once. 2*M*N*K
FLOPs a product. Bytes, each tensor once: operands and result; residual + its size; statistics another M*K read; backward of
mlp reads the pre-activation and writes its gradient and the activation again, in the epilogue of one product, where apart
they move three times the hidden tensor more. Nothing here uses atomics: the same input gives the same bits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels._launch import (
    FLOATING,
    Backend,
    check_out,
    no_forward_mode,
    no_second_gradient,
    one_device,
    row_scale,
    use_triton,
    without_autocast,
)
from kernels._operator import operator, register_autograd, register_fake
from kernels.linear.norm import DeferredNorm, row_statistics
from kernels.linear.product import ACTIVATIONS, product
from kernels.linear.tiles import form_of, limits, tiles_of

Activation = Literal["none", "gelu", "quick_gelu"]
Save = Literal["pre", "both"]


def weight_gradient_into(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    """out (N, K) fp32 = or += dy.T @ x, on the Triton backend."""
    rows, tiles = dy.shape[0], tiles_of(form_of(out, dy, {}, False, a_t=True, b_t=True), x.device)
    count = triton.cdiv(out.shape[0], tiles["BLOCK_M"]) * triton.cdiv(out.shape[1], tiles["BLOCK_N"])
    # The result is small and its sums are long: they are split until every SM has a tile.
    splits = max(1, min(limits(x.device)[1] // max(1, count), rows // (4 * tiles["BLOCK_K"])))
    if splits == 1:
        product(out, dy, x, a_t=True, b_t=True, accumulate=accumulate, tiles=tiles)
        return
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    product(parts, dy, x, a_t=True, b_t=True, splits=splits, tiles=tiles)
    out.add_(parts.sum(0)) if accumulate else torch.sum(parts, 0, out=out)


@operator("weight_gradient")
def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    out = torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    weight_gradient_into(out, dy, x, False)
    return out


@register_fake(_weight_gradient)
def _(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32)


@operator("add_weight_gradient", mutates_args=("out",))
def _add_weight_gradient(out: Tensor, dy: Tensor, x: Tensor) -> None:
    weight_gradient_into(out, dy, x, True)


def _multiply(
    out: Tensor,
    pre: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    column: Tensor | None,
    activation: str,
    row_scale: Tensor | None = None,
) -> None:
    product(
        out, x, weight.to(x.dtype), kind=ACTIVATIONS[activation], pre=pre, bias=bias, residual=residual, mean=mean,
        rstd=rstd, column=column, row_scale=row_scale,
    )  # fmt: skip


@operator("linear_out", mutates_args=("out",))
def _linear_out(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    column: Tensor | None,
    activation: str,
) -> None:
    _multiply(out, None, x, weight, bias, residual, mean, rstd, column, activation)


def _linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    column: Tensor | None, activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kind = x.dtype if residual is None else residual.dtype
    out = torch.empty(x.shape[0], weight.shape[0], dtype=kind, device=x.device)
    pre = torch.empty(out.shape if keep else (0,), dtype=x.dtype, device=x.device)
    _multiply(out, pre if keep else None, x, weight, bias, residual, mean, rstd, column, activation)
    return out, pre


_linear = operator("linear")(_linear_rows)


@register_fake(_linear)
def _(x, weight, bias, residual, mean, rstd, column, activation, keep):
    shape = (x.shape[0], weight.shape[0])
    kind = x.dtype if residual is None else residual.dtype
    return x.new_empty(shape, dtype=kind), x.new_empty(shape if keep else (0,))


@operator("input_gradient")
def _input_gradient(
    dy: Tensor, weight: Tensor, pre: Tensor | None, activation: str, hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy @ weight, times activation'(pre) where pre is given; then its column sums in fp32; then activation(pre)."""
    out = torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device)
    again = torch.empty(out.shape if hidden else (0,), dtype=dy.dtype, device=dy.device)
    tiles = tiles_of(form_of(out, dy, {}, pre is not None, b_t=True), dy.device)
    parts = torch.empty(
        0 if pre is None else triton.cdiv(out.shape[0], tiles["BLOCK_M"]), out.shape[1], dtype=torch.float32,
        device=dy.device,
    )  # fmt: skip
    product(
        out, dy, weight.to(dy.dtype), b_t=True, kind=ACTIVATIONS[activation], backward=pre is not None, tiles=tiles,
        pre=pre, hidden=again if hidden else None, sums=None if pre is None else parts,
    )  # fmt: skip
    return out, parts.sum(0), again


@register_fake(_input_gradient)
def _(dy, weight, pre, activation, hidden):
    shape = (dy.shape[0], weight.shape[1])
    sums = dy.new_empty(weight.shape[1], dtype=torch.float32)
    return dy.new_empty(shape), sums, dy.new_empty(shape if hidden else (0,))


@operator("mlp")
def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, activation: str, save: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Not the operator: its way through torch costs the host microseconds.
    hidden, pre = _linear_rows(x, w1, b1, None, None, None, None, activation, save != "")
    kind = x.dtype if residual is None else residual.dtype
    out = torch.empty(x.shape[0], w2.shape[0], dtype=kind, device=x.device)
    _multiply(out, None, hidden, w2, b2, residual, None, None, None, "none", scale)
    return out, pre, hidden if save == "both" else x.new_empty(0)


@register_fake(_mlp)
def _(x, w1, b1, w2, b2, residual, scale, activation, save):
    shape, wide = (x.shape[0], w2.shape[0]), (x.shape[0], w1.shape[0])
    kind = x.dtype if residual is None else residual.dtype
    pre, hidden = (x.new_empty(wide if keep else (0,)) for keep in (save != "", save == "both"))
    return x.new_empty(shape, dtype=kind), pre, hidden


def _setup_linear(ctx, inputs, output):
    x, weight, bias, residual, mean, _, _, activation, keep = inputs
    if mean is not None:
        raise RuntimeError("a deferred LayerNorm has no gradient; give linear the LayerNorm's output in place of norm")
    ctx.save_for_backward(x, weight, output[1] if keep else None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.kept = activation, keep
    ctx.bias_dtype = None if bias is None else bias.dtype


def _activation_backward(dy: Tensor, pre: Tensor, activation: str) -> Tensor:
    """dy * activation'(pre) in fp32, by PyTorch's own operators: in a compiled program fused with their neighbors."""
    dy, pre = dy.float(), pre.float()
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, pre)
    # silu(1.702 x) / 1.702 has the derivative of silu at 1.702 x.
    return torch.ops.aten.silu_backward(dy, 1.702 * pre)


def _refuse_second_gradient() -> None:
    # The pre-activation is kept as a number: a second derivative would be found, and lack its part.
    if torch.is_grad_enabled():
        no_second_gradient(None)


def _backward_linear(ctx, dout, _):
    if dout is None:
        return (None,) * 9
    x, weight, pre = ctx.saved_tensors
    need = ctx.needs_input_grad
    _refuse_second_gradient()
    dpre = dout if pre is None else _activation_backward(dout, pre, ctx.activation)
    dy = dpre.to(x.dtype)
    dx = _input_gradient(dy, weight, None, "none", False)[0] if need[0] else None
    dw = _weight_gradient(dy, x).to(weight.dtype) if need[1] else None
    db = dpre.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need[2] else None
    return dx, dw, db, dout if need[3] else None, None, None, None, None, None


def _scaled(dout: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dout times its rows' factors in a dtype, in one pass."""
    if scale is None:
        return dout.to(dtype)
    if torch.compiler.is_compiling():
        return (dout * scale[:, None]).to(dtype)
    return torch.mul(dout, scale[:, None], out=torch.empty(dout.shape, dtype=dtype, device=dout.device))


def _setup_mlp(ctx, inputs, output):
    x, w1, b1, w2, b2, residual, scale, activation, save = inputs
    ctx.save_for_backward(x, w1, w2, scale, output[1], output[2] if save == "both" else None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (b1, b2)]


def _backward_mlp(ctx, dout, *_):
    if dout is None:
        return (None,) * 9
    x, w1, w2, scale, pre, hidden = ctx.saved_tensors
    need = ctx.needs_input_grad
    _refuse_second_gradient()
    dy = _scaled(dout, scale, x.dtype)
    again = hidden is None and need[3]
    if any(need[:3]) or again:
        dpre, sums, made = _input_gradient(dy, w2, pre, ctx.activation, again)
    dx = _input_gradient(dpre, w1, None, "none", False)[0] if need[0] else None
    dw1 = _weight_gradient(dpre, x).to(w1.dtype) if need[1] else None
    db1 = sums.to(ctx.bias_dtypes[0]) if need[2] else None
    dw2 = _weight_gradient(dy, made if again else hidden).to(w2.dtype) if need[3] else None
    db2 = None
    if need[4]:
        db2 = dout.sum(0, dtype=torch.float32) if scale is None else scale @ dout.float()
        db2 = db2.to(ctx.bias_dtypes[1])
    return dx, dw1, db1, dw2, db2, dout if need[5] else None, None, None, None


register_autograd(_linear, _backward_linear, setup_context=_setup_linear)
register_autograd(_mlp, _backward_mlp, setup_context=_setup_mlp)
register_autograd(_input_gradient, no_second_gradient)
register_autograd(_weight_gradient, no_second_gradient)


def activate(value: Tensor, activation: Activation) -> Tensor:
    """The activation, by PyTorch."""
    if activation == "gelu":
        return F.gelu(value)
    return value * torch.sigmoid(1.702 * value) if activation == "quick_gelu" else value


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    column: Tensor | None, activation: Activation, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    with without_autocast(x):
        value = F.linear(x, weight.to(x.dtype)).float()
        if column is not None:
            value = rstd[:, None] * (value - mean[:, None] * column)
        value = activate(value if bias is None else value + bias.float(), activation)
        value = value if scale is None else value * scale[:, None]
    return value.to(x.dtype) if residual is None else (value + residual.float()).to(residual.dtype)


def _width(x: Tensor) -> int:
    return x.shape[-1] if x.ndim else 0


def _check(x: Tensor, name: str, weight: Tensor, bias: Tensor | None, inputs: int) -> None:
    if x.dtype not in FLOATING or weight.ndim != 2 or weight.shape[1] != inputs or not inputs:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and {name} {tuple(weight.shape)}; x must be float32, bfloat16 or float16 "
            f"(..., K), {name} (N, {inputs or 'K'})"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{name} is {weight.dtype} and x {x.dtype}; {name} must be of x's dtype or float32")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOATING):
        raise ValueError(
            f"bias of {name} is {bias.dtype} {tuple(bias.shape)}; it must be floating ({weight.shape[0]},)"
        )


def _check_residual(residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if residual is not None and (residual.shape != shape or residual.dtype not in FLOATING):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}; it must be float32, bfloat16 or float16 {shape}"
        )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "none",
    residual: Tensor | None = None, norm: DeferredNorm | None = None, statistics: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """act(x @ weight.T + bias) + residual in one pass; of LayerNorm(x) with norm.

    Args:
        x: (..., K) fp32, bf16 or fp16. The last stride is 1, or the operand is copied.
        weight: (N, K) in x's dtype, or fp32: then it is rounded to x's dtype, and its gradient comes back in fp32.
        bias: (N,) or None; added in fp32.
        activation: "none", "gelu" (exact) or "quick_gelu". The pre-activation is kept where a gradient is wanted.
        residual: (..., N) or None, fp32 or half. The result takes its dtype: an fp32 stream stays fp32.
        norm: from defer_norm, with its weight and bias. Not differentiable.
        statistics: mean and rstd, fp32 (rows,), where they are known; else with a norm one more kernel finds them.
        out: written in place and returned: contiguous, of the result's shape, dtype and device; then nothing takes a gradient.
            None: a new one.
        backend: "auto", "reference" or "triton".

    Returns:
        (..., N) in the residual's dtype, else x's. Differentiable in x, weight, bias and residual.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
    """
    _check(x, "weight", weight, bias, _width(x))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    shape = (*x.shape[:-1], weight.shape[0])
    _check_residual(residual, shape)
    one_device(x=x, weight=weight, bias=bias, residual=residual)
    if out is not None:
        check_out(out, shape, x.dtype if residual is None else residual.dtype, x, weight, bias, residual)
    rows = x.reshape(-1, x.shape[-1])
    flat = None if residual is None else residual.reshape(-1, weight.shape[0])
    wants = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, residual)
    )
    on_triton = use_triton(backend, x)
    mean, rstd, column = None, None, None
    if norm is not None:
        if wants:
            raise ValueError("a deferred LayerNorm has no gradient; pass norm=None and the LayerNorm's output as x")
        if not isinstance(norm, DeferredNorm):
            raise ValueError(f"norm is a {type(norm).__name__}; it must be the one that defer_norm gave")
        if norm.column.shape != weight.shape[:1]:
            raise ValueError(f"norm is for {norm.column.shape[0]} outputs; the weight has {weight.shape[0]}")
        column = norm.column
        mean, rstd = statistics or row_statistics(rows, norm.eps, backend=backend)
        if mean.shape != rows.shape[:1] or rstd.shape != rows.shape[:1]:
            raise ValueError(f"statistics are {tuple(mean.shape)} and {tuple(rstd.shape)}; both must be ({len(rows)},)")
    elif statistics is not None:
        raise ValueError("statistics are those of a norm; pass norm too")
    operands = (rows, weight, bias, flat, mean, rstd, column, activation)
    if not on_triton:
        result = _reference(*operands).view(shape)
        return result if out is None else out.copy_(result)
    no_forward_mode(x, weight, bias, residual)
    if out is None:
        return _linear(*operands, wants and activation != "none")[0].view(shape)
    _linear_out(out.view(len(rows), weight.shape[0]), *operands)
    return out


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: Activation = "gelu",
    residual: Tensor | None = None, branch_scale: Tensor | None = None, save: Save = "pre", backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """(act(x @ w1.T + b1) @ w2.T + b2) * branch_scale + residual. Its backward multiplies by act' in the product before it.

    Args:
        x: (..., K). w1: (H, K), w2: (N, H), each in x's dtype or fp32; b1: (H,), b2: (N,), or None.
        activation: "gelu" (exact) or "quick_gelu".
        residual: (..., N) or None; the result takes its dtype.
        branch_scale: fp32 that broadcasts to (..., 1), a factor for each row, as stochastic depth has them; or None. It has no
            gradient.
        save: for backward, "pre" keeps the pre-activation alone, and that product writes the activation again; "both" keeps
            both.
        backend: "auto", "reference" or "triton".

    Returns:
        (..., N). Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
    """
    _check(x, "w1", w1, b1, _width(x))
    _check(x, "w2", w2, b2, w1.shape[0])
    if activation not in ("gelu", "quick_gelu") or save not in ("pre", "both"):
        raise ValueError(f"activation is {activation!r} and save {save!r}; choose gelu or quick_gelu, and pre or both")
    shape = (*x.shape[:-1], w2.shape[0])
    _check_residual(residual, shape)
    rows = x.reshape(-1, x.shape[-1])
    flat = None if residual is None else residual.reshape(-1, w2.shape[0])
    one_device(x=x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual)
    scale = row_scale(branch_scale, x)
    tensors = (x, w1, b1, w2, b2, residual)
    wants = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if use_triton(backend, x):
        no_forward_mode(*tensors)
        out = _mlp(rows, w1, b1, w2, b2, flat, scale, activation, save if wants else "")[0]
    else:
        hidden = _reference(rows, w1, b1, None, None, None, None, activation)
        out = _reference(hidden, w2, b2, flat, None, None, None, "none", scale)
    return out.view(shape)


def weight_gradient(dy: Tensor, x: Tensor, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """dy.T @ x in fp32 for dy (M, N) and x (M, K) of one floating dtype; added into `out`, fp32 (N, K) contiguous, if given.

    Not differentiable. Raises ValueError for shapes or dtypes that do not fit.
    """
    if dy.ndim != 2 or x.ndim != 2 or len(dy) != len(x) or dy.dtype != x.dtype or x.dtype not in FLOATING:
        raise ValueError(
            f"dy is {dy.dtype} {tuple(dy.shape)} and x {x.dtype} {tuple(x.shape)}; they must be (M, N) and (M, K) of one "
            "floating dtype"
        )
    shape = (dy.shape[1], x.shape[1])
    one_device(x=x, dy=dy)
    dy, x = dy.detach(), x.detach()
    if out is not None:
        check_out(out, shape, torch.float32, x)
    if use_triton(backend, x):
        if out is None:
            return _weight_gradient(dy, x)
        _add_weight_gradient(out, dy, x)
        return out
    with without_autocast(x):
        result = dy.float().t() @ x.float()
    return result if out is None else out.add_(result)
