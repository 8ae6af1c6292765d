"""attention: one signature over the installed attention libraries, in the (B, N, H, D) layout of a fused qkv product.

    out = softmax(q k^T * scale) v, per batch entry and head

4 * B*H*Nq*Nk*D FLOPs; no road keeps the (Nq, Nk) map but "math", the definition. Roads: "flash_attn" (the flash-attn
package: CUDA, fp16 or bf16), "xformers", "sdpa" (PyTorch's fused kernels, any device) and "math". "auto" takes flash_attn
where it is installed and fits, else sdpa; `attention_road` says which one that is, and so does one log line at first use.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("kernels")

AttentionRoad = Literal["auto", "flash_attn", "xformers", "sdpa", "math"]
_ROADS = ("auto", "flash_attn", "xformers", "sdpa", "math")


@functools.cache
def _library(name: str) -> ModuleType | None:
    """The module, or None where it is missing or its compiled part does not load."""
    try:
        module = importlib.import_module(name)
        if name == "xformers.ops":
            # xformers imports without its compiled operators; only this tells.
            importlib.import_module("xformers._C")
        return module
    except (ImportError, OSError):
        return None


def attention_road(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The road "auto" takes for tensors of this kind."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and head_dim <= 256 and _library("flash_attn") is not None:
        return "flash_attn"
    return "sdpa"


@functools.cache
def _say_once(device: str, dtype: torch.dtype, road: str) -> None:
    log.info("attention on %s in %s takes the road %s", device, str(dtype).removeprefix("torch."), road)


def _choose(road: str, q: Tensor) -> str:
    if road not in _ROADS:
        raise ValueError(f"road is {road!r}; choose one of {', '.join(_ROADS)}")
    if road == "auto":
        road = attention_road(q.device, q.dtype, q.shape[-1])
        if not torch.compiler.is_compiling():
            _say_once(q.device.type, q.dtype, road)
        return road
    if road in ("flash_attn", "xformers"):
        module = "flash_attn" if road == "flash_attn" else "xformers.ops"
        if _library(module) is None:
            raise ValueError(f"road={road!r}, but {module} does not import here; install it or use road='auto'")
        if q.device.type != "cuda":
            raise ValueError(f"road={road!r} needs CUDA tensors, these are on {q.device}")
    return road


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).to(v.dtype), v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    road: AttentionRoad = "auto",
) -> Tensor:
    """Full (not causal) attention.

    Args:
        q: (B, Nq, H, D). k, v: (B, Nk, H, D). Any strides with the last one 1.
        scale: of the logits; None means D ** -0.5.
        key_mask: bool (B, Nk), False for keys nobody attends to (padding; some key of each entry must stay), or None.
        dropout: probability of dropping an attention weight. With this or a mask, "auto" takes sdpa, and of the other
            roads only math takes a mask.
        road: which library computes it; one that is missing or does not fit raises.

    Returns:
        (B, Nq, H, D) in q's dtype; differentiable with respect to q, k and v.

    Raises:
        ValueError: shapes that do not fit, an unknown or impossible road.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[0::2] != q.shape[0::2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (B, Nq, H, D), (B, Nk, H, D) twice"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = key_mask is None and dropout == 0
    road = _choose(road if plain or road != "auto" else "sdpa", q)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}; it must be bool {tuple(k.shape[:2])}")
    if not plain and road != "sdpa" and (road != "math" or dropout):
        raise ValueError(f"road={road!r} takes no mask and no dropout here; use road='sdpa' or 'auto'")
    if road == "flash_attn":
        return _library("flash_attn").flash_attn_func(q, k, v, softmax_scale=scale)
    if road == "xformers":
        return _library("xformers.ops").memory_efficient_attention(q, k, v, scale=scale)
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    if road == "math":
        return _math(q, k, v, scale, allowed)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def _segments(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence number of each of the packed positions, computed without reading the lengths on the host."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(total, device=cu_seqlens.device), right=True)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    road: AttentionRoad = "auto",
) -> Tensor:
    """Attention within packed sequences, without padding.

    Args:
        q: (total_q, H, D). k, v: (total_k, H, D).
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1,), the running totals of the S sequence lengths, starting at 0.
        max_seqlen_q, max_seqlen_k: longest lengths.
        scale, road: as in attention. Only flash_attn skips the pairs of different sequences; sdpa and math mask them.

    Returns:
        (total_q, H, D) in q's dtype.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (total_q, H, D), (total_k, H, D) twice, "
            f"with as many sequences in cu_seqlens_q {tuple(cu_seqlens_q.shape)} as in {tuple(cu_seqlens_k.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    road = _choose(road, q)
    if road == "flash_attn":
        return _library("flash_attn").flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=scale
        )
    if road == "xformers":
        raise ValueError("road='xformers' has no packed form here; use road='auto'")
    allowed = _segments(cu_seqlens_q, q.shape[0])[:, None] == _segments(cu_seqlens_k, k.shape[0])[None]
    if road == "math":
        return _math(q[None], k[None], v[None], scale, allowed)[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)[0].transpose(0, 1)
