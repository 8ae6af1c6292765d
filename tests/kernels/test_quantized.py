"""8-bit linear layers and their two kernels: the bound that rounding sets, against float64, on every backend that runs here."""

import importlib

import pytest
import torch

import kernels
from kernels.quantize import MAX_CHANNELS, tile
from tests.kernels.truth import assert_as_good_as_reference

SHAPES = [(1, 16, 16), (37, 48, 80), (130, 768, 64)]
DTYPES = [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))]
NATIVE_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
FP8 = pytest.mark.skipif(
    not NATIVE_FP8, reason="the kernel's fp8 needs compute capability 8.9: Triton's interpreter does not round to it"
)
KERNEL_PRECISIONS = ["int8", pytest.param("fp8", marks=FP8)]
BACKENDS = [("int8", "reference"), ("int8", "triton"), ("fp8", "reference"), pytest.param("fp8", "triton", marks=FP8)]


def backends(precision: str) -> list[str]:
    """The definition, and the backend this machine has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return ["reference", kernels.quantized_backend(precision, device)]
    except ValueError:
        return ["reference"]


CASES = [(precision, backend) for precision in ("int8", "fp8") for backend in backends(precision)]
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


@pytest.mark.parametrize(("precision", "backend"), BACKENDS)
def test_each_number_moves_by_its_bound_at_most(precision: str, backend: str) -> None:
    x, _, _ = layer(37, 96, 16)
    values, scale = kernels.quantize_rows(x, precision, backend=backend)
    assert (values.float().abs().amax(1) == {"int8": 127, "fp8": 448}[precision]).all(), "the range is not used"
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= rounding(x, precision)).all()
    assert (error.amax(1) > rounding(x, precision).amax(1) / 4).all(), "finer than 8 bits: what was rounded?"


def assert_same_rows(x: torch.Tensor, precision: str) -> None:
    """Both backends give the same bits."""
    ours, theirs = (kernels.quantize_rows(x, precision, backend=backend) for backend in ("triton", "reference"))
    assert ours[0].shape == x.shape and ours[0].dtype == theirs[0].dtype and ours[1].shape == (x.shape[0], 1)
    assert torch.equal(ours[0].view(torch.uint8), theirs[0].view(torch.uint8))
    # CUDA divides by a constant as it multiplies by its reciprocal, which can change the last bit.
    torch.testing.assert_close(ours[1], theirs[1], rtol=0 if DEVICE == "cpu" else 2**-23, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", KERNEL_PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (4, 5), (7, 48), (5, 768), (3, 3000), (2, 8192), (0, 16)])
def test_the_kernel_quantizes_as_the_reference(rows, width, precision, dtype) -> None:
    x = torch.randn(rows, width, device=DEVICE) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None]
    assert_same_rows(x.to(dtype), precision)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("precision", KERNEL_PRECISIONS)
def test_the_kernel_quantizes_views(precision: str) -> None:
    x = torch.randn(9, 70, device=DEVICE)
    for view in (x[::2], x[:, 3:40], x[:, ::2], x.T, x[2].expand(4, -1), x[:, :1], x[3:, 60:]):
        assert_same_rows(view, precision)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("precision", "backend"), BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (4, 5), (7, 48), (5, 768), (2, 3000), (0, 16)])
def test_norm_quantize_rounds_the_exact_norm(rows, width, precision, backend, dtype) -> None:
    """Each number within its bound of a LayerNorm in float64, far from zero mean, of rows that lie apart."""
    x = (torch.randn(rows, 2, width + 1, device=DEVICE) * 3 + 20).to(dtype)[:, 1, :width]
    weight, bias = (torch.randn(width, 2, device=DEVICE) * torch.tensor([1.0, 5.0], device=DEVICE)).T
    values, scale = kernels.norm_quantize(x, weight, bias, precision, eps=0.1, backend=backend)
    centered = x.double() - x.double().mean(1, keepdim=True)
    truth = centered / (centered.square().mean(1, keepdim=True) + 0.1).sqrt() * weight.double() + bias.double()
    assert values.shape == x.shape and scale.shape == (rows, 1) and scale.dtype == torch.float32
    largest = truth.abs().amax(1, keepdim=True)
    limit = {"int8": 127, "fp8": 448}[precision]
    # Statistics in fp32 of numbers near 20: some units of 2^-24 * 20 / 3.
    torch.testing.assert_close(scale.double(), largest / limit, rtol=1e-5, atol=1e-5)
    error = (values.double() * scale.double() - truth).abs()
    assert (error <= rounding(truth, precision) + 2e-5 * (1 + largest)).all()
    if rows and width > 40:
        assert (error.amax(1) > rounding(truth, precision).amax(1) / 4).all(), "finer than 8 bits: what was rounded?"


@pytest.mark.usefixtures("poisoned_memory")
def test_norm_quantize_is_the_quantizer_of_gather_norm() -> None:
    x, weight, bias = torch.randn(9, 70, device=DEVICE).T, *torch.randn(2, 9, device=DEVICE)
    x[3, 4] = float("nan")
    normed = kernels.gather_norm(x[None], None, weight, bias, backend="triton")[0]
    expected = kernels.quantize_rows(normed, "int8", backend="triton")
    ours = kernels.norm_quantize(x, weight, bias, "int8", backend="triton")
    good = torch.arange(70) != 3
    assert torch.equal(ours[0][good], expected[0][good]) and torch.equal(ours[1][good], expected[1][good])
    assert not ours[1][3].isfinite().any() and ours[1][good].isfinite().all()
    torch.library.opcheck(torch.ops.umt_kernels.norm_quantize.default, (x[good], weight, bias, 1e-5, "int8"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("precision", "backend"), BACKENDS)
def test_rows_that_are_zero_tiny_or_not_finite(precision: str, backend: str) -> None:
    x = torch.randn(7, 20, device=DEVICE)
    x[0], x[1], x[2] = 0, x[1] * 1e-31, x[2] * 1e-37
    x[3, 4], x[4, 5], x[5, 19] = float("nan"), float("-inf"), -float("nan")
    values, scale = kernels.quantize_rows(x, precision, backend=backend)
    assert not values[0].float().any() and scale[0] == 0
    # Below 1e-30 a row is scaled as if that were its largest number.
    scaled = x[1:3].double() * {"int8": 127, "fp8": 448}[precision] / 1e-30
    bound = 0.5 if precision == "int8" else (scaled.abs() / 16).clamp_min(2**-10)
    assert ((values[1:3].double() - scaled).abs() <= 1.001 * bound).all()
    assert values[1].float().any() and not scale[3:6].isfinite().any() and scale[[0, 1, 2, 6]].isfinite().all()
    if backend == "triton":
        assert_same_rows(x[[0, 1, 2, 6]], precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_halves_go_to_the_even_number(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[127, 0.5, 1.5, 2.5, 124.5, -0.5, -1.5, -2.5, -125.5, -127]], device=DEVICE).to(dtype)
    values, scale = kernels.quantize_rows(x, "int8", backend=backend)
    assert values.tolist() == [[127, 0, 2, 2, 124, 0, -2, -2, -126, -127]] and scale.item() == 1


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 5), (300, 7), (37, 80), (9, 300), (16, 256), (5, 513), (0, 4), (4, 0)]
)
def test_dequantize_product(rows, columns, dtype) -> None:
    # As large as sums of 4096 products of bytes.
    product = torch.randint(-(2**26), 2**26, (columns, rows), dtype=torch.int32, device=DEVICE).T
    row = (torch.rand(rows, 2, device=DEVICE) / 2**20)[:, :1]
    column, bias = (torch.randn(columns, 2, device=DEVICE) * torch.tensor([1.0, 30.0], device=DEVICE)).T
    ours, reference = (
        kernels.dequantize_product(product, row, column, bias, dtype, backend=backend)
        for backend in ("triton", "reference")
    )
    truth = product.double() * row.double() * column.double() + bias.double()
    assert ours.dtype == reference.dtype == dtype
    assert_as_good_as_reference(ours, reference, truth)


def test_both_kernels_around_an_int8_product() -> None:
    """The backend that only CUDA takes by itself."""
    cublas = importlib.import_module("kernels.quantized_linear")._cublas
    x, weight, bias = layer(130, 768, 64)
    quantized = kernels.quantize_weight(weight, "int8")
    with kernels.force_backend("triton"):
        ours = cublas(x, *quantized, bias)
    torch.testing.assert_close(ours, kernels.quantized_linear(x, *quantized, bias, backend="reference"))


def test_the_fp8_product_takes_scales_and_bias() -> None:
    """Another backend that only CUDA takes by itself; newer versions of torch multiply so on a CPU too."""
    backend = importlib.import_module("kernels.quantized_linear")._scaled_mm
    x, weight, bias = layer(32, 48, 16)
    quantized = kernels.quantize_weight(weight, "fp8")
    try:
        with kernels.force_backend("reference"):
            ours = backend(x, *quantized, 100 * bias)
    except RuntimeError as error:
        pytest.skip(f"no fp8 product with scales per row on {DEVICE} in torch {torch.__version__}: {error}")
    reference = kernels.quantized_linear(x, *quantized, 100 * bias, backend="reference")
    assert ours.dtype == x.dtype
    # Bias and result are rounded to bf16; on a GPU sums keep some 14 bits.
    sums = reference.abs().amax(1, keepdim=True)
    assert ((ours - reference).abs() <= 2**-8 * (reference.abs() + 100 * bias.abs()) + 2**-10 * sums).all()


def test_tiles_and_operators() -> None:
    assert [tile(n) for n in (1, 200, 768)] == [{"ROWS": 2048 // n, "BLOCK": n} for n in (1, 256, 256)]
    x, product = torch.randn(5, 40, device=DEVICE), torch.ones(5, 9, dtype=torch.int32, device=DEVICE)
    scales = torch.rand(5, 1, device=DEVICE), *torch.randn(2, 9, device=DEVICE)
    ops = torch.ops.umt_kernels
    torch.library.opcheck(ops.quantize_rows.default, (x[:, ::2], "int8"))
    torch.library.opcheck(ops.dequantize_product.default, (product, *scales, torch.bfloat16))

    def both(x: torch.Tensor) -> torch.Tensor:
        values, rows = kernels.quantize_rows(x * 2, "int8", backend="triton")
        return kernels.dequantize_product(values.int(), rows, x[0], x[1], x.dtype, backend="triton")

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("precision", "backend"), CASES)
def test_product_within_the_bound_of_rounding(precision, backend, rows, inputs, outputs) -> None:
    x, weight, bias = layer(rows, inputs, outputs)
    out = kernels.quantized_linear(x, *kernels.quantize_weight(weight, precision), bias, backend=backend)
    truth = x.double() @ weight.double().t() + bias.double()
    dx, dw = rounding(x, precision), rounding(weight, precision)
    bound = dx @ weight.abs().double().t() + (x.abs().double() + dx) @ dw.t()
    slack = 1e-5 * truth.abs().max(1, keepdim=True).values if backend != "scaled_mm" else 2**-8 * truth.abs() + 1e-3
    assert ((out.double() - truth).abs() <= bound + slack).all()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_reference_is_its_formula_in_any_shape(precision: str) -> None:
    x, weight, bias = layer(6, 16, 8)
    (a, r), (b, c) = kernels.quantize_rows(x, precision), kernels.quantize_weight(weight, precision)
    expected = ((a.double() * r) @ (b.double() * c[:, None]).T + bias).float()
    ours = kernels.quantized_linear(x.view(2, 3, 16), b, c, bias, backend="reference")
    torch.testing.assert_close(ours, expected.view(2, 3, 8))


@pytest.mark.parametrize("backend", backends("int8")[1:])
def test_int8_equals_the_reference(backend: str) -> None:
    x, weight, bias = layer(130, 768, 64)
    quantized = kernels.quantize_weight(weight, "int8")
    for kind in (torch.float32, torch.bfloat16):
        ours, theirs = (
            kernels.quantized_linear(x.to(kind), *quantized, bias, backend=way) for way in (backend, "reference")
        )
        assert ours.dtype == kind
        # Ties round up on one backend and to even on the other; bf16 input has ties.
        limit = 1e-5 if kind == torch.float32 else 1e-2
        scale = theirs.abs().float().amax(1, keepdim=True)
        assert ((ours - theirs).abs() <= limit * scale).all()


@pytest.mark.parametrize("backend", backends("int8"))
def test_the_largest_products_do_not_overflow(backend: str) -> None:
    x, weight = torch.ones(32, 3072, device=DEVICE), torch.ones(16, 3072, device=DEVICE)
    weight[1::2] = -1
    out = kernels.quantized_linear(
        x, *kernels.quantize_weight(weight, "int8"), torch.zeros(16, device=DEVICE), backend=backend
    )
    torch.testing.assert_close(out, (weight * 3072)[:, 0].expand(32, -1), rtol=1e-6, atol=0)


def exact_norm(x: torch.Tensor, norm: kernels.Norm) -> torch.Tensor:
    centered = x.double() - x.double().mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("precision", "backend"), CASES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_layer_behind_its_norm(rows, inputs, outputs, precision, backend, dtype) -> None:
    x, weight, bias = layer(rows, inputs, outputs)
    x, quantized = (x + 3).T.contiguous().T.to(dtype), kernels.quantize_weight(weight, precision)
    norm = kernels.Norm(torch.randn(inputs, device=DEVICE), torch.randn(inputs, device=DEVICE), 0.1)
    ours = kernels.quantized_linear(x, *quantized, bias, norm=norm, backend=backend)
    exact = exact_norm(x, norm)
    dx, dw = rounding(exact, precision), rounding(weight, precision)
    # Between norm and quantizer a half has one rounding more on some backends; statistics are fp32.
    dx = dx * 1.01 + exact.abs() * torch.finfo(dtype).eps + 1e-4
    truth = exact @ weight.double().t() + bias.double()
    bound = dx @ weight.abs().double().t() + (exact.abs() + dx) @ dw.t() + 2 * torch.finfo(dtype).eps * truth.abs()
    slack = 1e-5 * truth.abs().max() + (2**-8 * truth.abs() if backend == "scaled_mm" else 0)
    assert ours.dtype == dtype and ((ours.double() - truth).abs() <= bound + slack).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("precision", "backend"), CASES)
@pytest.mark.parametrize("rows", [(2, 9), (1, 300), (600,), (2, 0)])
def test_an_mlp_of_two_layers(rows, precision, backend, dtype, activation) -> None:
    """As close to float64 as the definition is: the exact MLP of the weights as they were rounded."""
    torch.manual_seed(0)
    x = (torch.randn(*rows, 2, 48, device=DEVICE) * torch.linspace(0.1, 9, 48, device=DEVICE)).to(dtype)[..., 0, :]
    norm = kernels.Norm(torch.rand(48, device=DEVICE), torch.randn(48, device=DEVICE) / 4, 0.1)
    w1, w2 = torch.randn(96, 48, device=DEVICE) / 4, torch.randn(48, 96, device=DEVICE) / 4
    layers = [
        kernels.Quantized(*kernels.quantize_weight(w, precision), torch.randn(len(w), device=DEVICE)) for w in (w1, w2)
    ]
    ours, reference = (
        kernels.quantized_mlp(x, norm, *layers, activation=activation, backend=way) for way in (backend, "reference")
    )
    hidden = exact_norm(x, norm) @ (layers[0].weight.double() * layers[0].scale[:, None]).T + layers[0].bias
    hidden = hidden * (torch.special.ndtr(hidden) if activation == "gelu" else torch.sigmoid(1.702 * hidden))
    truth = x.double() + hidden @ (layers[1].weight.double() * layers[1].scale[:, None]).T + layers[1].bias
    assert ours.shape == reference.shape == x.shape and ours.dtype == dtype
    if x.numel():
        error, own = ((values.double() - truth).norm() / truth.norm() for values in (ours, reference))
        assert error <= 1.1 * own < (0.02 if precision == "int8" else 0.06), (error, own)


@pytest.mark.parametrize(("precision", "backend"), CASES)
def test_rows_of_zeros_give_the_bias_and_bad_rows_stay_bad(precision: str, backend: str) -> None:
    x, weight, bias = layer(32, 32, 16)
    x[0], x[1, 3], x[2, 4] = 0, float("nan"), float("inf")
    out = kernels.quantized_linear(x, *kernels.quantize_weight(weight, precision), bias, backend=backend)
    torch.testing.assert_close(out[0], bias, rtol=2**-7, atol=1e-6)
    assert not out[1:3].isfinite().any() and out[3:].isfinite().all()


@pytest.mark.compile
@pytest.mark.parametrize("backend", backends("int8")[1:])
def test_compiles_as_one_graph(backend: str) -> None:
    x, weight, bias = layer(32, 32, 16)
    quantized = kernels.quantize_weight(weight, "int8")

    def twice(x: torch.Tensor) -> torch.Tensor:
        return kernels.quantized_linear(x * 2, *quantized, bias, backend=backend)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twice(x))
    if backend == "onednn":
        ops, norm = torch.ops.umt_kernels, torch.randn(2, 32)
        torch.library.opcheck(ops.int8_linear_onednn.default, (x, *quantized, bias, None, None, 0.0))
        torch.library.opcheck(ops.int8_linear_onednn.default, (x.T[:32].T, *quantized, bias, *norm, 0.1))
        second = (*kernels.quantize_weight(torch.randn(32, 16), "int8"), torch.randn(32))
        torch.library.opcheck(ops.int8_mlp_onednn.default, (x, *norm, 0.1, *quantized, bias, *second, "gelu"))


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias = layer(4, 16, 8)
    values, scale = kernels.quantize_weight(weight, "int8")
    with pytest.raises(ValueError, match="float32"):
        kernels.quantized_linear(x, weight, scale, bias)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        kernels.quantized_linear(x, values, scale[:7], bias)
    with pytest.raises(ValueError, match="'scaled_mm' does not fit int8|VNNI"):
        kernels.quantized_linear(x, values, scale, bias, backend="scaled_mm")
    with pytest.raises(ValueError, match="has no gradient"):
        kernels.quantized_linear(x.requires_grad_(), values, scale, bias)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="fp8 has no backend on cpu"):
            kernels.quantized_linear(x.detach(), *kernels.quantize_weight(weight, "fp8"), bias)


def test_a_row_wider_than_a_program_holds_is_refused() -> None:
    x = torch.ones(1, MAX_CHANNELS + 1, device=DEVICE)
    with pytest.raises(ValueError, match="16385 channels in a row exceed the limit of 16384"):
        kernels.quantize_rows(x, "int8", backend="triton")
    assert (kernels.quantize_rows(x, "int8", backend="reference")[0] == 127).all()
    assert (kernels.quantize_rows(x[:, 1:], "int8", backend="triton")[0] == 127).all()


def test_a_cpu_without_vnni_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("kernels.quantized_linear"), "_CPU_MULTIPLIES_INT8", False)
    with pytest.raises(ValueError, match="VNNI"):
        kernels.quantized_backend("int8", torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(ValueError, match="needs compute capability 8.9"):
        kernels.quantize_rows(torch.ones(1, 8, device=DEVICE), "fp8", backend="triton")


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    weight, scale = kernels.quantize_weight(torch.randn(32, 64), "int8")
    x = torch.randn(shape)
    assert kernels.quantized_linear(x, weight, scale, torch.zeros(32), backend="reference").shape == (*shape[:-1], 32)


def test_other_dtypes_are_refused() -> None:
    weight, scale = kernels.quantize_weight(torch.randn(32, 64), "int8")
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        kernels.quantized_linear(torch.ones(2, 64, dtype=torch.int64), weight, scale, torch.zeros(32))
    with pytest.raises(ValueError, match=r"scale is torch\.float64"):
        kernels.quantized_linear(torch.ones(2, 64), weight, scale.double(), torch.zeros(32))
    layer, norm = kernels.Quantized(weight, scale, torch.zeros(32)), kernels.Norm(torch.ones(64), torch.zeros(64))
    with pytest.raises(ValueError, match=r"norm's weight \(3,\)"):
        kernels.quantized_linear(torch.ones(2, 64), *layer, norm=kernels.Norm(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match=r"second's weight is \(32, 32\); it must be \(64, H\)"):
        second = kernels.Quantized(*kernels.quantize_weight(torch.ones(32, 32), "int8"), torch.zeros(32))
        kernels.quantized_mlp(torch.ones(2, 64), norm, layer, second, activation="gelu", backend="reference")
    with pytest.raises(ValueError, match="activation is 'relu'; choose gelu or quick_gelu"):
        second = kernels.Quantized(*kernels.quantize_weight(torch.ones(64, 32), "int8"), torch.zeros(64))
        kernels.quantized_mlp(torch.ones(2, 64), norm, layer, second, activation="relu", backend="reference")
    product, rows, columns = torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 1), torch.ones(3)
    with pytest.raises(ValueError, match=r"bias torch\.float16"):
        kernels.dequantize_product(product, rows, columns, columns.half(), torch.float32)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        kernels.dequantize_product(product, rows, columns, columns, torch.int8)
    with pytest.raises(ValueError, match=r"weight \(3,\) and bias \(2,\) must be \(2,\)"):
        kernels.norm_quantize(torch.ones(4, 2), columns, rows[:, 0], "int8")
    with pytest.raises(ValueError, match="precision is 'int4'; choose one of int8, fp8"):
        kernels.norm_quantize(torch.ones(4, 2), rows[:, 0], rows[:, 0], "int4")
