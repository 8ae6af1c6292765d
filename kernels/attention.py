"""attention: one signature over the installed attention libraries, in the (B, N, H, D) layout of a fused qkv product.

    out = softmax(q k^T * scale) v, per batch entry and head

4 * B*H*Nq*Nk*D FLOPs; no road keeps the (Nq, Nk) map but "math", the definition. Roads: "flash_attn" (the flash-attn
package: CUDA, fp16 or bf16), "xformers", "sdpa" (PyTorch's fused kernels, any device), for packed sequences "varlen"
(torch.nn.attention.varlen: CUDA, fp16 or bf16), and "math". "auto" takes flash_attn where it is installed and fits, else
varlen for packed sequences where that fits, else sdpa; `attention_road` says which one that is, and so does one log line
at first use.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

log = logging.getLogger("kernels")

AttentionRoad = Literal["auto", "flash_attn", "xformers", "varlen", "sdpa", "math"]
_ROADS = ("auto", "flash_attn", "xformers", "varlen", "sdpa", "math")


@functools.cache
def _imports(name: str) -> bool:
    """Whether a library is there and its compiled part loads."""
    try:
        importlib.import_module(name)
        if name == "xformers.ops":
            # xformers imports without its compiled operators; only this tells.
            importlib.import_module("xformers._C")
        return True
    except ModuleNotFoundError:
        return False
    except Exception as error:  # a build for another torch or GPU fails in many ways
        log.warning("%s is installed but does not import, so its road is left out: %s", name, error)
        return False


# Tried here because torch.compile, which traces what asks for it, cannot follow importlib.
_FLASH_ATTN = _imports("flash_attn")


def _why_not_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps torch's packed attention from these tensors, or None."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, these are {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"it needs a head width that is a multiple of 8, at most 256; this is {head_dim}"
    # Not asked while torch.compile traces, which cannot follow it: there an older GPU fails when the kernel runs.
    if not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs an Ampere GPU or newer; {torch.cuda.get_device_name(device)} is older"
    return None


def attention_road(device: torch.device, dtype: torch.dtype, head_dim: int, *, packed: bool = False) -> str:
    """The road "auto" takes for tensors of this kind; packed: in attention_varlen."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and head_dim <= 256 and _FLASH_ATTN:
        return "flash_attn"
    return "varlen" if packed and _why_not_varlen(device, dtype, head_dim) is None else "sdpa"


@functools.cache
def _say_once(device: str, dtype: torch.dtype, road: str, packed: bool) -> None:
    kind = "packed attention" if packed else "attention"
    log.info("%s on %s in %s takes the road %s", kind, device, str(dtype).removeprefix("torch."), road)


def _choose(road: str, q: Tensor, packed: bool = False) -> str:
    if road not in _ROADS:
        raise ValueError(f"road is {road!r}; choose one of {', '.join(_ROADS)}")
    if road == "auto":
        road = attention_road(q.device, q.dtype, q.shape[-1], packed=packed)
        if not torch.compiler.is_compiling():
            _say_once(q.device.type, q.dtype, road, packed)
        return road
    if packed and road == "xformers":
        raise ValueError("road='xformers' has no packed form here; use road='auto'")
    if road in ("flash_attn", "xformers"):
        module = "flash_attn" if road == "flash_attn" else "xformers.ops"
        if not (_FLASH_ATTN if road == "flash_attn" else _imports(module)):
            raise ValueError(f"road={road!r}, but {module} does not import here; install it or use road='auto'")
        if q.device.type != "cuda":
            raise ValueError(f"road={road!r} needs CUDA tensors, these are on {q.device}")
    if road == "varlen":
        why = _why_not_varlen(q.device, q.dtype, q.shape[-1]) if packed else "it is for attention_varlen alone"
        if why is not None:
            raise ValueError(f"road='varlen' is not possible: {why}; use road='auto'")
    return road


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).to(v.dtype), v)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """PyTorch's kernels in the (B, N, H, D) layout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


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
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, softmax_scale=scale)
    if road == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale)
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    if road == "math":
        return _math(q, k, v, scale, allowed)
    return _fused(q, k, v, scale, allowed, dropout)


def _segments(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence number of each of the packed positions, computed without reading the lengths on the host."""
    places = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)


def _lengths(cu_seqlens: Tensor, total: int, longest: int, name: str) -> list[int]:
    lengths = cu_seqlens.diff().tolist()
    if int(cu_seqlens[0]) != 0 or min(lengths, default=0) < 0 or sum(lengths) != total:
        raise ValueError(f"cu_seqlens_{name} {cu_seqlens.tolist()} must rise from 0 to total_{name} = {total}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{name} is {longest}, but a sequence of cu_seqlens_{name} has {max(lengths)}")
    return lengths


def _by_length(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], scale: float) -> Tensor:
    """Sequences of equal lengths as one batch each: no padding, no mask; needs the lengths on the host."""
    parts = q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)
    groups: dict[tuple[int, int], list[int]] = {}
    for number, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(lengths, []).append(number)
    out: list[Tensor] = [q] * len(lengths_q)
    for numbers in groups.values():
        batch = _fused(*(torch.stack([part[n] for n in numbers]) for part in parts), scale)
        for n, rows in zip(numbers, batch.unbind(0), strict=True):
            out[n] = rows
    return torch.cat(out)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, scale: float
) -> Tensor:
    """Sequences padded to the longest, padding masked: nothing is read on the host."""
    count = len(cu_q) - 1
    (row_q, slot_q), (row_k, slot_k) = (
        (row, torch.arange(total, device=cu.device) - cu[row])
        for cu, total in ((cu_q, len(q)), (cu_k, len(k)))
        for row in (_segments(cu, total),)
    )

    def spread(x: Tensor, row: Tensor, slot: Tensor, longest: int) -> Tensor:
        return x.new_zeros(count, longest, *x.shape[1:]).index_put((row, slot), x)

    allowed = torch.arange(longest_k, device=cu_k.device) < cu_k.diff()[:, None]
    out = _fused(
        spread(q, row_q, slot_q, longest_q), spread(k, row_k, slot_k, longest_k), spread(v, row_k, slot_k, longest_k),
        scale, allowed[:, None, None],
    )  # fmt: skip
    return out[row_q, slot_q]


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
    """Attention within packed sequences, without a map over all of them.

    flash_attn and varlen read the packed tokens as they are. sdpa computes sequences of equal lengths together where the
    lengths are on the host (CPU tensors, eager), else it pads to the longest. math, the definition, masks the whole map.

    Args:
        q: (total_q, H, D). k, v: (total_k, H, D). Any strides with the last one 1.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1,), the running totals of the S sequence lengths, starting at 0. A sequence
            with queries needs a key.
        max_seqlen_q, max_seqlen_k: longest lengths.
        scale, road: as in attention.

    Returns:
        (total_q, H, D) in q's dtype; differentiable with respect to q, k and v.

    Raises:
        ValueError: shapes that do not fit, an unknown or impossible road; on the CPU also totals that do not fit.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (total_q, H, D), (total_k, H, D) twice, "
            f"with as many sequences in cu_seqlens_q {tuple(cu_seqlens_q.shape)} as in {tuple(cu_seqlens_k.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    road = _choose(road, q, packed=True)
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if road == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *places, softmax_scale=scale)
    if road == "varlen":
        return varlen_attn(q, k, v, *places, scale=scale)
    if road == "math":
        allowed = _segments(cu_seqlens_q, len(q))[:, None] == _segments(cu_seqlens_k, len(k))[None]
        return _math(q[None], k[None], v[None], scale, allowed)[0]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = (
            _lengths(cu_seqlens_q, len(q), max_seqlen_q, "q"), _lengths(cu_seqlens_k, len(k), max_seqlen_k, "k")
        )  # fmt: skip
        return _by_length(q, k, v, *lengths, scale)
    return _padded(q, k, v, *places, scale)
