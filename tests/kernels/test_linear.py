"""kernels.linear against float64 truth written out here: values, gradients, strides, tiles, and the bytes of a launch."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from kernels.linear import layers
from kernels.linear import product as products
from kernels.linear import tiles as choice
from tests.kernels.truth import assert_as_good_as_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))]
BACKENDS = ("triton", "reference")
SHAPES = [(37, 50, 41), (150, 64, 136), (1, 1, 1), (0, 8, 5), (130, 33, 8)]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def act(x: Tensor, name: str) -> Tensor:
    """The activations by their definitions."""
    if name == "gelu":
        return x * torch.special.ndtr(x)
    return x / (1 + torch.exp(-1.702 * x)) if name == "quick_gelu" else x


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def before_nan(x: Tensor) -> Tensor:
    """The same numbers in rows with NaN between them, and behind the last."""
    memory = torch.full((x.shape[0] + 9, x.shape[1] + 5), float("nan"), device=DEVICE, dtype=x.dtype)
    return memory[: x.shape[0], : x.shape[1]].copy_(x)


def assert_values_and_gradients(
    compute, truth, tensors: dict[str, Tensor], upstream: Tensor, dtype: torch.dtype
) -> None:
    """compute(backend, **tensors) on both backends, with its gradients, against truth(**tensors) in float64."""
    results = {}
    for backend in (*BACKENDS, "truth"):
        kinds = (torch.float64 if backend == "truth" else tensor.dtype for tensor in tensors.values())
        # Detached views keep their strides, and the NaN around them.
        leaves = {
            name: tensor.detach().to(kind).requires_grad_()
            for (name, tensor), kind in zip(tensors.items(), kinds, strict=True)
        }
        out = truth(**leaves) if backend == "truth" else compute(backend, **leaves)
        results[backend] = (out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype)))
        if backend != "truth":
            assert [part.dtype for part in results[backend][1:]] == [tensor.dtype for tensor in tensors.values()]
    for ours, reference, exact in zip(*results.values(), strict=True):
        # What is kept for backward is rounded to dtype: the limit is in its units, for results in fp32 too.
        assert_as_good_as_reference(ours.to(dtype), reference.to(dtype), exact, computed_in=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear_value_and_gradients(rows, inputs, outputs, activation, dtype) -> None:
    tensors = {
        "x": before_nan(numbers(rows, inputs, dtype=dtype)),
        "weight": before_nan(numbers(outputs, inputs, dtype=dtype) * inputs**-0.5),
        "bias": numbers(outputs),
        "residual": before_nan(numbers(rows, outputs)),
    }
    assert_values_and_gradients(
        lambda backend, **given: kernels.linear(**given, activation=activation, backend=backend),
        lambda x, weight, bias, residual: act(x @ weight.T + bias, activation) + residual,
        tensors,
        numbers(rows, outputs),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", ["pre", "both"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("rows", "inputs", "hidden"), [(37, 64, 41), (150, 24, 136), (0, 8, 5)])
def test_mlp_value_and_gradients(rows, inputs, hidden, activation, save, dtype) -> None:
    tensors = {
        "x": before_nan(numbers(rows, inputs, dtype=dtype)),
        "w1": numbers(hidden, inputs) * 2 * inputs**-0.5,
        "b1": numbers(hidden),
        "w2": numbers(inputs, hidden, dtype=dtype) * hidden**-0.5,
        "b2": numbers(inputs),
        "residual": numbers(rows, inputs),
    }
    assert_values_and_gradients(
        lambda backend, **given: kernels.mlp(**given, activation=activation, save=save, backend=backend),
        # An fp32 weight is rounded for the product, and its gradient is fp32.
        lambda x, w1, b1, w2, b2, residual: (
            act(x @ (w1 + (w1.to(dtype) - w1).detach()).T + b1, activation) @ w2.T + b2 + residual
        ),
        tensors,
        before_nan(numbers(rows, inputs)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 1, 1), (6, 5, 1), (5, 1)])
def test_the_rows_of_an_mlp_are_scaled(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A factor for each clip, some of them dropped; for all; for each row; and for each place in a clip."""
    scale = torch.rand(shape, device=DEVICE) + 0.5
    if shape[0] > 1:
        scale[0] = 0
    tensors = {
        "x": numbers(6, 5, 24, dtype=dtype),
        "w1": numbers(40, 24, dtype=dtype) * 0.2,
        "b1": numbers(40),
        "w2": numbers(24, 40, dtype=dtype) * 0.2,
        "b2": numbers(24),
        "residual": numbers(6, 5, 24),
    }
    assert_values_and_gradients(
        lambda backend, **given: kernels.mlp(**given, branch_scale=scale, backend=backend),
        lambda x, w1, b1, w2, b2, residual: (act(x @ w1.T + b1, "gelu") @ w2.T + b2) * scale.double() + residual,
        tensors,
        numbers(6, 5, 24),
        dtype,
    )


@triton.jit
def tile_kernel(out, source, row, column, rows, columns, stride, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    tile = products._tile(source, row, column, rows, columns, stride, 16, 32, False, EVEN_ROWS, EVEN_COLUMNS)
    tl.store(out + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], tile)


@pytest.mark.parametrize(("rows", "columns"), [(32, 50), (21, 64), (21, 50)])
def test_a_tile_is_zero_outside_its_matrix(rows: int, columns: int) -> None:
    """Rows and columns that a result leaves out must not be read either: behind the last there may be no memory."""
    matrix = before_nan(numbers(rows, columns))
    out = torch.empty(16, 32, device=DEVICE)
    even = rows % 16 == 0, columns % 32 == 0
    tile_kernel[(1,)](out, matrix, 16, 32, rows, columns, matrix.stride(0), *even)
    expected = torch.zeros(16, 32, device=DEVICE)
    expected[: rows - 16, : columns - 32] = matrix[16:, 32:]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    x, w1, w2 = numbers(5, 8), numbers(12, 8).requires_grad_(), numbers(8, 12)
    out = kernels.mlp(x, w1, None, w2, None, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), w1)
    exact = w1.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((act(x.double() @ exact.T, "gelu") @ w2.double().T).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    assert not kernels.linear(x, w2[:, :8].contiguous(), backend=backend).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_takes_the_dtype_of_the_residual(dtype: torch.dtype) -> None:
    """bf16 operands added to an fp32 stream: the branch is not rounded on its way."""
    x, weight = numbers(9, 40, dtype=torch.bfloat16), numbers(20, 40, dtype=torch.bfloat16)
    residual = numbers(9, 20, dtype=dtype)
    out = kernels.linear(x, weight, residual=residual, backend="triton")
    exact = x.double() @ weight.double().T + residual.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
def test_a_deferred_norm_is_the_norm_of_its_input(given: bool, dtype: torch.dtype) -> None:
    x = before_nan((numbers(37, 50) * 3 + 1).to(dtype))
    weight, bias, gamma, beta = numbers(41, 50) / 7, numbers(41), numbers(50) + 1, numbers(50)
    centered = x.double() - x.double().mean(1, keepdim=True)
    variance = centered.square().mean(1, keepdim=True) + 0.1
    exact = (centered / variance.sqrt() * gamma + beta) @ weight.double().T + bias
    exact = act(exact, "quick_gelu")
    statistics = (x.double().mean(1).float(), variance.rsqrt().flatten().float()) if given else None
    folded, shift, norm = kernels.defer_norm(weight, bias, gamma, beta, 0.1, dtype)
    assert folded.dtype == dtype and shift.dtype == norm.column.dtype == torch.float32
    ours, reference = (
        kernels.linear(x, folded, shift, norm=norm, statistics=statistics, activation="quick_gelu", backend=backend)
        for backend in BACKENDS
    )
    assert_as_good_as_reference(ours, reference, exact, computed_in=dtype)


def test_a_row_far_from_zero_keeps_its_norm() -> None:
    """The mean cancels against the sums of the weights as they are stored; those before rounding would leave an offset."""
    x = (numbers(16, 64) / 8 + 16).bfloat16()
    weight, gamma = numbers(24, 64) / 8, numbers(64).abs() + 0.5
    folded, shift, norm = kernels.defer_norm(weight, None, gamma, torch.zeros(64, device=DEVICE), 1e-5, torch.bfloat16)
    exact = torch.nn.functional.layer_norm(x.double(), (64,)) @ folded.double().T
    ours = kernels.linear(x, folded, shift, norm=norm, backend="triton")
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_statistics(backend: str) -> None:
    x = before_nan(numbers(7, 300) * 0.01 + 100)
    mean, rstd = kernels.row_statistics(x, 1e-5, backend=backend)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (exact.var(1, correction=0) + 1e-5) ** -0.5, rtol=2e-3, atol=0)


def test_operands_of_any_strides() -> None:
    x, weight = numbers(40, 2, 37).permute(1, 2, 0)[..., ::2], numbers(20, 16).T
    residual = numbers(16, 2, 37).permute(1, 2, 0)
    ours = kernels.linear(x, weight, residual=residual, activation="gelu", backend="triton")
    exact = act(x.double() @ weight.double().T, "gelu") + residual.double()
    assert ours.shape == (2, 37, 16)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and descriptors of compute capability 9.0, whatever runs here."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    sms = choice.limits(torch.device(DEVICE))[1] if DEVICE == "cuda" else 2
    for module in (choice, layers):
        monkeypatch.setattr(module, "limits", lambda device: (90, sms, 227 << 10))
    monkeypatch.setattr(products, "use_tma", lambda a, b: products._aligned(a) and products._aligned(b))


@pytest.mark.parametrize("rows", [130, 300])
def test_tiles_and_descriptors_of_hopper(hopper: None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = products.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        products.TensorDescriptor, "from_tensor", lambda *args: seen.append(args[1]) or plain(*args), raising=True
    )
    tensors = {
        "x": numbers(rows, 72, dtype=torch.bfloat16),
        "w1": numbers(256, 72, dtype=torch.bfloat16) / 8,
        "b1": numbers(256),
        "w2": numbers(72, 256, dtype=torch.bfloat16) / 16,
        "b2": numbers(72),
        "residual": numbers(rows, 72),
    }
    assert_values_and_gradients(
        lambda backend, **given: kernels.mlp(**given, backend=backend),
        lambda x, w1, b1, w2, b2, residual: act(x @ w1.T + b1, "gelu") @ w2.T + b2 + residual,
        tensors,
        numbers(rows, 72),
        torch.bfloat16,
    )
    assert len(seen) == 2 * 6, "two operands of six products"
    if DEVICE == "cpu":
        assert [256, 64] in seen and [64, 256] not in seen, "the wide tile forward, not beside pre-activations"


def test_rows_that_are_not_aligned_take_no_descriptor(hopper: None) -> None:
    x, weight = before_nan(numbers(20, 33)), numbers(16, 33)
    assert not products.use_tma(x, weight) and products.use_tma(numbers(4, 8), numbers(4, 8))
    ours = kernels.linear(x, weight, backend="triton")
    torch.testing.assert_close(ours.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sms", [1, 64])
def test_weight_gradient_adds_in_fp32(sms: int, backend: str, dtype: torch.dtype, monkeypatch) -> None:
    """In one launch, and where its sums are split, which 64 SMs want."""
    if DEVICE == "cpu":
        for module in (choice, layers):
            monkeypatch.setattr(module, "limits", lambda device: (80, sms, 99 << 10))
    dy, x, before = numbers(1030, 40, dtype=dtype), numbers(1030, 24, dtype=dtype), numbers(40, 24)
    exact = dy.double().T @ x.double()
    ours = kernels.weight_gradient(dy, x, backend=backend)
    assert ours.dtype == torch.float32 and torch.equal(ours, kernels.weight_gradient(dy, x, backend=backend))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)
    buffer = before.clone()
    assert kernels.weight_gradient(dy, x, out=buffer, backend=backend) is buffer
    torch.testing.assert_close(buffer.double(), exact + before.double(), rtol=1e-5, atol=1e-3)


def test_offsets_beyond_32_bits() -> None:
    from tests.kernels.test_large import last_of_three

    x, residual = last_of_three(16, dtype=torch.float16), last_of_three(16, dtype=torch.float16)
    x[2], residual[2], weight = torch.randn(16), torch.randn(16), numbers(16, 16, dtype=torch.float16)
    ours = kernels.linear(x, weight, residual=residual, backend="triton")
    exact = x[2].double() @ weight.double().T + residual[2].double()
    torch.testing.assert_close(ours[2].double(), exact, rtol=2**-10, atol=1e-4)
    assert not ours[:2].any()


def test_launches_move_the_bytes_that_are_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor that a launch is given, once; the operands of an elementwise pass would show."""
    moved, plain = [], products.product_kernel

    class Counting:
        def __getitem__(self, grid):
            def launch(*args, **options):
                given = [getattr(arg, "base", arg) for arg in args]
                moved.append(sum(arg.nbytes for arg in given if isinstance(arg, Tensor)))
                return plain[grid](*args, **options)

            return launch

    monkeypatch.setattr(products, "product_kernel", Counting())
    M, K, H = 64, 32, 128
    x, w1, w2 = (numbers(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((M, K), (H, K), (K, H)))
    b1, b2, residual = (numbers(*shape).requires_grad_() for shape in ((H,), (K,), (M, K)))
    scale = torch.rand(M, 1, device=DEVICE)
    out = kernels.mlp(x, w1, b1, w2, b2, residual=residual, branch_scale=scale, backend="triton")
    forward = [2 * (M * K + H * K + 2 * M * H) + 4 * H, 2 * (M * H + H * K) + 4 * (K + 2 * M * K + M)]
    assert moved == forward
    moved.clear()
    out.sum().backward()
    parts = -(-M // choice.tiling(M, H, 2, *choice.limits(x.device), wide=True)["BLOCK_M"])
    # dGELU: reads dy, the weight and pre, writes its gradient, the activation and the sums of the bias' gradient.
    backward = [2 * (M * K + H * K + 3 * M * H) + 4 * parts * H, 2 * (M * H + H * K + M * K)]
    assert moved[:2] == backward and len(moved) == 4


# operators, errors


@pytest.mark.compile
def test_operators_are_registered_soundly_and_compile() -> None:
    ops = torch.ops.umt_kernels
    x, w1, w2 = numbers(5, 8).requires_grad_(), numbers(12, 8).requires_grad_(), numbers(8, 12).requires_grad_()
    bias, residual = numbers(12).requires_grad_(), numbers(5, 12).requires_grad_()
    none, dy = (None,) * 3, numbers(5, 12)
    values, scales = kernels.quantize_rows(x.detach(), "int8")
    weight, scale = kernels.quantize_weight(w1.detach(), "int8")
    cases = [
        (ops.linear, (x, w1, bias, residual, *none, "gelu", True)),
        (ops.linear, (x.detach(), w1.detach(), None, None, numbers(5), numbers(5), numbers(12), "none", False)),
        (ops.mlp, (x, w1, bias, w2, None, None, None, "gelu", "pre")),
        (ops.mlp, (x, w1, bias, w2, None, numbers(5, 8).requires_grad_(), numbers(5), "gelu", "both")),
        (ops.input_gradient, (dy, w1.detach(), None, "none", False)),
        (ops.input_gradient, (numbers(5, 8), w2.detach(), dy, "gelu", True)),
        (ops.weight_gradient, (dy, x.detach())),
        (ops.add_weight_gradient, (numbers(12, 8), dy, x.detach())),
        (ops.row_statistics, (x.detach(), 1e-5)),
        (ops.scaled_linear, (values, scales, weight, scale, None, None, "none", torch.bfloat16)),
    ]
    for op, arguments in cases:
        report = torch.library.opcheck(op.default, arguments)
        assert set(report.values()) == {"SUCCESS"}, (op, report)

    factors = numbers(5, 1)

    def everything(x: Tensor, w1: Tensor, bias: Tensor, w2: Tensor) -> Tensor:
        hidden = kernels.linear(x * 2, w1, bias, activation="quick_gelu", backend="triton")
        out = kernels.mlp(x, w1, bias, w2, None, residual=x.float(), branch_scale=factors, backend="triton")
        return out.sum() + hidden.sum()

    leaves = (x, w1, bias, w2)
    compiled, eager = torch.compile(everything, fullgraph=True, backend="aot_eager")(*leaves), everything(*leaves)
    torch.testing.assert_close(compiled, eager)
    gradients = (torch.autograd.grad(value, leaves) for value in (compiled, eager))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_is_refused() -> None:
    x, weight = numbers(3, 4).requires_grad_(), numbers(5, 4)
    """Even where the first alone would be found: what it lacks would show in the second."""
    for out in (
        kernels.linear(x, weight, activation="gelu", backend="triton"),
        kernels.mlp(x, weight, None, weight.T.contiguous(), None, backend="triton"),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


def test_the_wrong_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, values = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.int8)
    for call in (
        lambda: kernels.linear(x, x, backend="triton"),
        lambda: kernels.mlp(x, x, None, torch.ones(4, 2), None, backend="triton"),
        lambda: kernels.weight_gradient(x, x, backend="triton"),
        lambda: kernels.scaled_linear(values, x[:, :1], values, x[0, :2], backend="triton"),
    ):
        with pytest.raises(ValueError, match="needs a CUDA tensor"):
            call()
    with pytest.raises(ValueError, match="'fast'"):
        kernels.linear(x, x, backend="fast")


X, W, ROW = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5)
EIGHT, FIVE = torch.zeros(3, 8, dtype=torch.int8), torch.zeros(5, 8, dtype=torch.int8)
REFUSED = {
    r"weight \(5, 7\)": lambda: kernels.linear(X, W[:, :7]),
    "x is torch.float64": lambda: kernels.linear(X.double(), W),
    r"x is torch.float32 \(3, 0\)": lambda: kernels.linear(X[:, :0], W[:, :0]),
    "weight is torch.float16 and x torch.float32": lambda: kernels.linear(X, W.half()),
    r"bias of weight is torch.float32 \(4,\)": lambda: kernels.linear(X, W, ROW[:4]),
    "activation is 'relu'": lambda: kernels.linear(X, W, activation="relu"),
    r"residual is torch.float32 \(3, 8\)": lambda: kernels.linear(X, W, residual=X),
    "norm is for 4 outputs; the weight has 5": lambda: kernels.linear(X, W, norm=kernels.DeferredNorm(ROW[:4], 1e-5)),
    "statistics are those of a norm": lambda: kernels.linear(X, W, statistics=(ROW, ROW)),
    r"both must be \(3,\)": lambda: kernels.linear(X, W, norm=kernels.DeferredNorm(ROW, 1e-5), statistics=(ROW, ROW)),
    "a deferred LayerNorm has no gradient": lambda: kernels.linear(
        X.clone().requires_grad_(), W, norm=kernels.DeferredNorm(ROW, 1e-5)
    ),
    r"w2 \(8, 4\)": lambda: kernels.mlp(X, W, None, torch.zeros(8, 4), None),
    "activation is 'none' and save 'pre'": lambda: kernels.mlp(X, W, None, W.T, None, activation="none"),
    r"branch_scale is torch.float32 \(4, 1\)": lambda: kernels.mlp(
        X, W, None, W.T, None, branch_scale=torch.ones(4, 1)
    ),
    "branch_scale is torch.float64": lambda: kernels.mlp(X, W, None, W.T, None, branch_scale=torch.ones(1, 1).double()),
    "with a gradient; it must": lambda: kernels.mlp(
        X, W, None, W.T, None, branch_scale=torch.ones(1, 1, requires_grad=True)
    ),
    "save 'nothing'": lambda: kernels.mlp(X, W, None, W.T, None, save="nothing"),
    r"out is torch.float16 \(8, 8\)": lambda: kernels.weight_gradient(X, X, out=torch.zeros(8, 8).half()),
    r"x torch.float32 \(2, 8\)": lambda: kernels.weight_gradient(X, X[:2]),
    "values are torch.float32": lambda: kernels.scaled_linear(X, X[:, :1], FIVE, ROW),
    r"scales \(3, 2\)": lambda: kernels.scaled_linear(EIGHT, X[:, :2], FIVE, ROW),
    r"weight_scale torch.float16": lambda: kernels.scaled_linear(EIGHT, X[:, :1], FIVE, ROW.half()),
    "5 outputs in torch.int8 are not a multiple of 128": lambda: kernels.scaled_linear(
        EIGHT, X[:, :1], FIVE, ROW, dtype=torch.int8
    ),
    "dtype is torch.int32": lambda: kernels.scaled_linear(EIGHT, X[:, :1], FIVE, ROW, dtype=torch.int32),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_tiles_follow_the_shape() -> None:
    a100, h100 = (80, 108, 163 << 10), (90, 132, 227 << 10)
    tiles = [
        choice.tiling(20480, 3072, 2, *h100),
        choice.tiling(20480, 3072, 2, *a100),
        choice.tiling(64, 512, 2, *h100),
    ]
    assert [(t["BLOCK_M"], t["BLOCK_N"], t["BLOCK_K"]) for t in tiles] == [
        (128, 256, 64),
        (128, 128, 64),
        (64, 128, 64),
    ]
    # What a program of compute capability 8.6 may have.
    small = choice.tiling(20480, 3072, 2, 86, 84, 99 << 10)
    assert (small["BLOCK_M"] + small["BLOCK_N"]) * small["BLOCK_K"] * 2 * small["num_stages"] <= 99 << 10
