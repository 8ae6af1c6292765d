"""A LayerNorm that follows its product: its weights folded into the product's, and the statistics of the product's rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import (
    COMPILER_OPTIONS,
    FLOATING,
    MAX_CHANNELS,
    Backend,
    on_device,
    power_of_two,
    use_triton,
    warps_for,
    without_autocast,
)
from kernels._operator import operator, register_fake
from kernels.linear.product import rows_apart


class DeferredNorm(NamedTuple):
    """A LayerNorm that follows its product, from defer_norm."""

    column: Tensor
    """fp32 (N,): the sums of the rows of gW as it is stored, so that a row's mean cancels."""
    eps: float


def defer_norm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, DeferredNorm]:
    """Weight, bias and norm for linear(x, weight, bias, norm=norm) = F.linear(LayerNorm(x), weight, bias). Once, for frozen
    weights.

    Args:
        weight: (N, K); bias: (N,) or None. gamma, beta: (K,) of the LayerNorm.
        eps: of the LayerNorm.
        dtype: of the products; the weight's own by default.

    Returns:
        (N, K) of that dtype; fp32 (N,); the norm. Detached.

    Raises:
        ValueError: shapes that do not fit.
    """
    outputs, inputs = weight.shape
    if gamma.shape != (inputs,) or beta.shape != (inputs,) or bias is not None and bias.shape != (outputs,):
        raise ValueError(
            f"gamma {tuple(gamma.shape)} and beta {tuple(beta.shape)} must be ({inputs},), a bias ({outputs},), as weight is "
            f"{tuple(weight.shape)}"
        )
    dtype = dtype or weight.dtype
    weight, gamma, beta = (tensor.detach().float() for tensor in (weight, gamma, beta))
    scaled = (weight * gamma).to(dtype)
    with without_autocast(weight):
        shift = weight @ beta if bias is None else weight @ beta + bias.detach().float()
    return scaled, shift, DeferredNorm(scaled.double().sum(1).float(), eps)


@triton.jit
def row_statistics_kernel(mean, rstd, x, x_row, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row; the two-pass formula, which does not cancel."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    value = tl.load(x + i_row * x_row + o, mask=o < K, other=0).to(tl.float32)
    center = tl.sum(value, 0) / K
    centered = tl.where(o < K, value - center, 0.0)
    tl.store(mean + i_row, center)
    tl.store(rstd + i_row, 1 / tl.sqrt(tl.sum(centered * centered, 0) / K + eps))


@operator("row_statistics")
def _row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = rows_apart(x)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.shape[0]:
        with on_device(x):
            row_statistics_kernel[(x.shape[0],)](
                mean, rstd, x, x.stride(0), eps, K=x.shape[1], BLOCK=power_of_two(x.shape[1]),
                num_warps=warps_for(x.shape[1]), **COMPILER_OPTIONS,
            )  # fmt: skip
    return mean, rstd


@register_fake(_row_statistics)
def _(x, eps):
    return tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


def row_statistics(x: Tensor, eps: float, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of the rows of x (M, K), both fp32 (M,), detached. K is at most 16384 on Triton."""
    if x.ndim != 2 or not x.shape[1] or x.dtype not in FLOATING:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be float32, bfloat16 or float16 (M, K)")
    x = x.detach()
    if use_triton(backend, x):
        if x.shape[1] > MAX_CHANNELS:
            raise ValueError(f"{x.shape[1]} channels in a row exceed the limit of {MAX_CHANNELS}; use the reference")
        return _row_statistics(x, eps)
    variance, mean = torch.var_mean(x.float(), 1, correction=0)
    return mean, (variance + eps).rsqrt()
