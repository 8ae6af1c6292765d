"""8-bit linear layers: the bound that rounding sets, against float64, on every road that runs here."""

import importlib

import pytest
import torch

import kernels

SHAPES = [(1, 16, 16), (37, 48, 80), (130, 768, 64)]


def roads(precision: str) -> list[str]:
    """The definition, and the road this machine has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return ["reference", kernels.quantized_road(precision, device)]
    except ValueError:
        return ["reference"]


CASES = [(precision, road) for precision in ("int8", "fp8") for road in roads(precision)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device=DEVICE) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None]
    return x, torch.randn(outputs, inputs, device=DEVICE), torch.randn(outputs, device=DEVICE)


def rounding(x: torch.Tensor, precision: str) -> torch.Tensor:
    """How far each number of a row may move: half a step, or 1/16 of itself and half the smallest step."""
    largest = x.abs().amax(1, keepdim=True).double()
    if precision == "int8":
        return (largest / 127 / 2).expand_as(x) * 1.001
    return (x.abs().double() / 16 + largest / 448 * 2**-10) * 1.001


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_each_number_moves_by_its_bound_at_most(precision: str) -> None:
    x, _, _ = layer(37, 96, 16)
    values, scale = kernels.quantize_rows(x, precision)
    assert (values.float().abs().amax(1) == {"int8": 127, "fp8": 448}[precision]).all(), "the range is not used"
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= rounding(x, precision)).all()
    assert (error.amax(1) > rounding(x, precision).amax(1) / 4).all(), "finer than 8 bits: what was rounded?"


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("precision", "road"), CASES)
def test_product_within_the_bound_of_rounding(precision, road, rows, inputs, outputs) -> None:
    x, weight, bias = layer(rows, inputs, outputs)
    out = kernels.quantized_linear(x, *kernels.quantize_weight(weight, precision), bias, road=road)
    truth = x.double() @ weight.double().t() + bias.double()
    dx, dw = rounding(x, precision), rounding(weight, precision)
    bound = dx @ weight.abs().double().t() + (x.abs().double() + dx) @ dw.t()
    slack = 1e-5 * truth.abs().max(1, keepdim=True).values if road != "scaled_mm" else 2**-8 * truth.abs() + 1e-3
    assert ((out.double() - truth).abs() <= bound + slack).all()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_reference_is_its_formula_in_any_shape(precision: str) -> None:
    x, weight, bias = layer(6, 16, 8)
    (a, r), (b, c) = kernels.quantize_rows(x, precision), kernels.quantize_weight(weight, precision)
    expected = ((a.double() * r) @ (b.double() * c[:, None]).T + bias).float()
    ours = kernels.quantized_linear(x.view(2, 3, 16), b, c, bias, road="reference")
    torch.testing.assert_close(ours, expected.view(2, 3, 8))


@pytest.mark.parametrize("road", roads("int8")[1:])
def test_int8_equals_the_reference(road: str) -> None:
    x, weight, bias = layer(130, 768, 64)
    quantized = kernels.quantize_weight(weight, "int8")
    for kind in (torch.float32, torch.bfloat16):
        ours, theirs = (kernels.quantized_linear(x.to(kind), *quantized, bias, road=way) for way in (road, "reference"))
        assert ours.dtype == kind
        # Ties round up on one road and to even on the other; bf16 input has ties.
        limit = 1e-5 if kind == torch.float32 else 1e-2
        scale = theirs.abs().float().amax(1, keepdim=True)
        assert ((ours - theirs).abs() <= limit * scale).all()


@pytest.mark.parametrize("road", roads("int8"))
def test_the_largest_products_do_not_overflow(road: str) -> None:
    x, weight = torch.ones(32, 3072, device=DEVICE), torch.ones(16, 3072, device=DEVICE)
    weight[1::2] = -1
    out = kernels.quantized_linear(
        x, *kernels.quantize_weight(weight, "int8"), torch.zeros(16, device=DEVICE), road=road
    )
    torch.testing.assert_close(out, (weight * 3072)[:, 0].expand(32, -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("precision", "road"), CASES)
def test_rows_of_zeros_give_the_bias_and_bad_rows_stay_bad(precision: str, road: str) -> None:
    x, weight, bias = layer(32, 32, 16)
    x[0], x[1, 3], x[2, 4] = 0, float("nan"), float("inf")
    out = kernels.quantized_linear(x, *kernels.quantize_weight(weight, precision), bias, road=road)
    torch.testing.assert_close(out[0], bias, rtol=2**-7, atol=1e-6)
    assert not out[1:3].isfinite().any() and out[3:].isfinite().all()


@pytest.mark.parametrize("road", roads("int8")[1:])
def test_compiles_as_one_graph(road: str) -> None:
    x, weight, bias = layer(32, 32, 16)
    quantized = kernels.quantize_weight(weight, "int8")

    def twice(x: torch.Tensor) -> torch.Tensor:
        return kernels.quantized_linear(x * 2, *quantized, bias, road=road)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twice(x))
    if road == "onednn":
        torch.library.opcheck(torch.ops.umt_kernels.int8_linear_onednn.default, (x, *quantized, bias))


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias = layer(4, 16, 8)
    values, scale = kernels.quantize_weight(weight, "int8")
    with pytest.raises(ValueError, match="float32"):
        kernels.quantized_linear(x, weight, scale, bias)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        kernels.quantized_linear(x, values, scale[:7], bias)
    with pytest.raises(ValueError, match="'scaled_mm' does not fit int8|VNNI"):
        kernels.quantized_linear(x, values, scale, bias, road="scaled_mm")
    with pytest.raises(ValueError, match="has no gradient"):
        kernels.quantized_linear(x.requires_grad_(), values, scale, bias)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="fp8 has no road on cpu"):
            kernels.quantized_linear(x.detach(), *kernels.quantize_weight(weight, "fp8"), bias)


def test_a_cpu_without_vnni_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("kernels.quantized_linear"), "_CPU_MULTIPLIES_INT8", False)
    with pytest.raises(ValueError, match="VNNI"):
        kernels.quantized_road("int8", torch.device("cpu"))
