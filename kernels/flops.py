"""What torch.utils.flop_counter counts of the products: of operators that it does not know it counts nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Where the operators are defined.
import kernels.cpu_quantized
import kernels.linear  # noqa: F401

ops = torch.ops.umt_kernels


def _product(rows: torch.Size, matrix: torch.Size) -> int:
    """2 * M * N * K of rows (M, K) or (M, N) and a matrix (N, K)."""
    return 2 * rows[0] * matrix[0] * matrix[1]


@register_flop_formula([ops.linear, ops.input_gradient, ops.int8_linear_onednn])
def _of_rows(rows: torch.Size, matrix: torch.Size, *_: Any, **__: Any) -> int:
    return _product(rows, matrix)


@register_flop_formula(ops.linear_out)
def _of_linear_out(out: torch.Size, x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return _product(x, weight)


@register_flop_formula(ops.weight_gradient)
def _of_weight_gradient(dy: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]


@register_flop_formula(ops.add_weight_gradient)
def _of_added_gradient(out: torch.Size, dy: torch.Size, x: torch.Size, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]


@register_flop_formula(ops.mlp)
def _of_mlp(x: torch.Size, w1: torch.Size, b1: Any, w2: torch.Size, *_: Any, **__: Any) -> int:
    return _product(x, w1) + 2 * x[0] * w2[0] * w2[1]


@register_flop_formula(ops.scaled_linear)
def _of_scaled(values: torch.Size, scales: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return _product(values, weight)


@register_flop_formula(ops.scaled_linear_out)
def _of_scaled_out(
    out: torch.Size,
    out_scale: torch.Size,
    values: torch.Size,
    scales: torch.Size,
    weight: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    return _product(values, weight)


@register_flop_formula(ops.int8_mlp_onednn)
def _of_int8_mlp(
    x: torch.Size, norm_weight: Any, norm_bias: Any, eps: float, w1: torch.Size, *_: Any, **__: Any
) -> int:
    return 2 * _product(x, w1)
