"""Kernels are launched on the GPU that holds their tensors, which need not be the current one."""

import contextlib
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kernels

# The package shows functions of these names.
PARTS = (
    "align_loss",
    "layer_norm",
    "linear.norm",
    "linear.product",
    "patch_gather",
    "quantize",
    "semantic_mask",
    "token_gather",
)
MODULES = [f"kernels.{name}" for name in PARTS]


class Spy:
    """Stands for a kernel and notes, in place of its launch, for which tensor the current device was chosen."""

    def __init__(self, name: str, chosen: list[Tensor], launched: dict[str, Tensor | None]) -> None:
        self.name, self.chosen, self.launched = name, chosen, launched

    def __getitem__(self, grid: tuple[int, ...]) -> "Spy":
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self.launched[self.name] = self.chosen[-1] if self.chosen else None
        # Said, because the default differs between triton's releases.
        assert options["enable_fp_fusion"] is self.name.startswith("align_loss"), self.name


def test_every_launch_chooses_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []
    launched: dict[str, Tensor | None] = {}

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        chosen.append(tensor)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    names = []
    for module in map(importlib.import_module, MODULES):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            names.append(name)
            monkeypatch.setattr(module, name, Spy(name, chosen, launched))
    with kernels.force_backend("triton"):
        visible = torch.zeros(1, 2, dtype=torch.int32)
        x, affine = torch.randn(1, 4, 8, requires_grad=True), torch.ones(8)
        kernels.token_gather(x, visible).sum().backward()
        kernels.gather_norm(x, visible, affine, affine)
        kernels.patch_gather(torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), visible, patch_size=8)
        kernels.semantic_mask(torch.randn(1, 2, 16), torch.randn(1, 2, 5, 16), 2, torch.tensor([1]))
        kernels.sample_visible(torch.ones(1, 4), 2, torch.tensor([1]))
        student, weight = torch.randn(1, 1, 2, 8, requires_grad=True), torch.ones(1, 8)
        kernels.align_loss(student, student.detach(), weight, weight).backward()
        kernels.layer_norm(x, affine, affine).sum().backward()
        kernels.quantize_rows(torch.ones(2, 8), "int8")
        kernels.norm_quantize(torch.ones(2, 8), affine, affine, "int8")
        kernels.dequantize_product(torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 1), affine, affine, torch.float32)
        folded = kernels.defer_norm(torch.ones(8, 8), None, affine, affine)
        kernels.linear(torch.ones(2, 8), folded[0], folded[1], norm=folded[2])
    assert len(names) == 15 and sorted(launched) == sorted(names)
    assert all(isinstance(tensor, Tensor) for tensor in launched.values()), launched


def test_a_device_without_kernels_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """As a GPU of another make would be; here one that torch imagines."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels._launch import _say_slow_once, use_triton

    class Elsewhere:
        device = torch.device("xpu")

    _say_slow_once.cache_clear()
    assert [use_triton("auto", Elsewhere()) for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "xpu" in record.getMessage() and "reference" in record.getMessage()
    caplog.clear()
    with FakeTensorMode():
        assert use_triton("auto", torch.empty(1, device="cuda")) and not use_triton("auto", torch.empty(1))
    assert not caplog.records
