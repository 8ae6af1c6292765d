"""What a stranger passes by mistake: tensors of another device, odd dtypes, rows too wide, autocast, torch.func."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import library
from kernels._launch import MAX_CHANNELS

BACKENDS = ["triton", "reference"]
SEEN, SEED = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32), torch.tensor([1])
ONE, ZERO = torch.ones(8), torch.zeros(8)
X, FLAT, WEIGHT = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(16, 8)
VIDEO = torch.zeros(2, 1, 16, 16, 3, dtype=torch.uint8)
Q, K = torch.randn(3, 2, 8), torch.randn(3, 2, 6, 8)
STUDENT, HEADS = torch.randn(2, 2, 3, 8), torch.ones(2, 8)
EIGHT = kernels.quantize_weight(WEIGHT, "int8")
PRODUCT = torch.ones(2, 8, dtype=torch.int32)
QKV, PACKED = torch.randn(2, 5, 3, 8), torch.randn(5, 3, 8)
TOTALS = torch.tensor([0, 2, 5], dtype=torch.int32)


def away(tensor: Tensor) -> Tensor:
    """On another device than the others."""
    return tensor.to("meta")


ELSEWHERE: dict[str, Callable[..., object]] = {
    "visible is on meta and x on cpu": lambda b: kernels.token_gather(X, away(SEEN), backend=b),
    "table is on meta": lambda b: kernels.token_gather(X, SEEN, away(X[0]), backend=b),
    "weight is on meta and x": lambda b: kernels.gather_norm(X, SEEN, away(ONE), ZERO, backend=b),
    "visible is on meta and video": lambda b: kernels.patch_gather(VIDEO, away(SEEN), patch_size=8, backend=b),
    "origin is on meta": lambda b: kernels.patch_gather(
        VIDEO, SEEN * 0, patch_size=8, crop_size=(8, 8), origin=away(SEEN.long()), backend=b
    ),
    "k is on meta": lambda b: kernels.semantic_mask(Q, away(K), 2, SEED, backend=b),
    "seed is on meta and q": lambda b: kernels.semantic_mask(Q, K, 2, away(SEED), backend=b),
    "seed is on meta and scores": lambda b: kernels.sample_visible(HEADS, 2, away(SEED), backend=b),
    "bias is on meta and x": lambda b: kernels.layer_norm(FLAT, ONE, away(ZERO), backend=b),
    "branch is on meta": lambda b: kernels.layer_norm(FLAT, ONE, ZERO, branch=away(FLAT), backend=b),
    "target is on meta": lambda b: kernels.align_loss(STUDENT, away(STUDENT), HEADS, HEADS, backend=b),
    "weight is on meta and student": lambda b: kernels.align_loss(STUDENT, STUDENT, away(HEADS), HEADS, backend=b),
    "residual is on meta": lambda b: kernels.linear(FLAT, WEIGHT, residual=away(FLAT @ WEIGHT.T), backend=b),
    "w2 is on meta": lambda b: kernels.mlp(FLAT, WEIGHT, None, away(WEIGHT.T), None, backend=b),
    "dy is on meta": lambda b: kernels.weight_gradient(away(FLAT), FLAT, backend=b),
    "weight is on meta and values": lambda b: kernels.scaled_linear(
        *kernels.quantize_rows(FLAT, "int8"), away(EIGHT[0]), EIGHT[1], backend=b
    ),
    "bias is on meta and x on cpu": lambda b: kernels.norm_quantize(FLAT, ONE, away(ZERO), "int8", backend=b),
    "scale is on meta and product": lambda b: kernels.dequantize_product(
        PRODUCT, ONE[:2, None], away(ONE), ZERO, torch.float32, backend=b
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", ELSEWHERE)
def test_tensors_of_two_devices_are_refused(message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*all tensors must be on one device"):
        ELSEWHERE[message](backend)


WIDE = torch.zeros(1, 1, MAX_CHANNELS + 1)
OF_BOTH: dict[str, Callable[..., object]] = {
    r"x is torch.int32 \(2, 5, 8\); it must be float64": lambda b: kernels.gather_norm(
        X.int(), SEEN, ONE, ZERO, backend=b
    ),
    r"x is torch.float8_e4m3fn \(2, 5, 8\)": lambda b: kernels.token_gather(X.to(torch.float8_e4m3fn), SEEN, backend=b),
    "patch_size is 0 and tubelet_size 1; both must be at least 1": lambda b: kernels.patch_gather(
        VIDEO, SEEN, patch_size=0, backend=b
    ),
    "patch_size is 8 and tubelet_size -1": lambda b: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, tubelet_size=-1, backend=b
    ),
    r"mean is \(0.5, 0.5\) and std": lambda b: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, mean=(0.5, 0.5), std=(0.5, 0.5), backend=b
    ),
    r"std \(0, 1, 1\); .* none of std 0": lambda b: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, mean=(0, 0, 0), std=(0, 1, 1), backend=b
    ),
    r"crop_size is \(0, 8\)": lambda b: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, crop_size=(0, 8), origin=SEEN, backend=b
    ),
    "dtype is torch.int8; it must be a floating one, or uint8": lambda b: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, dtype=torch.int8, backend=b
    ),
    "q is torch.int32": lambda b: kernels.semantic_mask(Q.int(), K.int(), 2, SEED, backend=b),
    "and k torch.float16; both must be of one floating dtype": lambda b: kernels.semantic_mask(
        Q, K.half(), 2, SEED, backend=b
    ),
    "with a head and a channel": lambda b: kernels.semantic_mask(Q[:, :0], K[:, :0], 2, SEED, backend=b),
    "seed is 7; it must be an int64 tensor": lambda b: kernels.sample_visible(HEADS, 2, 7, backend=b),
    "8 channels of torch.float32, torch.int32": lambda b: kernels.align_loss(
        STUDENT, STUDENT.int(), HEADS, HEADS, backend=b
    ),
    r"x is torch.float32 \(\) and weight": lambda b: kernels.linear(torch.tensor(1.0), WEIGHT, backend=b),
    r"x is torch.float32 \(\) and w1": lambda b: kernels.mlp(
        torch.tensor(1.0), WEIGHT, None, WEIGHT.T, None, backend=b
    ),
    r"x is torch.float32 \(8,\); it must be": lambda b: kernels.row_statistics(ONE, 1e-5, backend=b),
    r"x is torch.float64 \(3, 8\); it must be": lambda b: kernels.row_statistics(FLAT.double(), 1e-5, backend=b),
    "takes no gradient": lambda b: kernels.weight_gradient(
        FLAT, FLAT, out=torch.zeros(8, 8, requires_grad=True), backend=b
    ),
}
OF_TRITON: dict[str, Callable[..., object]] = {
    "16385 channels of torch.float32; the kernel takes at most 16384": lambda b: kernels.token_gather(
        WIDE, SEEN[:1, :1], backend=b
    ),
    "8 channels of torch.float64; .* computes in float32": lambda b: kernels.token_gather(
        X.double(), SEEN, X[0].double(), backend=b
    ),
    "8 channels of torch.float64": lambda b: kernels.gather_norm(X.double(), SEEN, ONE, ZERO, backend=b),
    "q is torch.float64; the kernel computes in float32": lambda b: kernels.semantic_mask(
        Q.double(), K.double(), 2, SEED, backend=b
    ),
    "8 channels of torch.float64, torch.float64": lambda b: kernels.align_loss(
        STUDENT.double(), STUDENT.double(), HEADS, HEADS, backend=b
    ),
    "a row of 49152 numbers exceeds the limit of 32768": lambda b: kernels.patch_gather(
        VIDEO.new_zeros(1, 1, 128, 128, 3), SEEN[:1, :1], patch_size=128, backend=b
    ),
}
OF_NONE: dict[str, Callable[..., object]] = {
    "q is torch.float32, k torch.float16": lambda: kernels.attention(QKV, QKV.half(), QKV.half()),
    "all must be of one floating dtype": lambda: kernels.attention(*[QKV.int()] * 3),
    "key_mask is on meta": lambda: kernels.attention(QKV, QKV, QKV, key_mask=away(QKV[..., 0, 0] > 0)),
    "v is on meta": lambda: kernels.attention_varlen(PACKED, PACKED, away(PACKED), TOTALS, TOTALS, 3, 3),
    "cu_seqlens are torch.float32": lambda: kernels.attention_varlen(*[PACKED] * 3, *[TOTALS.float()] * 2, 3, 3),
    "of at least one sequence": lambda: kernels.attention_varlen(*[PACKED[:0]] * 3, *[TOTALS[:1]] * 2, 0, 0),
    r"gamma \(1,\) and beta \(8,\) must be \(8,\)": lambda: kernels.defer_norm(WEIGHT, None, ONE[:1], ZERO),
    "none of std 0": lambda: kernels.fold_pixels(
        torch.ones(4, 3, 1, 8, 8), None, mean=(0, 0, 0), std=(0, 1, 1), dtype=torch.float32
    ),
    r"bias is \(5,\); it must be \(4,\)": lambda: kernels.fold_pixels(
        torch.ones(4, 3, 1, 8, 8), torch.ones(5), mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32
    ),
    r"q \(3, 2, 8\) and k \(3, 1, 6, 8\) must be": lambda: kernels.class_attention(Q, K[:, :1]),
    r"a \(3, 7\) and b \(16, 8\) must be": lambda: kernels.library_product(FLAT[:, :7], WEIGHT),
    r"weight \(8,\) and bias None must be": lambda: kernels.frozen_linear(FLAT, ONE),
    r"bias \(5,\) must be": lambda: kernels.frozen_linear(FLAT, WEIGHT, ONE[:5]),
    "scale is on meta": lambda: kernels.quantized_linear(FLAT, EIGHT[0], away(EIGHT[1]), torch.zeros(16)),
    "norm is a tuple; it must be a kernels.Norm": lambda: kernels.quantized_linear(
        FLAT, *EIGHT, torch.zeros(16), norm=(ONE, ZERO, 1e-5)
    ),
    "norm is a tuple; it must be the one that defer_norm gave": lambda: kernels.linear(FLAT, WEIGHT, norm=(ONE, 1e-5)),
    r"and x \(\); they must be": lambda: kernels.quantized_linear(torch.tensor(1.0), *EIGHT, torch.zeros(16)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", OF_BOTH)
def test_what_neither_backend_takes(message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        OF_BOTH[message](backend)


@pytest.mark.parametrize("message", OF_TRITON)
def test_what_the_reference_alone_takes(message: str) -> None:
    OF_TRITON[message]("reference")
    with pytest.raises(ValueError, match=f"{message}.*use backend='reference'"):
        OF_TRITON[message]("triton")


@pytest.mark.parametrize("message", OF_NONE)
def test_what_has_no_backend(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OF_NONE[message]()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_what_is_fp32(backend: str) -> None:
    """Results have the dtypes that are promised, to the digits of those: references once multiplied in bf16 on the way."""
    calls = {
        "linear": lambda: kernels.linear(FLAT, WEIGHT, activation="gelu", backend=backend),
        "mlp": lambda: kernels.mlp(FLAT, WEIGHT, None, WEIGHT.T.contiguous(), None, backend=backend),
        "weight_gradient": lambda: kernels.weight_gradient(FLAT, FLAT, backend=backend),
        "scores": lambda: kernels.semantic_mask(Q, K, 2, SEED, return_scores=True, backend=backend)[1],
        "align_loss": lambda: kernels.align_loss(STUDENT, STUDENT.flip(2), HEADS, HEADS, backend=backend),
        "layer_norm": lambda: kernels.layer_norm(FLAT, ONE, ZERO, backend=backend),
        "defer_norm": lambda: kernels.defer_norm(WEIGHT, None, ONE, FLAT[0])[1],
    }
    for name, call in calls.items():
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            found = call()
        assert found.dtype == torch.float32 and torch.equal(found, expected), name


@pytest.mark.parametrize("through", range(2))
def test_forward_mode_is_refused_where_it_would_give_zero(through: int) -> None:
    """Also through a weight; the reference has it."""
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "layer_norm": (lambda x, w, b: kernels.layer_norm(x, w, ZERO, backend=b), (FLAT, ONE)),
        "linear": (lambda x, w, b: kernels.linear(x, w, activation="gelu", backend=b), (FLAT, WEIGHT)),
        "mlp": (lambda x, w, b: kernels.mlp(x, w, None, WEIGHT.T.contiguous(), None, backend=b), (FLAT, WEIGHT)),
        "align_loss": (lambda x, w, b: kernels.align_loss(x, STUDENT.flip(2), w, HEADS, backend=b), (STUDENT, HEADS)),
        "token_gather": (lambda x, w, b: kernels.token_gather(x, SEEN, backend=b), (X, X)),
    }
    for name, (call, tensors) in calls.items():

        def of_one(tensor: Tensor, backend: str, call=call, tensors=tensors) -> Tensor:
            given = [tensor if i == through else other for i, other in enumerate(tensors)]
            return call(*given, backend)

        one = tensors[through]
        tangent = torch.func.jvp(lambda t: of_one(t, "reference"), (one,), (torch.ones_like(one) + one,))[1]
        if name == "token_gather" and through == 1:
            continue  # there the second is not read
        assert tangent.any(), name
        with pytest.raises(RuntimeError, match="no forward-mode derivative .* backend='reference'"):
            torch.func.jvp(lambda t: of_one(t, "triton"), (one,), (one,))


@pytest.mark.compile
def test_autocast_does_not_break_the_graph() -> None:
    def step(x: Tensor) -> Tensor:
        return kernels.linear(x, WEIGHT, activation="gelu").sum()

    x = FLAT.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, step(x))
    compiled.backward()
    assert x.grad.isfinite().all()


def test_attention_of_nothing() -> None:
    """No queries or no keys, on every backend of a CPU."""
    for backend in ("auto", "math", "sdpa", "batched"):
        for dtype in (torch.float32, torch.bfloat16):
            q = QKV.to(dtype)
            assert kernels.attention(q[:, :0], q, q, backend=backend).shape == (2, 0, 3, 8)
            assert kernels.attention(q[:0], q[:0], q[:0], backend=backend).shape == (0, 5, 3, 8)
            out = kernels.attention(q, q[:, :0], q[:, :0], backend=backend)
            assert out.shape == (2, 5, 3, 8) and not out.any()


def test_mixed_dtypes_of_attention_are_left_to_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(QKV, QKV.bfloat16(), QKV.bfloat16()).dtype == torch.bfloat16


def test_a_deferred_norm_has_the_dtype_of_its_weight() -> None:
    assert kernels.defer_norm(WEIGHT.bfloat16(), None, ONE, ZERO)[0].dtype == torch.bfloat16
    assert kernels.defer_norm(WEIGHT, None, ONE, ZERO, dtype=torch.float16)[0].dtype == torch.float16


def test_library_layers_under_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's operator knows no transform: these go to PyTorch's."""
    monkeypatch.setattr(library, "mkl_is_slow", lambda: True)
    many = torch.randn(4, 3, 8)
    for layer in (kernels.library_linear, kernels.frozen_linear):
        found = torch.vmap(lambda x, layer=layer: layer(x, WEIGHT))(many)
        torch.testing.assert_close(found, F.linear(many, WEIGHT))
    slope = torch.func.grad(lambda x: kernels.library_linear(x, WEIGHT).sum())(FLAT)
    torch.testing.assert_close(slope, WEIGHT.sum(0).expand(3, 8))
    bf16 = QKV.bfloat16()
    found = torch.vmap(lambda q: kernels.attention(q, bf16, bf16))(torch.stack([bf16, bf16]))
    torch.testing.assert_close(found[1].float(), kernels.attention(bf16, bf16, bf16).float(), rtol=0.05, atol=0.05)
