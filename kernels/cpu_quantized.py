"""int8 linear layers and MLPs on CPUs, by oneDNN's products of bytes; behind kernels.quantized_linear and quantized_mlp.

A block of rows goes through all its steps while it is in the cores' caches. In fp32 these are: a copy or LayerNorm, the
largest and the smallest number of each row, a product and a sum that leave the rounded number in the low byte, and the
conversion to that byte; behind the product one rescaling. PyTorch converts fp32 to unsigned bytes five times slower than int32
(EPYC with AVX512-VNNI).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels._operator import operator, register_fake
from kernels.quantize import LARGEST, TINY, largest_of_rows

# Of 3,072 numbers in fp32, that is 3 MiB a core; 128 to 512 rows measure alike (AMX, 2 MiB of L2 a core).
_ROWS_PER_THREAD = 256
# VNNI wants unsigned activations: shifted by this, which oneDNN takes off again.
_SHIFT = 128
# QuickGELU is silu(1.702 x) / 1.702: both factors go into the scales.
_QUICK = 1.702

_packed_weights = WeakTensorKeyDictionary()


def _packed(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own order, made once: weights are frozen."""
    if weight not in _packed_weights:
        _packed_weights[weight] = torch.ops.onednn.qlinear_prepack(weight, None)
    return _packed_weights[weight]


@functools.cache
def _rounding(width: int) -> Tensor:
    """(width,) of 1.5 * 2^23 + 128: what rounds a smaller number to an integer and leaves it, shifted, in the low bits."""
    # A row of them: with two operands of one number a row, the sum would not be vectorized.
    return torch.full((width,), 12582912.0 + _SHIFT)


def _linear(y: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """y @ (weight * scale).T + bias in fp32, the rows of y (n, K) quantized on the way; y's memory is used up.

    bias: (N,), or (n, N) with a residual in it.
    """
    limit = LARGEST[torch.int8]
    largest = largest_of_rows(y)
    torch.addcmul(_rounding(y.shape[1]), y, limit / largest.clamp_min(TINY), out=y)
    values, zero_points = y.view(torch.int32).to(torch.uint8), torch.zeros(scale.shape, dtype=torch.int64)
    product = torch.ops.onednn.qlinear_pointwise(
        values, 1.0, _SHIFT, _packed(weight), scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return torch.addcmul(bias, product, largest.div_(limit), out=product)


def _in_fp32(block: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> Tensor:
    """A block or its LayerNorm, in memory of its own."""
    if norm_weight is None:
        return block.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return F.layer_norm(block.float(), block.shape[1:], norm_weight.float(), norm_bias.float(), eps)


@operator("int8_linear_onednn", tags=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """kernels.quantized_linear of x (M, K), or of its LayerNorm."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    rows = _ROWS_PER_THREAD * torch.get_num_threads()
    for block, result in zip(x.split(rows), out.split(rows), strict=True) if len(x) else ():
        result.copy_(_linear(_in_fp32(block, norm_weight, norm_bias, eps), weight, scale, bias))
    return out


@register_fake(int8_linear)
def _(x, weight, scale, bias, norm_weight, norm_bias, eps):
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("int8_mlp_onednn", tags=())
def int8_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    w1: Tensor,
    s1: Tensor,
    b1: Tensor,
    w2: Tensor,
    s2: Tensor,
    b2: Tensor,
    activation: str,
) -> Tensor:
    """kernels.quantized_mlp of x (M, K)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = _ROWS_PER_THREAD * torch.get_num_threads()
    quick = activation == "quick_gelu"
    if quick:
        s1, b1, s2 = s1 * _QUICK, b1 * _QUICK, s2 / _QUICK
    for block, result in zip(x.split(rows), out.split(rows), strict=True) if len(x) else ():
        block = _in_fp32(block, None, None, 0.0)
        hidden = _linear(_in_fp32(block, norm_weight, norm_bias, eps), w1, s1, b1)
        hidden = F.silu(hidden, inplace=True) if quick else torch.ops.aten.gelu_(hidden)
        # Of half numbers and fp32 the sum would be taken one by one.
        result.copy_(_linear(hidden, w2, s2, block.add_(b2)))
    return out


@register_fake(int8_mlp)
def _(x, norm_weight, norm_bias, eps, w1, s1, b1, w2, s2, b2, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
