"""out=: results written to tensors that are given, by both backends, for CUDA graphs and rings of buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "reference"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


SEEN, SEED = torch.tensor([[4, 0], [1, 5]], device=DEVICE), torch.tensor([7], device=DEVICE)
X, ROWS, AFFINE = seeded(2, 6, 8), seeded(5, 12).T[::2].T, seeded(2, 6)
VIDEO = (seeded(2, 1, 16, 24, 3) * 60 + 128).to(torch.uint8)
NORMAL = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
Q, K, SCORES = seeded(3, 2, 16), seeded(3, 2, 8, 16), seeded(3, 7).abs()
WEIGHT = seeded(3, 8), seeded(3)
FOLDED = kernels.defer_norm(*WEIGHT, *seeded(2, 8))
EIGHT = [kernels.quantize_rows(seeded(n, 128), "int8", backend="reference") for n in (4, 256)]
SCALED = (*EIGHT[0], EIGHT[1][0], EIGHT[1][1].flatten(), seeded(256))

CASES: dict[str, Callable[..., Any]] = {
    "patch_gather": lambda **o: kernels.patch_gather(VIDEO, SEEN, patch_size=8, **NORMAL, **o),
    "patch_gather bf16": lambda **o: kernels.patch_gather(VIDEO, SEEN, patch_size=8, dtype=torch.bfloat16, **o),
    "patch_gather window": lambda **o: kernels.patch_gather(
        VIDEO, SEEN % 2, patch_size=8, origin=torch.tensor([[3, 5], [0, 8]], device=DEVICE), crop_size=(8, 16), **o
    ),
    "token_gather": lambda **o: kernels.token_gather(X, SEEN, X[0], **o),
    "gather_norm": lambda **o: kernels.gather_norm(X, SEEN, X[0, 0], X[0, 1], **o),
    "gather_norm all": lambda **o: kernels.gather_norm(X, None, X[0, 0], X[0, 1], **o),
    "semantic_mask": lambda **o: kernels.semantic_mask(Q, K, 3, SEED, **o),
    "semantic_mask scores": lambda **o: kernels.semantic_mask(Q, K, 3, SEED, return_scores=True, **o),
    "sample_visible": lambda **o: kernels.sample_visible(SCORES, 3, SEED, **o),
    "quantize_rows": lambda **o: kernels.quantize_rows(ROWS, "int8", **o),
    "norm_quantize": lambda **o: kernels.norm_quantize(ROWS, AFFINE[0], AFFINE[1], "int8", **o),
    "linear": lambda **o: kernels.linear(X, *WEIGHT, activation="gelu", residual=X[..., :3], **o),
    "linear norm": lambda **o: kernels.linear(X[0], FOLDED[0], FOLDED[1], norm=FOLDED[2], **o),
    "scaled_linear": lambda **o: kernels.scaled_linear(*SCALED, activation="gelu", dtype=torch.float32, **o),
    "scaled_linear int8": lambda **o: kernels.scaled_linear(*SCALED, dtype=torch.int8, **o),
}


def parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def given(like: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Slots in the middle of rings of buffers, poisoned."""
    slots = []
    for part in parts(like):
        ring = torch.empty(3, *part.shape, dtype=part.dtype, device=part.device)
        slots.append(ring[1])
    return tuple(slots) if isinstance(like, tuple) else slots[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_given_is_written_and_returned(name: str, backend: str) -> None:
    expected = CASES[name](backend=backend)
    out = given(expected)
    result = CASES[name](out=out, backend=backend)
    for returned, slot, value in zip(parts(result), parts(out), parts(expected), strict=True):
        assert returned is slot and torch.equal(slot, value)
        ring = slot._base
        untouched = torch.full_like(ring[0], float("nan") if slot.is_floating_point() else torch.iinfo(slot.dtype).max)
        for neighbor in (ring[0], ring[2]):
            assert torch.equal(neighbor.nan_to_num(-1e9), untouched.nan_to_num(-1e9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused(name: str, backend: str) -> None:
    expected = CASES[name](backend="reference")
    for i, part in enumerate(parts(expected)):
        flipped = part.new_empty(part.shape[::-1]).permute(*reversed(range(part.ndim)))
        wrong = {
            r"\(1, 1\) on": part.new_empty(1, 1),
            "is torch.float16": part.to(torch.float16),
            "on meta;": part.to("meta"),
        }
        # A column is contiguous whichever way it is read.
        wrong |= {} if flipped.is_contiguous() else {r"of strides \([\d, ]+\); it must be contiguous": flipped}
        for message, out in wrong.items():
            several = [*parts(given(expected))]
            several[i] = out
            if name in ("patch_gather", "patch_gather window") and "float16" in message:
                continue  # there the dtype of out is the one wanted
            with pytest.raises(ValueError, match=message):
                CASES[name](out=tuple(several) if isinstance(expected, tuple) else out, backend=backend)
    if isinstance(expected, tuple):
        with pytest.raises(ValueError, match="out is a Tensor; it must be a pair"):
            CASES[name](out=expected[0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_given_takes_a_gradient(backend: str) -> None:
    x, out = X.clone().requires_grad_(), torch.empty(2, 2, 8, device=DEVICE)
    video = torch.zeros(2, 3, 1, 8, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="takes no gradient, but a tensor here requires one"):
        kernels.token_gather(x, SEEN, out=out, backend=backend)
    with pytest.raises(ValueError, match="has no gradient"):
        kernels.patch_gather(video, SEEN % 2, patch_size=8, out=out.new_empty(2, 2, 192), backend=backend)
    with pytest.raises(ValueError, match="takes no gradient"):
        kernels.gather_norm(X, SEEN, X[0, 0], X[0, 1], out=out.clone().requires_grad_(), backend=backend)
    with pytest.raises(ValueError, match="takes no gradient"):
        kernels.linear(X, WEIGHT[0].clone().requires_grad_(), out=out.new_empty(2, 6, 3), backend=backend)
    with torch.no_grad():
        assert torch.equal(kernels.token_gather(x, SEEN, out=out, backend=backend), kernels.token_gather(X, SEEN))
    with torch.inference_mode():
        out = torch.empty(2, 2, 8, device=DEVICE)
        assert torch.equal(kernels.token_gather(x, SEEN, out=out, backend=backend), kernels.token_gather(X, SEEN))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_change(backend: str) -> None:
    out = torch.ones(2, 2, 8, device=DEVICE)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    product = (weight * out).sum()
    kernels.token_gather(X, SEEN, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_patch_gather_takes_the_dtype_of_out() -> None:
    out = torch.empty(2, 2, 192, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.patch_gather(VIDEO, SEEN, patch_size=8, out=out) is out
    with pytest.raises(ValueError, match="out is torch.bfloat16 .* contiguous torch.float32"):
        kernels.patch_gather(VIDEO, SEEN, patch_size=8, dtype=torch.float32, out=out)


@pytest.mark.compile
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_they_compile(name: str, backend: str) -> None:
    """The tensor that is given changes, also where the graph goes on with it."""
    expected = CASES[name](backend=backend)

    def step(out: Any) -> tuple[Tensor, ...]:
        return tuple(part.float() * 2 for part in parts(CASES[name](out=out, backend=backend)))

    out = given(expected)
    torch.compiler.reset()  # the step is one function for all names, and compiled a few times at most
    doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(out)
    for slot, value, twice in zip(parts(out), parts(expected), doubled, strict=True):
        assert torch.equal(slot, value) and torch.equal(twice, 2 * value.float())


def test_they_are_sound_operators() -> None:
    ops = torch.ops.umt_kernels
    halves, visible = torch.empty(2, 2, 192, device=DEVICE), torch.empty(3, 3, dtype=torch.int32, device=DEVICE)
    values, scale = torch.empty(5, 6, dtype=torch.int8, device=DEVICE), torch.empty(5, 1, device=DEVICE)
    x, table = X, X[0]
    out8 = torch.empty(4, 256, dtype=torch.int8, device=DEVICE)
    cases = [
        (ops.patch_gather_out, (halves, VIDEO, SEEN, [0.5] * 3, [0.1] * 3, None, 2, 3, 8, 1, False)),
        (ops.token_gather_out, (torch.empty(2, 2, 8, device=DEVICE), x, SEEN, table)),
        (ops.gather_norm_out, (torch.empty(2, 2, 8, device=DEVICE), x, SEEN, x[0, 0], x[0, 1], 1e-5)),
        (ops.semantic_mask_out, (visible, torch.empty(3, 7, device=DEVICE), Q, K, SEED)),
        (ops.semantic_mask_out, (visible, torch.empty(0, device=DEVICE), Q, K, SEED)),
        (ops.sample_visible_out, (visible, SCORES, SEED)),
        (ops.quantize_rows_out, (values, scale, ROWS)),
        (ops.norm_quantize_out, (values, scale, ROWS, AFFINE[0], AFFINE[1], 1e-5)),
        (ops.linear_out, (torch.empty(6, 3, device=DEVICE), X[0], *WEIGHT, None, None, None, None, "gelu")),
        (ops.scaled_linear_out, (out8, torch.empty(4, 2, device=DEVICE), *SCALED, None, "gelu")),
    ]
    for op, arguments in cases:
        report = torch.library.opcheck(op.default, arguments)
        assert set(report.values()) == {"SUCCESS"}, report
