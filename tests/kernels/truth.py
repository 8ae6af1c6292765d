"""How close to float64 a result must be, and indices to ask for."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_as_good_as_reference(
    ours: Tensor, reference: Tensor, truth: Tensor, computed_in: torch.dtype = torch.float32
) -> None:
    """The limit is relative to plain PyTorch in the same dtype: the kernel's error against float64 may be at most twice the
    reference's own error, plus a floor of four units in the last place of the dtype at the size of the result. The reference
    itself may be off by 64 units: what both backends share, constants above all, must be right too.
    """
    assert ours.shape == truth.shape and not ours.isnan().any()
    if truth.numel() == 0:
        return
    scale = truth.abs().max().item()
    # A few units: sums over a row are ordered differently on the two backends.
    floor = 4 * torch.finfo(reference.dtype).eps * max(scale, 1e-3)
    error = (ours.double() - truth).abs().max().item()
    own = (reference.double() - truth).abs().max().item()
    limit = 16 * floor * max(1, torch.finfo(computed_in).eps / torch.finfo(reference.dtype).eps)
    assert own <= limit, f"the reference's error {own:.3e} exceeds {limit:.3e}"
    assert error <= 2 * own + floor, f"error {error:.3e} exceeds {2 * own + floor:.3e}"


def some_visible(batch: int, tokens: int, n: int) -> Tensor:
    """int32 (batch, n), of strides that only .contiguous() makes plain."""
    visible = torch.zeros(n, batch, dtype=torch.int32, device=DEVICE).T
    for row in visible:
        row.copy_(torch.randperm(tokens)[:n].sort().values)
    return visible
