"""Random shapes, types, strides and options: both roads agree with float64 truth wherever the arguments are legal."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FUZZ = settings(
    # Nearly every example is a shape of its own, which Triton compiles for seconds.
    max_examples=60 if DEVICE == "cuda" else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
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


def assert_close_to_truth(ours: Tensor, reference: Tensor, truth: Tensor) -> None:
    """At most twice the reference's own error, plus units in the last place."""
    assert ours.shape == truth.shape
    if truth.numel() == 0:
        return
    floor = 8 * torch.finfo(reference.dtype).eps * max(truth.abs().max().item(), 1e-3)
    allowed = 2 * (reference.double() - truth).abs().max().item() + floor
    assert (ours.double() - truth).abs().max().item() <= allowed


@FUZZ
@given(st.data())
def test_token_gather(data: st.DataObject) -> None:
    draw = data.draw
    batch, tokens, width, dtype = draw(small), draw(small), draw(st.integers(1, 40)), draw(DTYPES)
    x, visible = strided(draw, batch, tokens, width, dtype=dtype), visible_of(draw, batch, tokens)
    table = torch.randn(tokens, width, device=DEVICE) if draw(st.booleans()) else None
    upstream = torch.randn(*visible.shape, width, device=DEVICE).to(dtype)
    results = []
    for road, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        rows = None if table is None else table.to(dtype).to(kind)
        out = kernels.token_gather(leaf, visible, rows, road=road)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, upstream.to(kind))))
    for ours, reference, truth in zip(*results, strict=True):
        assert_close_to_truth(ours, reference, truth)


@FUZZ
@given(st.data())
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
    options |= {"patch_size": patch, "tubelet_size": tubelet}
    ours = kernels.patch_gather(video, visible, road="triton", **options)
    cut = torch.stack(
        [clip[:, y : y + rows * patch, x : x + columns * patch] for clip, (y, x) in zip(video, tops, strict=True)]
    )
    cells = cut.view(batch, frames, tubelet, rows, patch, columns, patch, 3).permute(0, 1, 3, 5, 7, 2, 4, 6)
    dense = cells.reshape(batch, frames * rows * columns, -1)
    truth = dense.gather(1, visible.long()[..., None].expand(-1, -1, dense.shape[2])).float()
    assert torch.equal(ours, truth)
    assert torch.equal(kernels.patch_gather(video, visible, road="reference", **options), truth)


@FUZZ
@given(st.data())
def test_semantic_mask(data: st.DataObject) -> None:
    draw = data.draw
    frames, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    width, dtype, n = draw(st.integers(1, 40)), draw(DTYPES), draw(st.integers(0, 40)) % (tokens + 1)
    q, k = (
        torch.randn(frames, heads, width, device=DEVICE).to(dtype),
        strided(draw, frames, heads, 1 + tokens, width, dtype=dtype),
    )
    seed = torch.tensor([draw(st.integers(0, 2**62))], device=DEVICE)
    ours, scores = kernels.semantic_mask(q, k, n, seed, return_scores=True, road="triton")
    truth = (torch.einsum("rhd,rhjd->rhj", q.double(), k.double()) * width**-0.5).softmax(-1)[..., 1:].mean(1)
    assert_close_to_truth(scores, kernels.class_attention(q, k), truth)
    assert ours.shape == (frames, n) and (ours[:, 1:] > ours[:, :-1]).all()
    # The draw is the sampler's own, on the scores it returned.
    assert torch.equal(ours, kernels.sample_visible(scores, n, seed, road="triton"))


@FUZZ
@given(st.data())
def test_align_loss(data: st.DataObject) -> None:
    draw = data.draw
    layers, batch, tokens, width = draw(st.integers(1, 3)), draw(small), draw(small), draw(st.integers(2, 40))
    dtype, visible = draw(DTYPES), visible_of(draw, batch, tokens)
    n = visible.shape[1]
    assume(n > 0)  # the mean of nothing is not a number
    student = torch.randn(layers, batch, n, width, device=DEVICE).to(dtype)
    target = strided(draw, layers, batch, tokens, width, dtype=dtype)
    weight, bias = torch.rand(layers, width, device=DEVICE) + 0.5, torch.randn(layers, width, device=DEVICE)
    options = {
        "visible": visible,
        "normalize": draw(st.sampled_from(["l2", "none"])),
        "loss": draw(st.sampled_from(["l2", "mse", "smooth_l1"])),
    }
    results = []
    for road, kind in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in (student, weight, bias)]
        value = kernels.align_loss(leaves[0], target.to(kind or dtype), *leaves[1:], road=road, **options)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for ours, reference, truth in zip(*results, strict=True):
        assert_close_to_truth(ours, reference, truth)
