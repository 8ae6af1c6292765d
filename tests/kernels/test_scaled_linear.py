"""scaled_linear: 8-bit products against float64, and their results in 8 bits against the quantizer of quantize.py."""

import pytest
import torch
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
FP8 = pytest.mark.skipif(
    not NATIVE_FP8, reason="the kernel's fp8 needs compute capability 8.9: Triton's interpreter does not round to it"
)
CASES = [("int8", "reference"), ("int8", "triton"), ("fp8", "reference"), pytest.param("fp8", "triton", marks=FP8)]
# The interpreter reads fp8; it is to round to it that it cannot.
READING = [("int8", "reference"), ("int8", "triton"), ("fp8", "reference"), ("fp8", "triton")]
EIGHT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def layer(rows: int, inputs: int, outputs: int, precision: str) -> tuple[Tensor, ...]:
    """Quantized x and weight of rows of very different sizes, and a bias."""
    x = torch.randn(rows, inputs, device=DEVICE) * torch.logspace(-2, 2, max(rows, 1), device=DEVICE)[:rows, None]
    weight = torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5
    weight *= torch.logspace(-1, 1, outputs, device=DEVICE)[:, None]
    values, scales = kernels.quantize_rows(x, precision, backend="reference")
    return values, scales, *kernels.quantize_weight(weight, precision), torch.randn(outputs, device=DEVICE)


def exact(values: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The sums by blocks, in float64."""
    total = bias.double().expand(len(values), -1).clone()
    width = values.shape[1] if scales.shape[1] == 1 else 128
    for block, scale in zip(range(0, values.shape[1], width), scales.double().T, strict=True):
        part = values[:, block : block + width].double() @ weight[:, block : block + width].double().T
        total += part * scale[:, None] * weight_scale.double()
    return total


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(37, 50, 41), (70, 300, 136), (0, 32, 8), (1, 768, 16)])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("precision", "backend"), READING)
def test_product_with_scales_bias_activation_and_residual(precision, backend, blocks, rows, inputs, outputs) -> None:
    values, scales, weight, weight_scale, bias = layer(rows, inputs, outputs, precision)
    if blocks:
        scales = scales * torch.rand(rows, -(-inputs // 128), device=DEVICE) + scales
    residual = torch.randn(rows, outputs, device=DEVICE)
    truth = exact(values, scales, weight, weight_scale, bias)
    truth = truth / (1 + torch.exp(-1.702 * truth)) + residual.double()
    ours = kernels.scaled_linear(
        values,
        scales,
        weight,
        weight_scale,
        bias,
        activation="quick_gelu",
        residual=residual,
        dtype=torch.float32,
        backend=backend,
    )
    # On a GPU the sums of fp8 keep some 14 bits.
    limit = 1e-5 if precision == "int8" or backend == "reference" else 2**-10
    sums = truth.abs().amax(1, keepdim=True) if rows else truth
    assert ours.shape == truth.shape and ((ours.double() - truth).abs() <= limit * (sums + 1)).all()


@pytest.mark.parametrize(("precision", "backend"), CASES)
@pytest.mark.parametrize("outputs", [128, 384])
def test_results_in_8_bits_are_the_quantizers(outputs: int, precision: str, backend: str) -> None:
    values, scales, weight, weight_scale, bias = layer(70, 96, outputs, precision)
    truth = exact(values, scales, weight, weight_scale, bias)
    truth = (truth * torch.special.ndtr(truth)).float()
    expected, expected_scales = kernels.quantize_rows(truth.reshape(-1, 128), precision, backend="reference")
    ours, blocks = kernels.scaled_linear(
        values, scales, weight, weight_scale, bias, activation="gelu", dtype=EIGHT[precision], backend=backend
    )
    assert ours.dtype == EIGHT[precision] and blocks.shape == (70, outputs // 128)
    rtol = 1e-5 if precision == "int8" or backend == "reference" else 2**-9
    torch.testing.assert_close(blocks.flatten(), expected_scales.flatten(), rtol=rtol, atol=0)
    if precision == "int8":
        off = (ours.flatten().int() - expected.flatten().int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3, "more than near ties"
    # Dequantized, each number is within half a step (int8), or 1/16 of itself (fp8).
    back = ours.double().view(70, -1, 128) * blocks.double()[..., None]
    step = blocks.double()[..., None] * (0.51 if precision == "int8" else 2**-9)
    relative = 0 if precision == "int8" else 0.07
    assert ((back.flatten(1) - truth).abs() <= step.expand(-1, -1, 128).flatten(1) + relative * truth.abs()).all()


@pytest.mark.parametrize(("precision", "backend"), READING)
def test_it_agrees_with_quantized_linear(precision: str, backend: str) -> None:
    values, scales, weight, weight_scale, bias = layer(37, 96, 48, precision)
    x = values.float() * scales
    expected = kernels.quantized_linear(x, weight, weight_scale, bias, backend="reference")
    again, rows = kernels.quantize_rows(x, precision, backend="reference")
    ours = kernels.scaled_linear(again, rows, weight, weight_scale, bias, dtype=torch.float32, backend=backend)
    scale = expected.abs().amax(1, keepdim=True)
    assert ((ours - expected).abs() <= (1e-5 if precision == "int8" else 2**-10) * scale).all()


@pytest.mark.parametrize(("precision", "backend"), CASES)
def test_two_layers_hand_8_bits_on(precision: str, backend: str) -> None:
    """The result of one is the operand of the next; a row that is not finite stays so, and alone."""
    values, scales, weight, weight_scale, bias = layer(20, 64, 256, precision)
    scales[3] = float("nan")
    _, _, second, second_scale, end = layer(1, 256, 24, precision)
    hidden = kernels.scaled_linear(
        values, scales, weight, weight_scale, bias, activation="quick_gelu", dtype=EIGHT[precision], backend=backend
    )
    out = kernels.scaled_linear(*hidden, second, second_scale, end, dtype=torch.float32, backend=backend)
    truth = exact(*hidden, second, second_scale, end)
    good = torch.arange(20, device=DEVICE) != 3
    assert out[good].isfinite().all() and not out[3].isfinite().any()
    limit = 1e-5 if precision == "int8" or backend == "reference" else 2**-10
    assert ((out.double() - truth).abs()[good] <= limit * (truth[good].abs().amax(1, keepdim=True) + 1)).all()


def test_the_largest_sums_do_not_overflow() -> None:
    values = torch.full((32, 4096), -127, dtype=torch.int8, device=DEVICE)
    one = torch.ones(32, 1, device=DEVICE)
    out = kernels.scaled_linear(values, one, values, one[:, 0], dtype=torch.float32, backend="triton")
    assert (out == 127 * 127 * 4096).all()
