"""attention_qkv: self-attention of queries, keys and values as one product gives them.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2];  out = attention(q, k, v)

The gradient is one tensor too, as the product's backward pass wants it. flash-attn writes it so. Of the other backends on a GPU
the three gradients are stacked, which moves 12 bytes more for each of B*N*H*D numbers in half precision: 2.3 GB of a B/16 step
of 64 clips. cpu_attention's stay in one buffer until they are stacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import AttentionBackend, attention, say_once, taken_backend


def attention_qkv(
    qkv: Tensor, *, scale: float | None = None, backend: AttentionBackend = "auto", prefer: AttentionBackend = "auto"
) -> Tensor:
    """Full self-attention.

    Args:
        qkv: (B, N, 3, H, D), queries, keys and values; any strides with the last one 1.
        scale, backend, prefer: as in attention.

    Returns:
        (B, N, H, D) in qkv's dtype; differentiable.

    Raises:
        ValueError: as attention, or another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv is {tuple(qkv.shape)}; it must be (B, N, 3, H, D)")
    q, k, v = qkv.unbind(2)
    if taken_backend(q, backend, prefer) != "flash_attn":
        return attention(q, k, v, scale=scale, backend=backend, prefer=prefer)
    from flash_attn import flash_attn_qkvpacked_func

    say_once(q, "flash_attn", "attention")
    deterministic = torch.are_deterministic_algorithms_enabled()
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return flash_attn_qkvpacked_func(qkv, softmax_scale=scale, deterministic=deterministic)
