"""Which of PyTorch's attention kernels is asked, on GPUs that need not be there: never cuDNN unless it was named."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

import kernels

MODULE = importlib.import_module("kernels.attention")
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[SDPBackend]]:
    """The order in which kernels were asked, for each call."""
    orders: list[list[SDPBackend]] = []

    @contextlib.contextmanager
    def spy(order: list[SDPBackend], set_priority: bool = False):
        assert set_priority
        orders.append(order)
        yield

    monkeypatch.setattr(MODULE, "sdpa_kernel", spy)
    monkeypatch.setattr(MODULE, "_FLASH_ATTN", False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))
    return orders


def tensors(queries: int, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(2, n, 2, width, device="cuda", dtype=dtype) for n in (queries, 9, 9))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_auto_never_asks_cudnn(capability, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for queries in (1, 7):
                for options in ({}, {"key_mask": mask}, {"dropout": 0.1}, {"backend": "sdpa"}):
                    kernels.attention(*tensors(queries, dtype), **options)
    assert len(asked) == 32 and all(order == [FLASH, EFFICIENT, MATH] for order in asked)


def test_cudnn_gets_neither_masks_nor_one_query(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
        kernels.attention(*tensors(7), prefer="cudnn")
        kernels.attention(*tensors(7), backend="cudnn")
        assert asked == [[CUDNN], [CUDNN]]
        asked.clear()
        kernels.attention(*tensors(1), prefer="cudnn")
        kernels.attention(*tensors(7), key_mask=mask, prefer="cudnn")
        kernels.attention(*tensors(7), dropout=0.1, prefer="cudnn")
        assert len(asked) == 3 and not any(CUDNN in order for order in asked)
        with pytest.raises(ValueError, match="takes no mask and no single query"):
            kernels.attention(*tensors(1), key_mask=mask, backend="cudnn")
        with pytest.raises(ValueError, match="at most 128; this is 256"):
            kernels.attention(*tensors(7, width=256), backend="cudnn")


def test_a_named_kernel_is_asked_alone(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with FakeTensorMode():
        mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
        kernels.attention(*tensors(7), prefer="flash")
        kernels.attention(*tensors(7), prefer="efficient", key_mask=mask, dropout=0.1)
        assert asked == [[FLASH], [EFFICIENT]]
        with pytest.raises(ValueError, match="'flash' is not possible: it needs float16 or bfloat16"):
            kernels.attention(*tensors(7, torch.float32), backend="flash")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an old one")
        with pytest.raises(ValueError, match="needs an Ampere GPU or newer"):
            kernels.attention(*tensors(7), backend="flash")


def test_packed_attention_takes_the_packed_form_of_what_is_preferred(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    called = []
    monkeypatch.setattr(MODULE, "varlen_attn", lambda q, *_, **__: called.append("varlen") or q)
    with FakeTensorMode():
        q = torch.empty(9, 2, 16, device="cuda", dtype=torch.bfloat16)
        places = torch.empty(4, device="cuda", dtype=torch.int32)
        for prefer in ("auto", "flash", "cudnn", "xformers"):
            kernels.attention_varlen(q, q, q, places, places, 5, 5, prefer=prefer)
        assert called == ["varlen"] * 4 and not asked
        kernels.attention_varlen(q, q, q, places, places, 5, 5, prefer="efficient")
        assert len(called) == 4 and asked == [
            [FLASH, EFFICIENT, MATH]
        ]  # padded, with a mask, which flash does not take


@pytest.mark.parametrize("prefer", ["auto", "flash", "math"])
def test_preferences_compute_the_same_on_the_cpu(prefer: str) -> None:
    q, k, v = (torch.randn(2, n, 2, 16) for n in (3, 5, 5))
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    for options in ({}, {"key_mask": mask}):
        expected = kernels.attention(q, k, v, backend="math", **options)
        torch.testing.assert_close(kernels.attention(q, k, v, prefer=prefer, **options), expected)
    assert kernels.attention(q, k, v, prefer=prefer, dropout=0.5).shape == q.shape


def test_naming_a_kernel_keeps_the_graph_whole() -> None:
    q = torch.randn(2, 7, 2, 16, requires_grad=True)
    compute = lambda x: kernels.attention(x, x, x, prefer="flash")  # noqa: E731
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(q), compute(q)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), q)[0] for out in (ours, expected)))


def test_what_cannot_run_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for backend in ("auto", "flash", "math"):
        kernels.require_attention(backend, cpu, torch.float32, 32)
    for backend, why in (
        ("cudnn", "CUDA tensors"),
        ("efficient", "CUDA tensors"),
        ("xformers", "."),
        ("flash_attn", "."),
    ):
        with pytest.raises(ValueError, match=f"backend='{backend}'.*{why}"):
            kernels.require_attention(backend, cpu, torch.bfloat16, 64)

    def broken(*args: object, **options: object) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.\nand a stack")

    before = torch.get_rng_state()
    kernels.require_attention("auto", cpu, torch.float32, 8)
    assert torch.equal(torch.get_rng_state(), before), "a trial must not move the generator"
    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    with pytest.raises(ValueError, match="'flash' does not run on cpu in torch.float32: No available kernel") as caught:
        kernels.require_attention("flash", cpu, torch.float32, 8)
    assert "stack" not in str(caught.value)
    nan = lambda q, *_, **__: q * float("nan")  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", nan)
    with pytest.raises(ValueError, match="gradients that are not finite"):
        kernels.require_attention("flash", cpu, torch.float32, 8)
