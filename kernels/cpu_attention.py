"""Attention as two batched products and a softmax: what is fastest on a CPU that multiplies bf16 without tiles (AMX).

    p = softmax(q k^T * scale),  out = p v

There PyTorch's fused kernel multiplies small blocks at a sixth of the rate that oneDNN's batched product has, and that costs
more than the map of weights does. The map is made for a few entries at a time, so that it stays in the cores' caches. Of short
sequences it is kept for the backward pass, of others made again. Logits and weights are rounded to the operands' dtype, as the
definition under autocast rounds them; the fused kernel keeps logits in fp32 (relative error 0.9% against 0.2% of unit logits
of deviation 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of one thread's maps at a time: half of a core's second-level cache is left to operands.
_MAP_BYTES = 1 << 20
# Up to so many keys for each channel of a head, a map is kept: it is then at most twice what q, k, v and the output hold.
_KEPT_KEYS = 8


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is the faster form there: bf16 on CPUs with AVX512-BF16 and no AMX, in eager code."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def _entries(q: Tensor, k: Tensor) -> int:
    """Entries of the batch whose maps are made at a time."""
    map_bytes = q.shape[1] * k.shape[1] * q.shape[2] * q.element_size()
    return max(1, _MAP_BYTES * torch.get_num_threads() // max(1, map_bytes))


def _by_head(x: Tensor) -> Tensor:
    """(b, N, H, D) -> (b * H, N, D) in the order of memory, which the product needs to be fast."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, like.shape[2], *x.shape[1:]).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    logits = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    torch.baddbmm(logits, q, k.transpose(1, 2), beta=0, alpha=scale, out=logits)
    return torch.softmax(logits, -1, out=logits)


class BatchedAttention(torch.autograd.Function):
    """(q, k, v, scale) -> out, each (B, N, H, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        count, kept = _entries(q, k), []
        keep = any(ctx.needs_input_grad) and k.shape[1] <= _KEPT_KEYS * q.shape[3]
        for *parts, result in zip(*(x.split(count) for x in (q, k, v, out)), strict=True):
            queries, keys, values = map(_by_head, parts)
            weights = _weights(queries, keys, scale)
            result.copy_(_by_token(torch.bmm(weights, values), result))
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.count = scale, count
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        if q.shape == k.shape:  # one buffer, as the product that made them wants their gradient
            made = torch.empty(*q.shape[:2], 3, *q.shape[2:], dtype=q.dtype)
            grads = made.unbind(2)
        else:
            grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        groups = zip(*(x.split(ctx.count) for x in (q, k, v, grad, *grads)), strict=True)
        for number, (*parts, dq, dk, dv) in enumerate(groups):
            queries, keys, values, upstream = map(_by_head, parts)
            weights = kept[number] if kept else _weights(queries, keys, ctx.scale)
            dv.copy_(_by_token(torch.bmm(weights.transpose(1, 2), upstream), dv))
            slope = torch.bmm(upstream, values.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
            made = torch.baddbmm(dq.new_empty(queries.shape), slope, keys, beta=0, alpha=ctx.scale)
            dq.copy_(_by_token(made, dq))
            made = torch.baddbmm(dk.new_empty(keys.shape), slope.transpose(1, 2), queries, beta=0, alpha=ctx.scale)
            dk.copy_(_by_token(made, dk))
        return *grads, None
