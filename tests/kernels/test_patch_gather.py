"""patch_gather in both orders of a row, and fold_pixels, against patches cut one by one and a convolution in float64."""

import pytest
import torch
from torch import Tensor

import kernels
from tests.kernels.truth import assert_as_good_as_reference, some_visible

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))]
ORDERS = ["channels_first", "channels_last"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def patch_of(clip: Tensor, cell: Tensor, patch: int, tubelet: int, order: str) -> Tensor:
    """The row of one cell of a clip (T, H, W, 3), cut out of it."""
    rows, columns = clip.shape[1] // patch, clip.shape[2] // patch
    t, y, x = int(cell) // (rows * columns) * tubelet, int(cell) // columns % rows * patch, int(cell) % columns * patch
    cut = clip[t : t + tubelet, y : y + patch, x : x + patch]
    return (cut if order == "channels_last" else cut.permute(3, 0, 1, 2)).flatten()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("frames", "rows", "columns", "patch", "tubelet", "n"),
    [(2, 3, 3, 16, 1, 7), (4, 2, 5, 14, 2, 1), (3, 4, 2, 5, 3, 8), (1, 1, 1, 16, 1, 1), (2, 2, 2, 8, 1, 0)],
)
def test_patch_gather_uint8(frames, rows, columns, patch, tubelet, n, order, dtype) -> None:
    video = torch.randint(256, (2, frames, rows * patch, columns * patch, 3), dtype=torch.uint8, device=DEVICE)
    visible = some_visible(2, frames // tubelet * rows * columns, n)
    options = {"patch_size": patch, "tubelet_size": tubelet, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    ours, reference = (
        kernels.patch_gather(video, visible, dtype=dtype, order=order, backend=backend, **options)
        for backend in ("triton", "reference")
    )
    pixels = (video.double() / 255 - video.new_tensor((0.4, 0.5, 0.6), dtype=torch.float64)) / video.new_tensor(
        (0.2, 0.3, 0.4), dtype=torch.float64
    )
    truth = pixels.new_empty(2, n, 3 * tubelet * patch**2)
    for clip, cells, out in zip(pixels, visible, truth, strict=True):
        for cell, row in zip(cells, out, strict=True):
            row.copy_(patch_of(clip, cell, patch, tubelet, order))
    assert_as_good_as_reference(ours, reference, truth)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_patch_gather_equals_a_convolution(backend: str, order: str) -> None:
    video = torch.randn(2, 3, 4, 32, 48, device=DEVICE)
    weight = torch.randn(8, 3, 2, 16, 16, device=DEVICE)
    dense = torch.nn.functional.conv3d(video.double(), weight.double(), stride=(2, 16, 16)).flatten(2).transpose(1, 2)
    visible = some_visible(2, 12, 5)
    rows = kernels.patch_gather(video, visible, patch_size=16, tubelet_size=2, order=order, backend=backend)
    picked = dense.gather(1, visible.long()[..., None].expand(-1, -1, 8))
    weight = weight.movedim(1, -1) if order == "channels_last" else weight
    torch.testing.assert_close(rows.double() @ weight.double().flatten(1).T, picked, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_patch_gather_of_a_view(order: str) -> None:
    large = torch.randint(256, (2, 6, 40, 50, 3), dtype=torch.uint8, device=DEVICE)
    window = large[:, ::2, 4:36, 1:49]
    visible = some_visible(2, 18, 4)
    for video in (
        window,
        window.transpose(2, 3).contiguous().transpose(2, 3),
        window.flip(4)[..., ::2].repeat(1, 1, 1, 1, 2)[..., :3],
    ):
        ours = kernels.patch_gather(video, visible, patch_size=16, order=order, backend="triton")
        expected = kernels.patch_gather(video.clone(), visible, patch_size=16, order=order, backend="reference")
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_patch_gather_of_windows_equals_cutting_them_first(backend: str, kind: torch.dtype, order: str) -> None:
    video = torch.randint(256, (3, 4, 37, 45, 3), device=DEVICE).to(torch.uint8)
    origin = torch.tensor([[0, 5, 3], [0, 13, 2]], dtype=torch.int32, device=DEVICE).T
    cut = torch.stack([v[:, y : y + 32, x : x + 32] for v, (y, x) in zip(video, origin.tolist(), strict=True)])
    if kind == torch.float32:
        video, cut = (tensor.permute(0, 4, 1, 2, 3).float() for tensor in (video, cut))
    visible = some_visible(3, 8, 5)
    options = {"patch_size": 16, "tubelet_size": 2, "order": order, "backend": backend}
    ours = kernels.patch_gather(video, visible, origin=origin, crop_size=(32, 32), **options)
    assert torch.equal(ours, kernels.patch_gather(cut, visible, **options))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("patch", [4, 16])
def test_folded_pixels_equal_normalized_ones(patch: int, backend: str) -> None:
    """The embedding of pixels as they are, in fp32, is the convolution of normalized ones in float64."""
    video = torch.randint(256, (2, 4, 2 * patch, 3 * patch, 3), dtype=torch.uint8, device=DEVICE)
    weight, bias = torch.randn(8, 3, 2, patch, patch, device=DEVICE), torch.randn(8, device=DEVICE)
    mean, std = (torch.tensor(values, dtype=torch.float64, device=DEVICE) for values in (MEAN, STD))
    normal = ((video.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    dense = torch.nn.functional.conv3d(normal, weight.double(), bias.double(), stride=(2, patch, patch))
    dense = dense.flatten(2).transpose(1, 2)
    visible = some_visible(2, 12, 5)
    picked = dense.gather(1, visible.long()[..., None].expand(-1, -1, 8))
    folded = kernels.fold_pixels(weight, bias, mean=MEAN, std=STD, dtype=torch.float32)
    options = {"patch_size": patch, "tubelet_size": 2, "backend": backend} | folded.pixels
    rows = kernels.patch_gather(video, visible, **options)
    assert rows.frac().eq(0).all() and rows.max() > 80 and rows.min() < -80, "not whole numbers"
    ours = rows @ folded.weight.T + folded.bias
    assert folded.bias.dtype == torch.float32 and not folded.weight.requires_grad
    assert ((ours - picked).abs() <= 1e-5 * picked.abs().max()).all()
    # Rounded to bf16, the weight's own rounding is all that is left: the mean's part is of the rounded one.
    folded = kernels.fold_pixels(weight, None, mean=MEAN, std=STD, dtype=torch.bfloat16)
    exact = (folded.weight.double().view(8, -1, 3) * std * 255).view(8, 2, patch, patch, 3).movedim(-1, 1)
    dense = torch.nn.functional.conv3d(normal, exact, stride=(2, patch, patch)).flatten(2).transpose(1, 2)
    picked = dense.gather(1, visible.long()[..., None].expand(-1, -1, 8))
    half = kernels.patch_gather(video, visible, dtype=torch.bfloat16, **options)
    ours = half.double() @ folded.weight.double().T + folded.bias.double()
    assert torch.equal(half.float(), rows) and ((ours - picked).abs() <= 1e-5 * picked.abs().max()).all()


def test_what_fold_pixels_refuses() -> None:
    with pytest.raises(ValueError, match=r"weight is \(8, 4, 1, 2, 2\)"):
        kernels.fold_pixels(torch.ones(8, 4, 1, 2, 2), None, mean=MEAN, std=STD, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mean \(0.5,\)"):
        kernels.fold_pixels(torch.ones(8, 3, 1, 2, 2), None, mean=(0.5,), std=STD, dtype=torch.float32)
    video, seen = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="order is 'dydxc'; choose channels_first or channels_last"):
        kernels.patch_gather(video, seen, patch_size=8, order="dydxc")
