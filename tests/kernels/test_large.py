"""Offsets beyond 2^31, in memory that takes no room until it is touched."""

import mmap

import torch
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "reference")


def zeros(count: int, dtype: torch.dtype) -> Tensor:
    if DEVICE == "cuda":
        return torch.zeros(count, dtype=dtype, device=DEVICE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def last_of_three(*shape: int, dtype: torch.dtype) -> Tensor:
    """(3, *shape) of zeros, 2^30 elements apart; an offset that wraps at 32 bits finds zeros too, before the first."""
    last = torch.empty(shape).stride()
    return zeros(2**32 + 4096, dtype).as_strided((3, *shape), (2**30, *last), 2**31)


def long_tokens(width: int) -> Tensor:
    """(1, N, width) with more than 2^31 elements, the last token not zero."""
    tokens = 2**31 // width + 1
    x = zeros(2**32 + width, torch.float16)[2**31 :].view(1, tokens, width)
    x[0, -1] = torch.randn(width)
    return x


def test_patch_gather() -> None:
    video = last_of_three(1, 16, 16, 3, dtype=torch.uint8)
    video[2] = torch.randint(1, 256, (1, 16, 16, 3))
    visible = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    ours, reference = (kernels.patch_gather(video, visible, patch_size=16, backend=backend) for backend in BACKENDS)
    assert ours[2].all() and torch.equal(ours, reference)


def test_semantic_mask() -> None:
    q, k = torch.randn(3, 1, 16, device=DEVICE).half(), last_of_three(1, 9, 16, dtype=torch.float16)
    k[2] = torch.randn(1, 9, 16)
    seed = torch.tensor([3], device=DEVICE)
    _, scores = kernels.semantic_mask(q, k, 2, seed, return_scores=True, backend="triton")
    torch.testing.assert_close(scores, kernels.class_attention(q, k), rtol=1e-2, atol=1e-3)


def test_token_gather_gather_norm_and_align_loss() -> None:
    x = long_tokens(16)
    visible = torch.tensor([[x.shape[1] - 1]], dtype=torch.int32, device=DEVICE)
    one, none = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    assert torch.equal(kernels.token_gather(x, visible, backend="triton"), x[:, -1:])
    ours, reference = (kernels.gather_norm(x, visible, one, none, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(ours, reference)
    student = torch.randn(1, 1, 1, 16, device=DEVICE, requires_grad=True)
    ours = kernels.align_loss(student, x[None], one[None], none[None], visible=visible, backend="triton")
    reference = kernels.align_loss(student, x[None, :, -1:], one[None], none[None], backend="reference")
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, reference)))


def test_quantize_rows() -> None:
    x = last_of_three(16, dtype=torch.float16)
    x[2] = torch.randn(16)
    ours, reference = (kernels.quantize_rows(x, "int8", backend=backend) for backend in BACKENDS)
    assert ours[0][2].any() and torch.equal(ours[0], reference[0])
