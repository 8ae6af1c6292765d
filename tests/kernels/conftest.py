"""Memory that shows what a kernel forgot to write, or wrote past the end."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN (or a large integer), so that an element never written shows.

    What it and torch.zeros give has more memory behind its end, checked after the test: a store without its mask shows.
    """
    # Torch lists its constructors once, for torch.device(...) blocks; it must not find ours among them.
    _device_constructors()
    plain_empty, plain_like, margins = torch.empty, torch.empty_like, []

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    @torch.no_grad()
    def guarded(tensor: Tensor, zero: bool = False) -> Tensor:
        if type(tensor) is not Tensor or tensor.is_meta or not tensor.is_contiguous():  # fake tensors have no memory
            return tensor.zero_() if zero else poison(tensor)
        memory = poison(plain_empty(tensor.numel() + 4096, dtype=tensor.dtype, device=tensor.device))
        margins.append(memory[tensor.numel() :])
        tensor.set_(memory.untyped_storage(), 0, tensor.shape, tensor.stride())
        return tensor.zero_() if zero else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: guarded(plain_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: guarded(plain_like(*args, **kwargs)))
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: guarded(plain_empty(*args, **kwargs), zero=True))
    torch.manual_seed(0)
    yield
    for margin in margins:
        untouched = margin.float().isnan() if margin.is_floating_point() else margin == torch.iinfo(margin.dtype).max
        assert untouched.all(), "written past the end of a tensor"
