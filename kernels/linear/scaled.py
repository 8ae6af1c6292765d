"""scaled_linear: products of 8-bit numbers with their scales, bias, activation and residual, out again in 8 bits if wanted.

    value[m, n] = c[n] * sum_k (r[m, block of k] * a[m, k]) * b[n, k] + bias[n],  out = act(value) + residual

a and r are quantize_rows' (one scale a row), or another scaled_linear's (one a row and 128 columns); b and c are
quantize_weight's. int8 products are summed exactly in int32, over the row or the block, fp8 ones in fp32. 2*M*N*K
operations; M*K + N*K bytes are read and M*N (8 bits) or 2*M*N (bf16) written. Apart, the int32 product alone takes 8*M*N,
its rescaling 2*M*N, the activation 4*M*N and quantizing again 3*M*N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._launch import FLOATING, Backend, both, check_out, one_device, use_triton
from kernels._operator import operator, register_fake
from kernels.linear.layers import Activation, _check_residual, activate
from kernels.linear.product import ACTIVATIONS, SCALE_BLOCK, product
from kernels.quantize import DTYPES, quantize_rows


def _scaled_linear_into(
    out: Tensor,
    out_scale: Tensor,
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """out_scale: of no columns where the result is no 8-bit one."""
    fp8 = torch.float8_e4m3fn in (weight.dtype, out.dtype)
    if fp8 and values.is_cuda and torch.cuda.get_device_capability(values.device) < (8, 9):
        raise ValueError(f"{values.device} has no fp8, which needs compute capability 8.9; use backend='reference'")
    product(
        out,
        values,
        weight,
        kind=ACTIVATIONS[activation],
        a_scale=scales.contiguous(),
        b_scale=weight_scale.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        residual=residual,
        out_scale=out_scale if out_scale.shape[1] else None,
    )


_scaled_linear_out = operator("scaled_linear_out", mutates_args=("out", "out_scale"))(_scaled_linear_into)


def _shapes(values: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the result and of its scales."""
    rows, outputs = values.shape[0], weight.shape[0]
    return (rows, outputs), (rows, outputs // SCALE_BLOCK if dtype in DTYPES.values() else 0)


@operator("scaled_linear")
def _scaled_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape, scale_shape = _shapes(values, weight, dtype)
    out = torch.empty(shape, dtype=dtype, device=values.device)
    out_scale = torch.empty(scale_shape, dtype=torch.float32, device=values.device)
    _scaled_linear_into(out, out_scale, values, scales, weight, weight_scale, bias, residual, activation)
    return out, out_scale


@register_fake(_scaled_linear)
def _(values, scales, weight, weight_scale, bias, residual, activation, dtype):
    shape, scale_shape = _shapes(values, weight, dtype)
    return values.new_empty(shape, dtype=dtype), values.new_empty(scale_shape, dtype=torch.float32)


def _reference(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    depth = values.shape[1] if scales.shape[1] == 1 else SCALE_BLOCK
    real = values.double() * scales.double().repeat_interleave(depth, 1)[:, : values.shape[1]]
    value = ((real @ weight.double().t()) * weight_scale).float()
    value = activate(value if bias is None else value + bias.float(), activation)
    value = value if residual is None else value + residual.float()
    if dtype not in DTYPES.values():
        return value.to(dtype), value.new_empty(len(value), 0)
    precision = "int8" if dtype == torch.int8 else "fp8"
    blocks, block_scales = quantize_rows(value.reshape(-1, SCALE_BLOCK), precision, backend="reference")
    return blocks.view(value.shape), block_scales.view(len(value), -1)


def scaled_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """act((values * scales) @ (weight * weight_scale).T + bias) + residual, for frozen layers.

    Args:
        values: (M, K) int8 or float8_e4m3fn. scales: fp32 (M, 1), or (M, ceil(K / 128)), one for each 128 of a row.
        weight: (N, K) of the same dtype; weight_scale: fp32 (N,).
        bias: (N,) or None.
        activation: "none", "gelu" or "quick_gelu".
        residual: (M, N), floating, or None.
        dtype: of the result: float32, bfloat16 or float16, or int8 or float8_e4m3fn, for which N is a multiple of 128.
        out: what is returned, written in place: contiguous, of the result's shape, dtype and device; for 8 bits that and its
            scales. None: a new one.
        backend: "auto", "reference" or "triton"; fp8 on the latter needs compute capability 8.9.

    Returns:
        (M, N), or in 8 bits (M, N) and its scales, fp32 (M, N / 128): what a next scaled_linear takes. No gradient.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or a GPU without fp8.
    """
    if values.ndim != 2 or weight.ndim != 2 or values.shape[1] != weight.shape[1] or not values.shape[1]:
        raise ValueError(f"values {tuple(values.shape)} and weight {tuple(weight.shape)} must be (M, K) and (N, K)")
    if values.dtype not in DTYPES.values() or weight.dtype != values.dtype:
        raise ValueError(f"values are {values.dtype}, weight {weight.dtype}; both must be int8, or float8_e4m3fn")
    (rows, inputs), outputs = values.shape, weight.shape[0]
    blocks = -(-inputs // SCALE_BLOCK)
    if scales.shape not in ((rows, 1), (rows, blocks)) or weight_scale.shape != (outputs,):
        raise ValueError(
            f"scales {tuple(scales.shape)} and weight_scale {tuple(weight_scale.shape)} must be ({rows}, 1) or "
            f"({rows}, {blocks}), and ({outputs},)"
        )
    if {scales.dtype, weight_scale.dtype} != {torch.float32}:
        raise ValueError(f"scales are {scales.dtype}, weight_scale {weight_scale.dtype}; both must be float32")
    if bias is not None and (bias.shape != (outputs,) or bias.dtype not in FLOATING):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; it must be floating ({outputs},)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    eight = dtype in DTYPES.values()
    if not eight and dtype not in FLOATING:
        raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16, float16, int8 or float8_e4m3fn")
    if eight and outputs % SCALE_BLOCK:
        raise ValueError(f"{outputs} outputs in {dtype} are not a multiple of {SCALE_BLOCK}, the columns of a scale")
    _check_residual(residual, (rows, outputs))
    one_device(values=values, scales=scales, weight=weight, weight_scale=weight_scale, bias=bias, residual=residual)
    taken = use_triton(backend, values)
    given = (None if tensor is None else tensor.detach() for tensor in (bias, residual))
    operands = (values, scales.detach(), weight, weight_scale.detach(), *given, activation)
    if out is None:
        made = (_scaled_linear if taken else _reference)(*operands, dtype)
        return made if eight else made[0]
    shape, scale_shape = _shapes(values, weight, dtype)
    result, result_scale = both(out) if eight else (out, values.new_empty(scale_shape, dtype=torch.float32))
    check_out(result, shape, dtype, values)
    check_out(result_scale, scale_shape, torch.float32, values, name="out of the scales")
    if taken:
        _scaled_linear_out(result, result_scale, *operands)
    else:
        for given, part in zip((result, result_scale), _reference(*operands, dtype), strict=True):
            given.copy_(part)
    return (result, result_scale) if eight else result
