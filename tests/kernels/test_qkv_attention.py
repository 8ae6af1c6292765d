"""attention_qkv is attention of its three parts, by whichever library; flash-attn gets and gives one tensor."""

import importlib
import sys
import types

import pytest
import torch
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math", "flash_attn"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_attention_of_its_parts(backend: str, scale: float | None) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if backend == "flash_attn" else torch.float32
    rows = torch.randn(2, 7, 4, 2, 16, device=DEVICE).to(dtype)
    upstream = torch.randn(2, 7, 2, 16, device=DEVICE)
    found = []
    for one in (True, False):
        leaf = rows.clone().requires_grad_()
        qkv = leaf[:, :, 1:]  # not contiguous
        try:
            out = (
                kernels.attention_qkv(qkv, scale=scale, backend=backend)
                if one
                else kernels.attention(*qkv.unbind(2), scale=scale, backend="math")
            )
        except ValueError as error:
            pytest.skip(str(error))
        found.append((out.detach(), *torch.autograd.grad(out, leaf, upstream.to(dtype))))
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, **close)


def test_flash_attn_takes_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a library of the same signature: it is asked once, with the tensor itself, and its gradient is not stacked."""
    module, asked = importlib.import_module("kernels.qkv_attention"), []

    def whole(
        qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, *, deterministic: bool = False
    ) -> Tensor:
        asked.append((qkv, softmax_scale, deterministic))
        return kernels.attention(*qkv.unbind(2), scale=softmax_scale, backend="math")

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_qkvpacked_func=whole))
    monkeypatch.setattr(module, "taken_backend", lambda q, backend, prefer: "flash_attn")
    qkv = torch.randn(1, 5, 3, 2, 8)
    out = kernels.attention_qkv(qkv)
    torch.testing.assert_close(out, kernels.attention(*qkv.unbind(2), backend="math"))
    assert [(given is qkv, scale, exact) for given, scale, exact in asked] == [(True, 8**-0.5, False)]


def test_what_does_not_fit_is_refused() -> None:
    for shape in ((1, 5, 2, 2, 8), (1, 5, 3, 8)):
        with pytest.raises(ValueError, match=r"must be \(B, N, 3, H, D\)"):
            kernels.attention_qkv(torch.randn(shape))
    with pytest.raises(ValueError, match="prefer is 'quick'"):
        kernels.attention_qkv(torch.randn(1, 5, 3, 2, 8), prefer="quick")
    with pytest.raises(ValueError, match="'flash_attn'"):
        kernels.attention_qkv(torch.randn(1, 5, 3, 2, 8), backend="flash_attn")
