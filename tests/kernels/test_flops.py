"""torch.utils.flop_counter counts of the kernels what it counts of PyTorch's operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X = torch.randn(2, 3, 8, device=DEVICE)
W1, W2 = torch.randn(16, 8, device=DEVICE), torch.randn(12, 16, device=DEVICE)
EIGHT = kernels.quantize_rows(X[0], "int8", backend="reference"), kernels.quantize_weight(W1, "int8")


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def backward(out: Tensor) -> None:
    out.square().sum().backward()


CASES: dict[str, tuple[Callable[[str], object], int]] = {
    "linear": (lambda b: kernels.linear(X, W1, activation="gelu", backend=b), 1),
    "linear out": (lambda b: kernels.linear(X, W1, out=X.new_empty(2, 3, 16), backend=b), 1),
    "linear backward": (lambda b: backward(kernels.linear(leaf(X), leaf(W1), backend=b)), 3),
    "mlp": (lambda b: kernels.mlp(X, W1, None, W2, None, backend=b), 1),
    "mlp backward": (lambda b: backward(kernels.mlp(leaf(X), leaf(W1), None, leaf(W2), None, backend=b)), 3),
    "weight_gradient": (lambda b: kernels.weight_gradient(X[0], X[1], backend=b), 1),
    "weight_gradient out": (lambda b: kernels.weight_gradient(X[0], X[1], out=X.new_zeros(8, 8), backend=b), 1),
    "scaled_linear": (lambda b: kernels.scaled_linear(*EIGHT[0], *EIGHT[1], backend=b), 1),
    "scaled_linear out": (
        lambda b: kernels.scaled_linear(*EIGHT[0], *EIGHT[1], out=X.new_empty(3, 16), dtype=torch.float32, backend=b),
        1,
    ),
}
PRODUCTS = {"mlp": 2 * 6 * 16 * (8 + 12), "weight_gradient": 2 * 3 * 8 * 8, "scaled_linear": 2 * 3 * 8 * 16}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_both_backends_count_alike(name: str) -> None:
    call, passes = CASES[name]
    forward = PRODUCTS.get(name.split()[0], 2 * 6 * 8 * 16)
    assert counted(lambda: call("triton")) == counted(lambda: call("reference")) == passes * forward


@pytest.mark.skipif(DEVICE != "cpu" or not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI")
def test_int8_layers_of_a_cpu_are_counted() -> None:
    first = kernels.Quantized(*kernels.quantize_weight(W1, "int8"), torch.zeros(16))
    second = kernels.Quantized(*kernels.quantize_weight(W1.T, "int8"), torch.zeros(8))
    norm = kernels.Norm(torch.ones(8), torch.zeros(8))
    assert counted(lambda: kernels.quantized_linear(X, *first)) == 2 * 6 * 8 * 16
    assert counted(lambda: kernels.quantized_mlp(X, norm, first, second, activation="gelu")) == 2 * 2 * 6 * 8 * 16
