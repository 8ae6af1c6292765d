"""Linear layers by oneDNN, and attention as batched products, against float64; which tensors take them."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import cpu_attention, library

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
BF16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX512-BF16")


@pytest.fixture
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes fp32, whoever made this CPU."""
    monkeypatch.setattr(library, "mkl_is_slow", lambda: True)


def leaves(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (24,)])
def test_library_linear_and_its_gradients(slow_mkl: None, shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(16, 24), torch.randn(16) if with_bias else None
    given, exact = leaves(x, weight, bias), leaves(x, weight, bias, dtype=torch.float64)
    out, truth = kernels.library_linear(*given), F.linear(*exact)
    assert out.shape == truth.shape and type(out.grad_fn).__name__ == "_LinearBackward"
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    truth.backward(upstream.double())
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(given, exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_library_linear_reads_any_strides(slow_mkl: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(24, 10).t(), torch.randn(24, 16).t()
    torch.testing.assert_close(kernels.library_linear(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.library_product(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
    every_other = torch.randn(10, 48)[:, ::2]
    torch.testing.assert_close(
        kernels.library_product(every_other, weight), every_other @ weight.t(), rtol=1e-5, atol=1e-5
    )


def test_what_is_not_eager_fp32_goes_to_pytorch(slow_mkl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    name = lambda out: type(out.grad_fn).__name__  # noqa: E731
    assert name(kernels.library_linear(x, weight)) == "_LinearBackward"
    assert name(kernels.library_linear(x.bfloat16(), weight.bfloat16())) != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.library_linear(x, weight)
    assert out.dtype == torch.bfloat16 and name(out) != "_LinearBackward"
    empty = kernels.library_linear(x[:0], weight)
    assert empty.shape == (0, 6)
    compiled = torch.compile(kernels.library_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    monkeypatch.setattr(library, "mkl_is_slow", lambda: False)
    assert name(kernels.library_linear(x, weight)) != "_LinearBackward"


def test_the_maker_of_the_cpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, slow in (("vendor_id : GenuineIntel", False), ("vendor_id : AuthenticAMD", True)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert library.mkl_is_slow.__wrapped__() is (slow and torch.backends.mkl.is_available())


def test_flops_are_counted(slow_mkl: None) -> None:
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        kernels.library_linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 8 * 6


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_frozen_linear(dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 17, 24).to(dtype), torch.randn(16, 24).to(dtype), torch.randn(16).to(dtype)
    act = {"none": lambda y: y, "gelu": F.gelu, "silu": F.silu}[activation]
    truth = act(F.linear(x.double(), weight.double(), bias.double()))
    step = 2 ** (-8 if dtype == torch.bfloat16 else -18)
    for rows in (x, x[:1], x.transpose(0, 1)):  # the packed weight serves any number of rows
        expected = truth[:1] if rows.shape[0] == 1 else truth.transpose(0, 1) if rows.shape[0] == 17 else truth
        got = kernels.frozen_linear(rows, weight, bias, activation=activation)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=step, atol=step * truth.abs().max().item())


def test_a_changed_weight_is_packed_again() -> None:
    x, weight = torch.randn(5, 24), torch.nn.Parameter(torch.randn(16, 24))
    with torch.no_grad():
        before = kernels.frozen_linear(x, weight)
        assert weight in library._packed_weights
        weight.mul_(2)
        torch.testing.assert_close(kernels.frozen_linear(x, weight), 2 * before)
        weight.data = weight.data * 2
        torch.testing.assert_close(kernels.frozen_linear(x, weight), 4 * before)
    kept = len(library._packed_weights)
    del weight
    assert len(library._packed_weights) < kept


def test_frozen_linear_refuses() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        kernels.frozen_linear(torch.randn(2, 4, requires_grad=True), torch.randn(3, 4))
    with pytest.raises(ValueError, match="activation is 'relu'; choose one of none, gelu, silu"):
        kernels.frozen_linear(torch.randn(2, 4), torch.randn(3, 4), activation="relu")


@pytest.mark.parametrize("kept_keys", [0, 8])
@pytest.mark.parametrize("map_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
@pytest.mark.parametrize(("queries", "keys", "heads", "width"), [(7, 7, 2, 16), (1, 9, 3, 32), (33, 5, 1, 64)])
def test_batched_attention(monkeypatch, kept_keys, map_bytes, dtype, queries, keys, heads, width) -> None:
    """Also an entry or two at a time; against the definition in the same dtype, which rounds the same way."""
    monkeypatch.setattr(cpu_attention, "_MAP_BYTES", map_bytes)
    monkeypatch.setattr(cpu_attention, "_KEPT_KEYS", kept_keys)
    torch.manual_seed(0)
    made = [torch.randn(3, n, 2 * heads, width)[:, :, ::2].to(dtype) for n in (queries, keys, keys)]
    upstream = torch.randn(3, queries, heads, width).to(dtype)
    found = {}
    for backend, kind in (("batched", dtype), ("math", dtype), ("truth", torch.float64)):
        given = leaves(*made, dtype=kind)
        out = kernels.attention(*given, scale=0.3, backend="math" if backend == "truth" else backend)
        found[backend] = (out.detach(), *torch.autograd.grad(out, given, upstream.to(kind)))
    step = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, plain, truth in zip(found["batched"], found["math"], found["truth"], strict=True):
        off, usual = ((x.double() - truth).norm() / truth.norm() for x in (ours, plain))
        assert ours.dtype == dtype and off <= 3 * usual + 1e-6 and off < step, (off, usual)


def test_auto_takes_batched_attention_for_bf16_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, module = torch.device("cpu"), importlib.import_module("kernels.attention")
    for bf16, tiles, expected in ((True, False, "batched"), (True, True, "sdpa"), (False, False, "sdpa")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert module.attention_backend(cpu, torch.bfloat16, 64) == expected
        assert module.attention_backend(cpu, torch.float32, 64) == "sdpa"
        assert module.attention_backend(cpu, torch.bfloat16, 64, packed=True) == "sdpa"
    with pytest.raises(ValueError, match="'batched' has no packed form"):
        places = torch.tensor([0, 2], dtype=torch.int32)
        kernels.attention_varlen(*torch.randn(3, 2, 1, 8).unbind(0), places, places, 2, 2, backend="batched")
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no mask"):
        kernels.attention(*torch.randn(3, 1, 2, 1, 8).unbind(0), key_mask=mask, backend="batched")
