"""Every operation but attention against float64 truth, reference and Triton backend (interpreted without a GPU)."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from kernels import _philox
from tests.kernels.truth import assert_as_good_as_reference, some_visible

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))]
BACKENDS = ("triton", "reference")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


# token_gather


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "n", "width"), [(2, 9, 4, 20), (1, 5, 5, 60), (3, 7, 1, 1), (0, 4, 2, 8)])
def test_token_gather_value_and_gradient(batch, tokens, n, width, dtype) -> None:
    x, table = torch.randn(batch, tokens, width, device=DEVICE), torch.randn(width, tokens, device=DEVICE).T
    visible, upstream = some_visible(batch, tokens, n), torch.randn(batch, width, n, device=DEVICE).mT
    results = {}
    for backend, kind in (("triton", dtype), ("reference", dtype), ("truth", torch.float64)):
        leaf = x.to(dtype).to(kind).requires_grad_()
        rows = table.to(dtype).to(kind) if backend == "truth" else table
        out = kernels.token_gather(leaf, visible, rows, backend="reference" if backend == "truth" else backend)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype).to(kind))
        results[backend] = (out.detach(), gradient)
    for part in range(2):
        assert_as_good_as_reference(results["triton"][part], results["reference"][part], results["truth"][part])
        # The interpreter does not round to the nearest bf16.
        assert (DEVICE == "cpu" and dtype == torch.bfloat16) or torch.equal(
            *(results[backend][part] for backend in BACKENDS)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "n", "width"), [(2, 9, 4, 20), (1, 5, 5, 60), (3, 7, 1, 1), (0, 4, 2, 8)])
def test_gather_norm(batch, tokens, n, width, dtype) -> None:
    # Far from zero mean: a one-pass variance would cancel.
    x = (torch.randn(batch, tokens, width, device=DEVICE) + 30).to(dtype)
    visible = some_visible(batch, tokens, n)
    weight, bias = torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE)
    ours, reference = (
        kernels.gather_norm(x, visible, weight, bias, eps=0.1, backend=backend) for backend in ("triton", "reference")
    )
    truth = kernels.gather_norm(x.double(), visible, weight.double(), bias.double(), eps=0.1, backend="reference")
    picked = x.double().gather(1, visible.long()[..., None].expand(-1, -1, width))
    centered = picked - picked.mean(2, keepdim=True)
    by_hand = centered / (centered.square().mean(2, keepdim=True) + 0.1).sqrt() * weight.double() + bias.double()
    torch.testing.assert_close(truth, by_hand)
    # Statistics and affine are fp32: of a half result only its one rounding is left.
    assert ((reference.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-4).all()
    assert_as_good_as_reference(ours, reference, truth)
    assert not kernels.gather_norm(x.requires_grad_(), visible, weight, bias).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_norm_of_all_rows(dtype) -> None:
    x = (torch.randn(7, 3, 20, device=DEVICE) + 30).to(dtype).transpose(0, 1)
    every = torch.arange(7, dtype=torch.int32, device=DEVICE).expand(3, -1)
    weight, bias = torch.randn(20, device=DEVICE), torch.randn(20, device=DEVICE)
    for backend in BACKENDS:
        ours = kernels.gather_norm(x, None, weight, bias, backend=backend)
        assert torch.equal(ours, kernels.gather_norm(x, every, weight, bias, backend=backend))


# semantic_mask and sample_visible


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "tokens", "width", "n"),
    # The last: more channels than a tile holds, so that several tiles are summed.
    [(3, 2, 17, 20, 5), (2, 3, 64, 32, 64), (1, 1, 1, 64, 1), (1, 2, 130, 72, 9)],
)
def test_semantic_mask_scores(rows, heads, tokens, width, n, dtype) -> None:
    q = torch.randn(rows, heads, width, device=DEVICE).to(dtype)
    # As the teacher gives them: a transposed view of a fused projection.
    k = torch.randn(rows, 1 + tokens, 2, heads, width, device=DEVICE).to(dtype)[:, :, 0].transpose(1, 2)
    seed = torch.tensor([11], device=DEVICE)
    ours = kernels.semantic_mask(q, k, n, seed, return_scores=True, backend="triton")
    reference = kernels.semantic_mask(q, k, n, seed, return_scores=True, backend="reference")
    truth = (torch.einsum("rhd,rhjd->rhj", q.double(), k.double()) * width**-0.5).softmax(-1)[..., 1:].mean(1)
    assert_as_good_as_reference(ours[1], reference[1], truth, computed_in=dtype)
    for visible, scores in (ours, reference):
        assert scores.dtype == torch.float32
        assert visible.dtype == torch.int32 and visible.shape == (rows, n)
        assert (visible[:, 1:] > visible[:, :-1]).all() and visible.min() >= 0 and visible.max() < tokens


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_semantic_mask_scores_of_large_logits(backend: str) -> None:
    """Logits of some hundreds, beyond what exp holds in fp32, and operands of any strides."""
    q, k = torch.randn(2, 16, 2, device=DEVICE).mT * 100, torch.randn(2, 2, 16, 9, device=DEVICE).mT * 10
    _, scores = kernels.semantic_mask(q, k, 2, torch.tensor([3], device=DEVICE), return_scores=True, backend=backend)
    truth = (torch.einsum("rhd,rhjd->rhj", q.double(), k.double()) / 4).softmax(-1)[..., 1:].mean(1)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-3, atol=1e-6)


def test_no_visible_token_is_a_legal_wish() -> None:
    """With nothing to keep the kernel must write nothing: it once wrote past the end."""
    q, k = torch.randn(2, 2, 16, device=DEVICE), torch.randn(2, 2, 10, 16, device=DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    visible, scores = kernels.semantic_mask(q, k, 0, seed, return_scores=True, backend="triton")
    assert visible.shape == (2, 0)
    torch.testing.assert_close(scores, kernels.class_attention(q, k))


@triton.jit
def rand_kernel(out, seed, COUNT: tl.constexpr):
    o = tl.arange(0, COUNT)
    tl.store(out + o, tl.rand(tl.load(seed), o))


@pytest.mark.parametrize("number", [0, 7, 2**31 + 1, 2**40 + 3, 2**63 - 1])
def test_the_reference_generator_is_tritons(number: int) -> None:
    seed, out = torch.tensor([number], device=DEVICE), torch.zeros(2**14, device=DEVICE)
    rand_kernel[(1,)](out, seed, COUNT=2**14)
    assert torch.equal(_philox.uniform(seed, 2**14), out)
    if number == 0:  # the published known answer for a counter and key of zeros, 0x6627e8d5
        assert out[0].item() == pytest.approx(0x6627E8D5 / 2**31, rel=1e-6)


def test_both_backends_draw_the_same_tokens() -> None:
    scores = torch.rand(49, 16, device=DEVICE).T
    for number in (0, 7, 2**40 + 3):
        seed = torch.tensor([number], device=DEVICE)
        drawn = [kernels.sample_visible(scores, 10, seed, backend=backend) for backend in ("triton", "reference")]
        # Logarithms may differ in the last bit, which can swap a near tie.
        assert (drawn[0] == drawn[1]).float().mean() > 0.99
    assert not torch.equal(drawn[0], kernels.sample_visible(scores, 10, seed + 1))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_of_equal_keys_the_lower_index_wins(backend: str) -> None:
    """Infinite scores all have the same, infinite key."""
    scores = torch.ones(4, 9, device=DEVICE)
    scores[:, [2, 5, 7, 8]] = float("inf")
    drawn = kernels.sample_visible(scores, 2, torch.tensor([4], device=DEVICE), backend=backend)
    assert (drawn == torch.tensor([2, 5], device=DEVICE)).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_drawn_zero_is_a_small_number(backend: str) -> None:
    """The first number under this seed is zero, whose noise alone would put a token behind the impossible ones."""
    seed = torch.tensor([1352247272], device=DEVICE)
    assert _philox.uniform(seed, 1).item() == 0
    scores = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE)
    assert kernels.sample_visible(scores, 1, seed, backend=backend).item() == 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_impossible_tokens_come_last(backend: str) -> None:
    scores = torch.zeros(50, 12, device=DEVICE)
    scores[:, 3] = 1e-38
    scores[:, 8] = 1.0
    scores[:, 9] = float("nan")
    seed = torch.tensor([1], device=DEVICE)
    two = kernels.sample_visible(scores, 2, seed, backend=backend)
    assert (two == torch.tensor([3, 8], device=DEVICE)).all()
    four = kernels.sample_visible(scores, 4, seed, backend=backend)
    assert all({3, 8} <= set(row) for row in four.tolist()) and len({tuple(row) for row in four.tolist()}) > 10


# align_loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["l2", "mse", "smooth_l1"])
@pytest.mark.parametrize("normalize", ["l2", "none"])
@pytest.mark.parametrize(("layers", "batch", "n", "tokens", "width"), [(3, 2, 5, 9, 20), (1, 3, 13, 13, 64)])
def test_align_loss_value_and_gradients(layers, batch, n, tokens, width, normalize, loss, dtype) -> None:
    student = torch.randn(layers, batch, n, width, device=DEVICE).to(dtype)
    target = torch.randn(layers, batch, tokens, width, device=DEVICE).to(dtype)
    weight, bias = torch.rand(layers, width, device=DEVICE) + 0.5, torch.randn(layers, width, device=DEVICE)
    visible = some_visible(batch, tokens, n)
    results = {}
    for backend, kind in (("triton", None), ("reference", None), ("truth", torch.float64)):
        leaves = [tensor.to(kind or tensor.dtype).requires_grad_() for tensor in (student, weight, bias)]
        value = kernels.align_loss(
            leaves[0],
            target.to(kind or dtype),
            leaves[1],
            leaves[2],
            visible=visible,
            normalize=normalize,
            loss=loss,
            per_layer=True,
            eps=0.1,
            backend="reference" if backend == "truth" else backend,
        )
        upstream = torch.arange(1, layers + 1, device=DEVICE, dtype=value.dtype)
        results[backend] = (value.detach(), *torch.autograd.grad(value, leaves, upstream))
    for ours, reference, truth in zip(*results.values(), strict=True):
        assert_as_good_as_reference(ours, reference, truth)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_of_zeros_have_a_zero_gradient(backend: str) -> None:
    student = torch.randn(1, 1, 3, 8, device=DEVICE)
    student[0, 0, 1] = 0
    student.requires_grad_()
    weight, bias = torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    target = torch.randn(1, 1, 3, 8, device=DEVICE)
    target[0, 0, 2] = 0
    loss = kernels.align_loss(student, target, weight, bias, backend=backend)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and not student.grad[0, 0, 1].any()


def before_nan(x: Tensor) -> Tensor:
    """The same numbers, with nothing but NaN in the memory behind them."""
    memory = torch.full((x.numel() + 4096,), float("nan"), device=DEVICE)
    return memory[: x.numel()].view(x.shape).copy_(x)


def test_align_loss_reads_nothing_behind_its_last_row() -> None:
    """Five rows in two backward programs of four: the second has three to leave out, which must not even be read."""
    student, target = (before_nan(torch.randn(1, 1, 5, 20, device=DEVICE)) for _ in range(2))
    weight, bias = (before_nan(torch.randn(1, 20, device=DEVICE)) for _ in range(2))
    gradients = []
    for backend in BACKENDS:
        leaves = [tensor.detach().requires_grad_() for tensor in (student, weight, bias)]
        loss = kernels.align_loss(leaves[0], target, *leaves[1:], loss="mse", backend=backend)
        gradients.append(torch.autograd.grad(loss, leaves))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_align_loss_of_nothing_is_not_a_number_and_has_no_gradient(backend: str) -> None:
    student = torch.randn(2, 3, 0, 8, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(2, 2, 8, device=DEVICE).requires_grad_()
    loss = kernels.align_loss(student, torch.randn(2, 3, 0, 8, device=DEVICE), weight, bias, backend=backend)
    gradients = torch.autograd.grad(loss, (student, weight, bias))
    assert loss.isnan() and gradients[0].shape == student.shape and not any(g.any() for g in gradients[1:])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_align_loss_is_its_formula_and_the_target_gets_no_gradient(backend: str) -> None:
    student, target = torch.randn(2, 3, 2, 5, 8, device=DEVICE).requires_grad_()
    weight, bias = torch.randn(2, 3, 8, device=DEVICE)
    loss = kernels.align_loss(student, target, weight, bias, eps=0.1, backend=backend)
    y = torch.nn.functional.layer_norm(student, (8,), eps=0.1) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(loss, (2 - 2 * torch.nn.functional.cosine_similarity(y, target, dim=-1)).mean())
    assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)


# torch.compile


def everything(x: Tensor, video: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, backend: str) -> Tensor:
    q = x[:, 0].view(2, 2, 16)
    k = x.view(2, 9, 2, 16).transpose(1, 2)
    visible = kernels.semantic_mask(q.detach(), k.detach(), 3, seed, backend=backend)
    rows = kernels.patch_gather(video, visible, patch_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, backend=backend)
    tokens = kernels.token_gather(x[:, 1:], visible, x.new_ones(8, 32), backend=backend) + rows.mean()
    tokens = kernels.attention(*(tokens.view(2, 3, 2, 16),) * 3).flatten(2)
    return kernels.align_loss(tokens[None], x.detach()[None, :, 1:], weight, bias, visible=visible, backend=backend)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    x = torch.randn(2, 9, 32, device=DEVICE, requires_grad=True)
    video = torch.randint(256, (2, 2, 16, 16, 3), dtype=torch.uint8, device=DEVICE)
    weight = torch.ones(1, 32, device=DEVICE, requires_grad=True)
    bias = torch.zeros(1, 32, device=DEVICE, requires_grad=True)
    seed = torch.tensor([3], device=DEVICE)
    eager = everything(x, video, weight, bias, seed, backend)
    expected = torch.autograd.grad(eager, (x, weight, bias))
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    value = compiled(x, video, weight, bias, seed, backend)
    for ours, theirs in zip(torch.autograd.grad(value, (x, weight, bias)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(value, eager)


def test_operators_are_registered_soundly() -> None:
    ops = torch.ops.umt_kernels
    visible = some_visible(2, 6, 3)
    seed = torch.tensor([3], device=DEVICE)
    x = torch.randn(2, 6, 8, device=DEVICE, requires_grad=True)
    student = torch.randn(2, 2, 3, 8, device=DEVICE, requires_grad=True)
    target = torch.randn(2, 2, 6, 8, device=DEVICE)
    affine = [torch.randn(2, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    video = torch.randint(256, (2, 1, 16, 24, 3), dtype=torch.uint8, device=DEVICE)
    cases = [
        (ops.token_gather, (x, visible, torch.randn(6, 8, device=DEVICE))),
        (ops.gather_norm, (x.detach(), visible, torch.randn(8), torch.randn(8), 1e-5)),
        (ops.token_gather_backward, (torch.randn(2, 3, 8), visible, 6)),
        (
            ops.align_loss_backward,
            (
                torch.randn(2, 6),
                *(t.detach() for t in (student, target)),
                visible,
                *(t.detach() for t in affine),
                1e-6,
                True,
                0,
            ),
        ),
        (ops.align_loss, (student, target, visible, *affine, 1e-6, True, 0)),
        (ops.patch_gather, (video, visible, None, None, None, 2, 3, 8, 1, torch.float32, False)),
        (ops.patch_gather, (video, visible, [0.5] * 3, [0.1] * 3, None, 2, 3, 8, 1, torch.float32, True)),
        (ops.semantic_mask, (torch.randn(2, 2, 4), torch.randn(2, 2, 7, 4), 3, seed, True)),
        (ops.sample_visible, (torch.rand(2, 6), 3, seed)),
    ]
    for op, arguments in cases:
        arguments = [
            value.to(DEVICE) if isinstance(value, Tensor) and not value.requires_grad else value for value in arguments
        ]
        report = torch.library.opcheck(op.default, tuple(arguments))
        assert set(report.values()) == {"SUCCESS"}, report
