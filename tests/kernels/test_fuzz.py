"""Random shapes, types, strides and options: both backends agree with float64 truth wherever the arguments are legal."""

from collections.abc import Callable
from itertools import accumulate
from unittest import mock

import pytest
import torch
from torch import Tensor

import kernels

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FUZZ = hypothesis.settings(
    # Nearly every example is a shape of its own, which Triton compiles for seconds.
    max_examples=60 if DEVICE == "cuda" else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
small = st.integers(1, 6)


def visible_of(draw: st.DrawFn, batch: int, tokens: int) -> Tensor:
    n = draw(st.integers(0, tokens))
    rows = [torch.randperm(tokens)[:n].sort().values for _ in range(batch)]
    return torch.stack(rows).to(draw(st.sampled_from([torch.int32, torch.int64]))).to(DEVICE)


def strided(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape whose memory may have gaps or another order of axes."""
    kind = draw(st.sampled_from(["plain", "gaps", "turned"]))
    if kind == "gaps":
        return torch.randn(*shape[:-2], shape[-2] * 2, shape[-1] + 1, device=DEVICE)[..., ::2, :-1].to(dtype)
    if kind == "turned":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], device=DEVICE).to(dtype).transpose(-1, -2)
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close_to_truth(ours: Tensor, reference: Tensor, truth: Tensor, size: float | None = None) -> None:
    """At most twice the reference's own error, plus units in the last place of numbers of this size."""
    assert ours.shape == truth.shape
    if truth.numel() == 0:
        return
    floor = 8 * torch.finfo(reference.dtype).eps * (size or max(truth.abs().max().item(), 1e-3))
    allowed = 2 * (reference.double() - truth).abs().max().item() + floor
    assert (ours.double() - truth).abs().max().item() <= allowed


def tokens_of(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) of any strides and kind, and visible ones of each row."""
    batch, tokens, width, dtype = draw(small), draw(small), draw(st.integers(1, 40)), draw(DTYPES)
    return strided(draw, batch, tokens, width, dtype=dtype), visible_of(draw, batch, tokens)


@FUZZ
@hypothesis.given(st.data())
def test_token_gather(data: st.DataObject) -> None:
    draw = data.draw
    x, visible = tokens_of(draw)
    (_, tokens, width), dtype = x.shape, x.dtype
    table = strided(draw, tokens, width, dtype=torch.float32) if draw(st.booleans()) else None
    upstream = torch.randn(*visible.shape, width, device=DEVICE).to(dtype)
    results = []
    for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        rows = None if table is None else table.to(dtype).to(kind)
        out = kernels.token_gather(leaf, visible, rows, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, upstream.to(kind))))
    for ours, reference, truth in zip(*results, strict=True):
        assert_close_to_truth(ours, reference, truth)


@FUZZ
@hypothesis.given(st.data())
def test_gather_norm(data: st.DataObject) -> None:
    draw = data.draw
    x, visible = tokens_of(draw)
    dtype = x.dtype
    affine, eps = strided(draw, 2, x.shape[2], 3, dtype=torch.float32)[..., 1], draw(st.sampled_from([1e-5, 0.1]))
    ours, reference, truth = (
        kernels.gather_norm(x.to(kind or dtype), visible, *affine.to(kind or affine.dtype), eps=eps, backend=backend)
        for backend, kind in (("triton", None), ("reference", None), ("reference", torch.float64))
    )
    assert_close_to_truth(ours, reference, truth)


@FUZZ
@hypothesis.given(st.data())
def test_patch_gather(data: st.DataObject) -> None:
    draw = data.draw
    batch, frames, tubelet = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rows, columns, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 7, 14, 16]))
    height, width = rows * patch + draw(st.integers(0, 9)), columns * patch + draw(st.integers(0, 9))
    video = torch.randint(256, (batch, frames * tubelet, height, width, 3), device=DEVICE).to(torch.uint8)
    if draw(st.booleans()):
        video = video.flip(0).transpose(2, 3).contiguous().transpose(2, 3)
    tops = [[draw(st.integers(0, height - rows * patch)), draw(st.integers(0, width - columns * patch))] for _ in video]
    options = {"origin": torch.tensor(tops, device=DEVICE), "crop_size": (rows * patch, columns * patch)}
    visible = visible_of(draw, batch, frames * rows * columns)
    last = draw(st.booleans())
    options |= {"patch_size": patch, "tubelet_size": tubelet, "order": "channels_last" if last else "channels_first"}
    ours = kernels.patch_gather(video, visible, backend="triton", **options)
    cut = torch.stack(
        [clip[:, y : y + rows * patch, x : x + columns * patch] for clip, (y, x) in zip(video, tops, strict=True)]
    )
    cells = cut.view(batch, frames, tubelet, rows, patch, columns, patch, 3).permute(0, 1, 3, 5, 7, 2, 4, 6)
    cells = cells.movedim(4, -1) if last else cells
    dense = cells.reshape(batch, frames * rows * columns, -1)
    truth = dense.gather(1, visible.long()[..., None].expand(-1, -1, dense.shape[2])).float()
    assert torch.equal(ours, truth)
    assert torch.equal(kernels.patch_gather(video, visible, backend="reference", **options), truth)
    options |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "dtype": draw(DTYPES)}
    ours, reference = (
        kernels.patch_gather(video, visible, backend=backend, **options) for backend in ("triton", "reference")
    )
    mean, std = (truth.new_tensor(options[name]).double().view(-1, 1 if not last else 3) for name in ("mean", "std"))
    truth = truth.double().unflatten(2, (-1, 3) if last else (3, -1))
    truth = ((truth / 255 - mean) / std).flatten(2)
    assert_close_to_truth(ours, reference, truth)


@FUZZ
@hypothesis.given(st.data())
def test_semantic_mask(data: st.DataObject) -> None:
    draw = data.draw
    frames, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    width, dtype, n = draw(st.integers(1, 40)), draw(DTYPES), draw(st.integers(0, 40)) % (tokens + 1)
    q, k = (
        torch.randn(frames, heads, width, device=DEVICE).to(dtype),
        strided(draw, frames, heads, 1 + tokens, width, dtype=dtype),
    )
    seed = torch.tensor([draw(st.integers(0, 2**62))], device=DEVICE)
    ours, scores = kernels.semantic_mask(q, k, n, seed, return_scores=True, backend="triton")
    truth = (torch.einsum("rhd,rhjd->rhj", q.double(), k.double()) * width**-0.5).softmax(-1)[..., 1:].mean(1)
    assert_close_to_truth(scores, kernels.class_attention(q, k), truth)
    assert ours.shape == (frames, n) and (ours[:, 1:] > ours[:, :-1]).all()
    # The draw is the sampler's own, on the scores it returned.
    assert torch.equal(ours, kernels.sample_visible(scores, n, seed, backend="triton"))


@FUZZ
@hypothesis.given(st.data())
def test_align_loss(data: st.DataObject) -> None:
    draw = data.draw
    layers, batch, tokens, width = draw(st.integers(1, 3)), draw(small), draw(small), draw(st.integers(2, 40))
    dtype, visible = draw(DTYPES), visible_of(draw, batch, tokens)
    n = visible.shape[1]
    hypothesis.assume(n > 0)  # the mean of nothing is not a number
    student = strided(draw, layers, batch, n, width, dtype=dtype)
    target = strided(draw, layers, batch, tokens, width, dtype=dtype)
    weight, bias = (strided(draw, layers, width, dtype=torch.float32) for _ in range(2))
    options = {
        "visible": visible,
        "normalize": draw(st.sampled_from(["l2", "none"])),
        "loss": draw(st.sampled_from(["l2", "mse", "smooth_l1"])),
    }
    results = []
    for backend, kind in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in (student, weight, bias)]
        value = kernels.align_loss(leaves[0], target.to(kind or dtype), *leaves[1:], backend=backend, **options)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for place, (ours, reference, truth) in enumerate(zip(*results, strict=True)):
        # The loss is what is left of 2, or of a target's square.
        assert_close_to_truth(ours, reference, truth, size=max(2.0, truth.abs().item()) if place == 0 else None)


@FUZZ
@hypothesis.given(st.data())
def test_quantize_rows_and_dequantize_product(data: st.DataObject) -> None:
    draw = data.draw
    rows, width, dtype = draw(st.integers(0, 20)), draw(st.integers(1, 40)), draw(DTYPES)
    x = strided(draw, rows, width, dtype=dtype)
    (values, scale), theirs = (kernels.quantize_rows(x, "int8", backend=backend) for backend in ("triton", "reference"))
    assert torch.equal(values, theirs[0])
    torch.testing.assert_close(scale, theirs[1], rtol=2**-23, atol=0)
    product, (column, bias) = values.int() * 1001, strided(draw, 2, width, dtype=torch.float32)
    ours, reference = (
        kernels.dequantize_product(product, scale, column, bias, dtype, backend=backend)
        for backend in ("triton", "reference")
    )
    assert_close_to_truth(ours, reference, product.double() * scale.double() * column.double() + bias.double())


def assert_backends_of_attention(
    backends: list, tensors: list[Tensor], upstream: Tensor, compute: Callable[..., Tensor]
) -> None:
    """Values and gradients of compute(backend, q, k, v): every backend against the definition."""
    results = []
    for backend, kind in (*((backend, None) for backend in backends), ("math", None), ("math", torch.float64)):
        leaves = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in tensors]
        out = compute(backend, *leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))))
    *ours, reference, truth = results
    # The gradients of q and k are differences; of a single key they vanish, and what is left is the rounding of others.
    size = max((part.abs().max().item() for part in truth if part.numel()), default=1.0)
    for result in ours:
        for parts in zip(result, reference, truth, strict=True):
            assert_close_to_truth(*parts, size)


@FUZZ
@hypothesis.given(st.data())
def test_attention(data: st.DataObject) -> None:
    draw = data.draw
    batch, queries, keys, heads, width, dtype = (
        *(draw(small) for _ in range(4)),
        8 * draw(st.integers(1, 4)),
        draw(DTYPES),
    )
    tensors = [strided(draw, batch, n, heads, width, dtype=dtype) for n in (queries, keys, keys)]
    mask = torch.rand(batch, keys, device=DEVICE) < 0.5
    mask[:, draw(st.integers(0, keys - 1))] = True
    options = {"scale": draw(st.sampled_from([None, 0.3])), "key_mask": draw(st.sampled_from([None, mask]))}
    upstream = torch.randn_like(tensors[0])
    assert_backends_of_attention(
        ["sdpa"], tensors, upstream, lambda backend, *qkv: kernels.attention(*qkv, backend=backend, **options)
    )


@FUZZ
@hypothesis.given(st.data())
def test_attention_varlen(data: st.DataObject) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=5))
    heads, width, dtype = draw(small), 8 * draw(st.integers(1, 4)), draw(DTYPES)
    totals = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=DEVICE) for n in zip(*lengths, strict=True)]
    longest = [max(n) for n in zip(*lengths, strict=True)]
    tensors = [strided(draw, int(totals[i][-1]), heads, width, dtype=dtype) for i in (0, 1, 1)]
    scale = draw(st.sampled_from([None, 0.3]))

    def compute(backend: str, *qkv: Tensor) -> Tensor:
        # Padded: what sdpa does on a GPU, and in a compiled program.
        with mock.patch.object(torch.compiler, "is_compiling", lambda: backend == "padded"):
            backend = "sdpa" if backend == "padded" else backend
            return kernels.attention_varlen(*qkv, *totals, *longest, scale=scale, backend=backend)

    assert_backends_of_attention(["sdpa", "padded"], tensors, torch.randn_like(tensors[0]), compute)
