"""semantic_mask: from the class token's query and the keys of the teacher's last block straight to visible indices.

    score[r, j] = mean_h softmax_j(q[r, h] . k[r, h, j] / sqrt(D)),  j = 0 the class token, dropped and not renormalized
    visible[r]  = n tokens drawn successively without replacement with probability proportional to score, ascending

(paper section 3.1, semantic masking). Successive draws equal taking the n largest log(score) + Gumbel noise, so no draw
depends on another. The keys are read once: 155 MB of bf16 at B/16, batch 64, where the full attention map of the last
block would be written and read besides. 2 * R*H*(1+L)*D FLOPs.

The noise comes from a counter-based generator keyed by `seed`, a tensor on the device: both backends see the same numbers,
and a CUDA graph replays with fresh noise when the seed tensor is advanced. Tokens whose score is zero or NaN are kept only
when fewer than n scores are positive, and then uniformly; of equal keys the lower index wins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _philox
from kernels._launch import (
    COMPILER_OPTIONS,
    FLOATING,
    Backend,
    both,
    check_out,
    interpreted,
    on_device,
    one_device,
    power_of_two,
    use_triton,
    without_autocast,
)
from kernels._operator import operator, register_fake

# Below any log of a positive fp32 number plus its noise, so that impossible tokens come last.
_IMPOSSIBLE = tl.constexpr(-1000.0)
# Bytes of keys in one tile of semantic_mask, and in all tiles that are being loaded. Two programs then fit an SM of an A100,
# and one fits the 99 KiB of a consumer GPU.
_TILE_BYTES, _WAY_BYTES = 32768, 65536
# Tokens of a row that one program can hold: in semantic_mask the keys beside their logits, in sample_visible scores alone.
MAX_TOKENS, MAX_SCORES = 1024, 4096
# The smallest step of the generator: keeps the logarithm of a drawn zero finite.
_SMALLEST = tl.constexpr(2.0**-32)


@triton.jit
def _keep_largest(out, score, seed, i_row, L, n, BLOCK: tl.constexpr):
    """Writes the n indices with the largest noisy log score, ascending. score: (BLOCK,) fp32."""
    o = tl.arange(0, BLOCK)
    # 32-bit offsets: with 64-bit ones tl.rand is another generator.
    u = tl.maximum(tl.rand(tl.load(seed), (i_row * L + o).to(tl.int32)), _SMALLEST)
    log_score = tl.where(score > 0, tl.log(tl.where(score > 0, score, 1.0)), _IMPOSSIBLE)
    key = log_score - tl.log(-tl.log(u))
    # An order-preserving integer: the float's bits made monotonic, then the index so that the lower one wins a tie.
    bits = key.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    packed = ordered * 4294967296 + (BLOCK - 1 - o)
    packed = tl.where(o < L, packed, -9223372036854775807)
    descending = tl.sort(packed, descending=True)
    threshold = tl.max(tl.where(o == n - 1, descending, -9223372036854775807), 0)
    kept = packed >= threshold
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    # The keys are unique, so exactly n are kept, but for n = 0, where the threshold has nothing to be.
    tl.store(out + i_row * n + place, o, mask=kept & (place < n))


@triton.jit
def semantic_mask_kernel(
    out,
    score_out,
    q,
    k,
    seed,
    scale,
    L,
    n,
    q_row,
    q_head,
    k_row,
    k_head,
    k_token,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    RETURN: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program per frame: all heads' softmax rows are summed in registers, then sampled.

    The logits are a matrix product with one useful row of 16. The wasted products are free (the tensor cores idle anyway);
    what they buy is that the next heads' keys travel to shared memory while this head is reduced.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    first = tl.arange(0, 16) == 0
    score = tl.zeros((BLOCK,), tl.float32)
    for i_head in tl.range(HEADS, num_stages=STAGES):
        p_q = q + i_row * q_row + i_head * q_head
        p_k = k + i_row * k_row + i_head * k_head
        # Token 0 is the class token: read apart, so that the patch tokens start at a power of two.
        class_logit = 0.0
        product = tl.zeros((16, BLOCK), tl.float32)
        for i_d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            o_d = i_d + tl.arange(0, BLOCK_D)
            inside_d = o_d < D
            b_q = tl.load(p_q + o_d, mask=inside_d, other=0)
            b_class = tl.load(p_k + o_d, mask=inside_d, other=0)
            class_logit += tl.sum(b_q.to(tl.float32) * b_class.to(tl.float32), 0)
            inside = inside_d[:, None] & (o < L)[None, :]
            b_k = tl.load(p_k + (o[None, :] + 1) * k_token + o_d[:, None], mask=inside, other=0)
            if UPCAST:  # the interpreter cannot multiply bf16 matrices; in fp32 the products are the same
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            rows = tl.where(first[:, None], b_q[None, :], tl.zeros((16, BLOCK_D), b_q.dtype))
            product = tl.dot(rows, b_k, product, input_precision="ieee")
        logit = tl.sum(tl.where(first[:, None], product, 0.0), 0) * scale
        logit = tl.where(o < L, logit, float("-inf"))
        class_logit *= scale
        top = tl.maximum(tl.max(logit, 0), class_logit)
        weight = tl.exp(logit - top)
        score += weight / (tl.sum(weight, 0) + tl.exp(class_logit - top))
    score = score / HEADS
    if RETURN:
        tl.store(score_out + i_row * L + o, score, mask=o < L)
    _keep_largest(out, score, seed, i_row, L, n, BLOCK)


@triton.jit
def sample_visible_kernel(out, score, seed, L, n, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    b_score = tl.load(score + i_row * L + o, mask=o < L, other=0)
    _keep_largest(out, b_score, seed, i_row, L, n, BLOCK)


def tiling(tokens: int, width: int, element_bytes: int) -> dict[str, int]:
    """Block sizes, pipeline stages and warps of semantic_mask for L tokens and heads of `width` channels."""
    block = max(16, power_of_two(tokens))
    channels = min(max(16, power_of_two(width)), max(16, _TILE_BYTES // (block * element_bytes)))
    # Heads that fit one tile are pipelined head by head, larger ones tile by tile, in fewer stages to save registers. fp32
    # heads beyond what may be on the way are loaded where they are multiplied: their copies would spill.
    head = -(-width // channels) * block * channels * element_bytes
    stages = max(1 if element_bytes > 2 else 2, 1 + min(2, _WAY_BYTES // head))
    return {"BLOCK": block, "BLOCK_D": channels, "STAGES": stages, "num_warps": 8 if block <= 256 else 16}


def _semantic_mask_into(out: Tensor, scores: Tensor, q: Tensor, k: Tensor, seed: Tensor) -> None:
    """scores: (0,) where they are not wanted."""
    rows, heads, width = q.shape
    tokens, num_visible, with_scores = k.shape[2] - 1, out.shape[1], scores.ndim == 2
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    if out.numel() or scores.numel():
        with on_device(out):
            semantic_mask_kernel[(rows,)](
                out,
                scores,
                q,
                k,
                seed,
                width**-0.5,
                tokens,
                num_visible,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                k.stride(1),
                k.stride(2),
                HEADS=heads,
                D=width,
                RETURN=with_scores,
                UPCAST=interpreted(),
                **tiling(tokens, width, k.element_size()),
                **COMPILER_OPTIONS,
            )


_semantic_mask_out = operator("semantic_mask_out", mutates_args=("out", "scores"))(_semantic_mask_into)


@operator("semantic_mask")
def _semantic_mask(q: Tensor, k: Tensor, num_visible: int, seed: Tensor, with_scores: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape[0], num_visible, dtype=torch.int32, device=q.device)
    shape = (q.shape[0], k.shape[2] - 1) if with_scores else (0,)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    _semantic_mask_into(out, scores, q, k, seed)
    return out, scores


@register_fake(_semantic_mask)
def _(q, k, num_visible, seed, with_scores):
    rows, tokens = q.shape[0], k.shape[2] - 1
    out = q.new_empty(rows, num_visible, dtype=torch.int32)
    return out, q.new_empty((rows, tokens) if with_scores else (0,), dtype=torch.float32)


def _sample_visible_into(out: Tensor, scores: Tensor, seed: Tensor) -> None:
    (rows, tokens), num_visible = scores.shape, out.shape[1]
    if out.numel():
        with on_device(out):
            sample_visible_kernel[(rows,)](
                out,
                scores.contiguous(),
                seed,
                tokens,
                num_visible,
                BLOCK=power_of_two(tokens),
                num_warps=4,
                **COMPILER_OPTIONS,
            )


_sample_visible_out = operator("sample_visible_out", mutates_args=("out",))(_sample_visible_into)


@operator("sample_visible")
def _sample_visible(scores: Tensor, num_visible: int, seed: Tensor) -> Tensor:
    out = torch.empty(scores.shape[0], num_visible, dtype=torch.int32, device=scores.device)
    _sample_visible_into(out, scores, seed)
    return out


@register_fake(_sample_visible)
def _(scores, num_visible, seed):
    return scores.new_empty(scores.shape[0], num_visible, dtype=torch.int32)


def _sample_reference(scores: Tensor, num_visible: int, seed: Tensor) -> Tensor:
    u = _philox.uniform(seed, scores.numel()).view(scores.shape).clamp_min(_SMALLEST.value)
    possible = scores > 0
    log_score = torch.where(possible, torch.where(possible, scores, 1.0).log(), _IMPOSSIBLE.value)
    key = log_score - (-u.log()).log()
    kept = key.sort(dim=1, descending=True, stable=True).indices[:, :num_visible]
    return kept.sort(1).values.to(torch.int32)


def _check_attention(q: Tensor, k: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[2] or k.shape[2] < 2:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (R, H, D) and (R, H, 1 + L, D)")
    if q.dtype not in (*FLOATING, torch.float64) or k.dtype != q.dtype or not q.shape[1] * q.shape[2]:
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)} and k {k.dtype}; both must be of one floating dtype, with a head and a channel"
        )
    one_device(q=q, k=k)


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """The scores alone, (R, L) fp32: class-token attention averaged over heads, class column dropped.

    q: (R, H, D), k: (R, H, 1 + L, D). Plain PyTorch; softmax in fp32.
    """
    _check_attention(q, k)
    with without_autocast(q):
        logits = torch.einsum("rhd,rhjd->rhj", q * q.shape[-1] ** -0.5, k)
    return logits.float().softmax(-1)[..., 1:].mean(1)


def _check(num_visible: int, tokens: int, most: int, seed: Tensor) -> None:
    if not 0 <= num_visible <= tokens:
        raise ValueError(f"num_visible is {num_visible}; it must lie in [0, {tokens}], the number of tokens")
    if tokens > most:
        raise ValueError(f"{tokens} tokens in a row exceed the limit of {most}; draw over fewer of them at a time")
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed is {seed!r}; it must be an int64 tensor with one element, on the device of the others")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed is {seed.dtype} with {seed.numel()} elements; it must be int64 with one")


def semantic_mask(
    q: Tensor,
    k: Tensor,
    num_visible: int,
    seed: Tensor,
    *,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws the visible tokens of each frame from the class token's attention.

    Args:
        q: (R, H, D) class-token queries, R frames; any strides.
        k: (R, H, 1 + L, D) keys, the class token's first; any strides.
        num_visible: n, how many of the L tokens stay visible.
        seed: int64 (1,) on the same device.
        return_scores: also return the scores (R, L) fp32, detached; class_attention's have a gradient.
        out: written in place and returned: contiguous int32 (R, n) on q's device; with return_scores that and contiguous fp32
            (R, L). None: new ones.
        backend: "auto", "reference" or "triton".

    Returns:
        int32 (R, n), ascending in each row.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, n outside [0, L], L over 1024.
    """
    _check_attention(q, k)
    _check(num_visible, k.shape[2] - 1, MAX_TOKENS, seed)
    one_device(q=q, seed=seed)
    if q.dtype == torch.float64 and use_triton(backend, q):
        raise ValueError("q is torch.float64; the kernel computes in float32; use backend='reference'")
    q, k = q.detach(), k.detach()
    if out is not None:
        return _semantic_mask_given(both(out) if return_scores else (out,), q, k, num_visible, seed, backend)
    if use_triton(backend, q):
        visible, scores = _semantic_mask(q, k, num_visible, seed, return_scores)
    else:
        scores = class_attention(q, k)
        visible = _sample_reference(scores, num_visible, seed)
    return (visible, scores) if return_scores else visible


def _semantic_mask_given(
    out: tuple[Tensor, ...], q: Tensor, k: Tensor, num_visible: int, seed: Tensor, backend: Backend
) -> Tensor | tuple[Tensor, ...]:
    check_out(out[0], (len(q), num_visible), torch.int32, q)
    for scores in out[1:]:
        check_out(scores, (len(q), k.shape[2] - 1), torch.float32, q, name="out of the scores")
    if use_triton(backend, q):
        _semantic_mask_out(out[0], out[1] if out[1:] else q.new_empty(0, dtype=torch.float32), q, k, seed)
    else:
        found = class_attention(q, k)
        out[0].copy_(_sample_reference(found, num_visible, seed))
        for scores in out[1:]:
            scores.copy_(found)
    return out if out[1:] else out[0]


def sample_visible(
    scores: Tensor, num_visible: int, seed: Tensor, backend: Backend = "auto", *, out: Tensor | None = None
) -> Tensor:
    """Draws n tokens per row without replacement, with probabilities proportional to the scores.

    Args:
        scores: fp32 (R, L), not negative; rows need not sum to one.
        num_visible, seed, backend: as in semantic_mask.
        out: written in place and returned: contiguous int32 (R, n) on the scores' device. None: a new one.

    Returns:
        int32 (R, n), ascending in each row.

    Raises:
        ValueError: scores of another kind, n outside [0, L], L over 4096.
    """
    if scores.ndim != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores are {scores.dtype} {tuple(scores.shape)}; they must be float32 (R, L)")
    _check(num_visible, scores.shape[1], MAX_SCORES, seed)
    one_device(scores=scores, seed=seed)
    scores = scores.detach()
    if out is not None:
        check_out(out, (len(scores), num_visible), torch.int32, scores)
    if not use_triton(backend, scores):
        visible = _sample_reference(scores, num_visible, seed)
        return visible if out is None else out.copy_(visible)
    if out is None:
        return _sample_visible(scores, num_visible, seed)
    _sample_visible_out(out, scores, seed)
    return out
