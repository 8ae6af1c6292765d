"""attention: one signature over the installed attention libraries, in the (B, N, H, D) layout of a fused qkv product.

    out = softmax(q k^T * scale) v, per batch entry and head

4 * B*H*Nq*Nk*D FLOPs; no backend keeps the (Nq, Nk) map but "math", the definition. Backends: "flash_attn" (the flash-attn
package: CUDA, fp16 or bf16), "xformers", "sdpa" (PyTorch's fused kernels, any device) or one of those by name ("flash",
"efficient", "cudnn"), for packed sequences "varlen" (torch.nn.attention.varlen: CUDA, fp16 or bf16), "batched" (two batched
products, for CPUs) and "math". "auto" takes flash_attn where it is installed and fits, else varlen for packed sequences where
that fits, batched for bf16 on CPUs where it is the fastest (cpu_attention.py), else sdpa; `attention_backend` says which
one that is, and so does one log line at first use, with the kernel that sdpa chose.

On a GPU sdpa asks for flash, then efficient (masks, fp32, GPUs before Ampere), then math. cuDNN is not asked on any
architecture, though on Hopper it may well be the fastest: releases that we support give NaN gradients with masks and with
one query (pytorch issue 196678, cudnn-frontend issue 1072). Where it is named, it gets neither.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from kernels import cpu_attention
from kernels._launch import autocasts, one_device

log = logging.getLogger("kernels")

AttentionBackend = Literal[
    "auto", "flash", "efficient", "cudnn", "flash_attn", "xformers", "varlen", "sdpa", "batched", "math"
]
_BACKENDS = ("auto", "flash", "efficient", "cudnn", "flash_attn", "xformers", "varlen", "sdpa", "batched", "math")
# PyTorch's kernels in the order in which they are asked on a GPU, for each backend that ends there.
_ORDER = {
    "sdpa": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
}
# What keeps a backend from some calls, by what is special about them; `prefer` then takes auto.
_NEVER_WITH = {
    "flash": {"mask"},
    "cudnn": {"mask", "dropout", "single query"},
    "flash_attn": {"mask", "dropout"},
    "xformers": {"mask", "dropout"},
    "varlen": {"mask", "dropout"},
    "batched": {"mask", "dropout"},
    "math": {"dropout"},
}
_PACKED = {"flash": "varlen", "efficient": "sdpa", "sdpa": "sdpa", "math": "math", "flash_attn": "flash_attn"}


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
        log.warning("%s is installed but does not import, so its backend is left out: %s", name, error)
        return False


# Tried here because torch.compile, which traces what asks for it, cannot follow importlib.
_FLASH_ATTN = _imports("flash_attn")


def _why_not_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, largest: int = 256) -> str | None:
    """What keeps torch's packed attention, or another kernel for half precision, from these tensors, or None."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, these are {str(dtype).removeprefix('torch.')}"
    if head_dim > largest or head_dim % 8:
        return f"it needs a head width that is a multiple of 8, at most {largest}; this is {head_dim}"
    # Not asked while torch.compile traces, which cannot follow it: there an older GPU fails when the kernel runs.
    if not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs an Ampere GPU or newer; {torch.cuda.get_device_name(device)} is older"
    return None


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int, *, packed: bool = False) -> str:
    """The backend "auto" takes for tensors of this kind; packed: in attention_varlen."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and head_dim <= 256 and _FLASH_ATTN:
        return "flash_attn"
    if not packed and cpu_attention.fits(device, dtype):
        return "batched"
    return "varlen" if packed and _why_not_varlen(device, dtype, head_dim) is None else "sdpa"


def _why_not_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps one of PyTorch's kernels, named as a backend, from these tensors, or None."""
    if backend == "flash" and device.type == "cpu":
        return None
    if backend == "efficient":
        kinds = (torch.float16, torch.bfloat16, torch.float32)
        if device.type == "cuda" and dtype not in kinds:
            return f"it needs float16, bfloat16 or float32, these are {str(dtype).removeprefix('torch.')}"
        return None if device.type == "cuda" else f"it needs CUDA tensors, these are on {device}"
    return _why_not_varlen(device, dtype, head_dim, 128 if backend == "cudnn" else 256)


_said: set[tuple[str, torch.dtype, str, str]] = set()


def say_once(q: Tensor, backend: str, kind: str, kernel: Callable[[], int] | None = None) -> None:
    """One line for each device, dtype, kind of call and backend. kernel: which SDPBackend PyTorch chooses."""
    line = (q.device.type, q.dtype, kind, backend)
    # Fake tensors, of another type, are on no device.
    if torch.compiler.is_compiling() or type(q.detach()) is not Tensor or line in _said:
        return
    _said.add(line)
    chosen = "" if kernel is None else SDPBackend(kernel()).name.lower().removesuffix("_attention")
    said = f", PyTorch's kernel {chosen}" if chosen else ""
    log.info(
        "%s on %s in %s takes the backend %s%s", kind, *line[:1], str(q.dtype).removeprefix("torch."), backend, said
    )
    if chosen == "math" and q.device.type == "cuda" and q.dtype != torch.float64:
        log.warning("WARNING: none of PyTorch's fused kernels takes this %s; it keeps a whole map of weights", kind)


def _special(key_mask: Tensor | None, dropout: float, queries: int) -> list[str]:
    """What some backends do not take, of this call."""
    found = {"mask": key_mask is not None, "dropout": dropout > 0, "single query": queries == 1}
    return [name for name, there in found.items() if there]


def _preferred(prefer: str, special: list[str], device: torch.device) -> str:
    """The backend `prefer` where it takes such a call, else auto."""
    if prefer not in _BACKENDS:
        raise ValueError(f"prefer is {prefer!r}; choose one of {', '.join(_BACKENDS)}")
    # On the CPU PyTorch's flash kernel takes no dropout.
    never = {"mask", "dropout"} if prefer == "flash" and device.type == "cpu" else _NEVER_WITH.get(prefer, set())
    return "auto" if never & set(special) else prefer


def _choose(backend: str, q: Tensor, packed: bool = False) -> str:
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(_BACKENDS)}")
    if backend == "auto":
        return attention_backend(q.device, q.dtype, q.shape[-1], packed=packed)
    if backend == "batched" and q.device.type != "cpu":
        raise ValueError(f"backend='batched' needs CPU tensors, these are on {q.device}; use backend='auto'")
    if packed and backend in ("xformers", "flash", "efficient", "cudnn", "batched"):
        raise ValueError(f"backend={backend!r} has no packed form here; use backend='auto'")
    if backend in ("flash", "efficient", "cudnn"):
        why = _why_not_kernel(backend, q.device, q.dtype, q.shape[-1])
        if why is not None:
            raise ValueError(f"backend={backend!r} is not possible: {why}; use backend='auto'")
    if backend in ("flash_attn", "xformers"):
        module = "flash_attn" if backend == "flash_attn" else "xformers.ops"
        # xformers is looked for in eager calls alone, for the same reason.
        if not (_FLASH_ATTN if backend == "flash_attn" else torch.compiler.is_compiling() or _imports(module)):
            raise ValueError(
                f"backend={backend!r}, but {module} does not import here; install it or use backend='auto'"
            )
        if q.device.type != "cuda":
            raise ValueError(f"backend={backend!r} needs CUDA tensors, these are on {q.device}")
    if backend == "varlen":
        why = _why_not_varlen(q.device, q.dtype, q.shape[-1]) if packed else "it is for attention_varlen alone"
        if why is not None:
            raise ValueError(f"backend='varlen' is not possible: {why}; use backend='auto'")
    return backend


def taken_backend(q: Tensor, backend: str, prefer: str) -> str:
    """The backend of a call without mask and dropout; raises ValueError where it is impossible."""
    special = _special(None, 0.0, q.shape[1])
    return _choose(_preferred(prefer, special, q.device) if backend == "auto" else backend, q)


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).to(v.dtype), v)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "sdpa",
    kind: str = "attention",
) -> Tensor:
    """PyTorch's kernels in the (B, N, H, D) layout, asked in the order of a backend."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # On the CPU torch has the one order, and cuDNN is not in it.
    explicit = q.device.type == "cuda" or backend != "sdpa"
    with sdpa_kernel(_ORDER[backend], set_priority=True) if explicit else contextlib.nullcontext():
        say_once(q, backend, kind, lambda: torch._fused_sdp_choice(q, k, v, allowed, dropout, False, scale=scale))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def _check_kinds(q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> None:
    one_device(q=q, k=k, v=v, **others)
    kind = q.device.type
    # Autocast gives them one dtype.
    alike = q.dtype == k.dtype == v.dtype or autocasts(kind)
    if not alike or not all(x.is_floating_point() for x in (q, k, v)):
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; all must be of one floating dtype")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: AttentionBackend = "auto",
    prefer: AttentionBackend = "auto",
) -> Tensor:
    """Full (not causal) attention.

    Args:
        q: (B, Nq, H, D). k, v: (B, Nk, H, D). Any strides with the last one 1.
        scale: of the logits; None means D ** -0.5.
        key_mask: bool (B, Nk), False for keys nobody attends to (padding; some key of each entry must stay), or None.
        dropout: probability of dropping an attention weight. With this or a mask, "auto" takes sdpa; of the other backends
            efficient takes both, math a mask, flash dropout (on a GPU).
        backend: which library computes it; one that is missing or does not fit raises.
        prefer: as backend, for calls that may have a mask, dropout or one query: where the backend does not take those, auto.

    Returns:
        (B, Nq, H, D) in q's dtype; differentiable with respect to q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown or impossible backend.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[0::2] != q.shape[0::2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (B, Nq, H, D), (B, Nk, H, D) twice"
        )
    _check_kinds(q, k, v, key_mask=key_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    special = _special(key_mask, dropout, q.shape[1])
    plain = key_mask is None and dropout == 0
    backend = _preferred(prefer, special, q.device) if backend == "auto" else backend
    backend = _choose(backend if plain or backend != "auto" else "sdpa", q)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}; it must be bool {tuple(k.shape[:2])}")
    if backend != "sdpa" and _preferred(backend, special, q.device) != backend:
        never = " and no ".join(name for name in special if name != "single query" or backend == "cudnn")
        raise ValueError(f"backend={backend!r} takes no {never} here; use backend='sdpa' or 'auto'")
    kind = "attention" + (f" with {' and '.join(special)}" if special else "")
    if backend in ("flash_attn", "xformers", "batched", "math"):
        say_once(q, backend, kind)
    if backend == "batched" and q.numel() and k.numel():
        return cpu_attention.BatchedAttention.apply(q, k, v, scale)
    if backend == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled())
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale)
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    if backend in ("math", "batched"):  # the latter with nothing to compute
        return _math(q, k, v, scale, allowed)
    return _fused(q, k, v, scale, allowed, dropout, backend, kind)


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
        batch = _fused(*(torch.stack([part[n] for n in numbers]) for part in parts), scale, kind="packed attention")
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
        spread(q, row_q, slot_q, longest_q),
        spread(k, row_k, slot_k, longest_k),
        spread(v, row_k, slot_k, longest_k),
        scale,
        allowed[:, None, None],
        kind="packed attention",
    )
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
    backend: AttentionBackend = "auto",
    prefer: AttentionBackend = "auto",
) -> Tensor:
    """Attention within packed sequences, without a map over all of them.

    flash_attn and varlen read the packed tokens as they are. sdpa computes sequences of equal lengths together where the
    lengths are on the host (CPU tensors, eager), else it pads to the longest. math, the definition, masks the whole map.

    Args:
        q: (total_q, H, D). k, v: (total_k, H, D). Any strides with the last one 1.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1,), the running totals of the S sequence lengths, starting at 0. A sequence
            with queries needs a key.
        max_seqlen_q, max_seqlen_k: longest lengths.
        scale, backend: as in attention.
        prefer: as in attention; flash is varlen here, efficient the padded form, and cudnn and xformers have none.

    Returns:
        (total_q, H, D) in q's dtype; differentiable with respect to q, k and v.

    Raises:
        ValueError: shapes that do not fit, an unknown or impossible backend; on the CPU also totals that do not fit.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (total_q, H, D), (total_k, H, D) twice, "
            f"with as many sequences in cu_seqlens_q {tuple(cu_seqlens_q.shape)} as in {tuple(cu_seqlens_k.shape)}"
        )
    _check_kinds(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if {cu_seqlens_q.dtype, cu_seqlens_k.dtype} - {torch.int32, torch.int64} or len(cu_seqlens_q) < 2:
        raise ValueError(
            f"cu_seqlens are {cu_seqlens_q.dtype} {tuple(cu_seqlens_q.shape)} and {cu_seqlens_k.dtype}; both must be int32 "
            "(S + 1,), of at least one sequence"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        if prefer not in _BACKENDS:
            raise ValueError(f"prefer is {prefer!r}; choose one of {', '.join(_BACKENDS)}")
        backend = _PACKED.get(prefer, "auto")
        if backend == "varlen" and _why_not_varlen(q.device, q.dtype, q.shape[-1]) is not None:
            backend = "sdpa"
    backend = _choose(backend, q, packed=True)
    if backend != "sdpa":
        say_once(q, backend, "packed attention")
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        exact = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(q, k, v, *places, softmax_scale=scale, deterministic=exact)
    if backend == "varlen":
        return varlen_attn(q, k, v, *places, scale=scale)
    if backend == "math":
        allowed = _segments(cu_seqlens_q, len(q))[:, None] == _segments(cu_seqlens_k, len(k))[None]
        return _math(q[None], k[None], v[None], scale, allowed)[0]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = (_lengths(cu_seqlens_q, len(q), max_seqlen_q, "q"), _lengths(cu_seqlens_k, len(k), max_seqlen_k, "k"))
        return _by_length(q, k, v, *lengths, scale)
    return _padded(q, k, v, *places, scale)


def require_attention(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Computes attention on a backend forward and backward once, small, so that what cannot work fails before a run does.

    The log then names the kernels that auto takes without and with a mask, also where all later calls are compiled.

    Raises:
        ValueError: the backend is missing, does not fit these tensors, or fails when it runs.
    """
    every = torch.ones(1, 16, device=device, dtype=torch.bool)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        q = torch.randn(1, 16, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            for mask in (None, every):
                attention(q, q, q, key_mask=mask, prefer=backend).sum().backward()
        if not torch.isfinite(q.grad).all():
            raise ValueError(f"backend={backend!r} gives gradients that are not finite on {device}; use backend='auto'")
    except RuntimeError as error:  # no kernel, or one that this GPU does not run
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"backend={backend!r} does not run on {device} in {dtype}: {first}; use backend='auto'"
        ) from error
