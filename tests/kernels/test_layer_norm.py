"""layer_norm and its gradients against float64: with and without a branch, of streams and results of different dtypes."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels.layer_norm import MAX_CHANNELS
from tests.kernels.truth import assert_as_good_as_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (stream, branch, result)
KINDS = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    pytest.param((torch.float16, torch.bfloat16, torch.float32), marks=pytest.mark.slow),
    # The interpreter cuts bf16 off: its sums would be twice as far off as rounded ones.
    pytest.param((torch.bfloat16, torch.bfloat16, torch.float32), marks=pytest.mark.gpu),
    pytest.param((torch.float16, torch.float16, torch.float16), marks=pytest.mark.slow),
]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(*shape: int) -> list[Tensor]:
    """A stream far from zero mean, a branch, weight and bias; of strides that lie apart."""
    x = (torch.randn(*shape[:-1], shape[-1] + 3, device=DEVICE) + 5)[..., 3:]
    branch = torch.randn(shape[-1], *shape[:-1], device=DEVICE).movedim(0, -1)
    return [x, branch, *torch.randn(shape[-1], 2, device=DEVICE).T]


def exact(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In float64, by its formula."""
    z = x if branch is None else x + branch * (1 if scale is None else scale.double())
    centered = z - z.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + bias, z


@pytest.mark.parametrize("with_branch", [False, True, "scaled"])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 20), (70, 48), (9, 768), (0, 16), (2, 0, 8), (17,)])
def test_value_and_gradients(shape: tuple[int, ...], kinds: tuple[torch.dtype, ...], with_branch: bool | str) -> None:
    x, branch, weight, bias = inputs(*shape)
    # A factor for each of the first axis, and one of them zero: what stochastic depth drops.
    scale = torch.arange(shape[0], device=DEVICE).float().view(-1, *(1,) * (len(shape) - 1)) if len(shape) > 1 else None
    scale = scale if with_branch == "scaled" else None
    x, branch = x.to(kinds[0]), branch.to(kinds[1])
    upstream = [torch.randn(*shape, device=DEVICE).to(kind) for kind in (kinds[2], kinds[0])]
    results = []
    for backend in ("triton", "reference", None):
        leaves = [t.detach().clone() if backend else t.detach().double() for t in (x, branch, weight, bias)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        used = (leaves[0], leaves[1] if with_branch else None, *leaves[2:])
        if backend is None:
            y, z = exact(*used, scale)
        else:
            options = {"branch": used[1], "branch_scale": scale, "dtype": kinds[2], "backend": backend}
            out = kernels.layer_norm(used[0], *used[2:], 0.1, **options)
            y, z = out if with_branch else (out, None)
            assert y.dtype == kinds[2] and (z is None or z.dtype == kinds[0])
        outputs = [y, z] if with_branch else [y]
        wanted = leaves if with_branch else [leaves[0], *leaves[2:]]
        ups = [up.to(o.dtype) for up, o in zip(upstream, outputs, strict=False)]
        gradients = torch.autograd.grad(outputs, wanted, ups)
        if backend is not None:
            assert [g.dtype for g in gradients] == [leaf.dtype for leaf in wanted]
        results.append([*(o.detach() for o in outputs), *gradients])
    for ours, reference, truth in zip(*results, strict=True):
        assert_as_good_as_reference(ours, reference, truth, computed_in=kinds[0])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_result_that_nobody_uses_costs_no_gradient(backend: str) -> None:
    """The stream's own gradient alone, or the norm's alone."""
    x, branch, weight, bias = (t.detach().requires_grad_() for t in inputs(4, 20))
    _, z = kernels.layer_norm(x, weight, bias, branch=branch, branch_scale=torch.full((1,), 0.5), backend=backend)
    assert (torch.autograd.grad(z.sum(), branch)[0] == 0.5).all()
    y, z = kernels.layer_norm(x, weight, bias, branch=branch, backend=backend)
    gradients = torch.autograd.grad(z.sum(), (x, branch, weight, bias), retain_graph=True, allow_unused=True)
    assert (gradients[0] == 1).all() and (gradients[1] == 1).all()
    assert all(g is None or not g.any() for g in gradients[2:])
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x)[0],
        torch.autograd.grad(torch.nn.functional.layer_norm(x + branch, (20,), weight, bias).square().sum(), x)[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_it_is_one_graph_and_a_sound_operator() -> None:
    x, branch, weight, bias = (t.detach().requires_grad_() for t in inputs(6, 20))

    def both(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, z = kernels.layer_norm(x * 2, weight, bias, branch=branch, backend="triton")
        return (y.sin() * z).sum()

    expected = torch.autograd.grad(both(x, branch, weight, bias), (x, branch, weight, bias))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x, branch, weight, bias), (x, branch, weight, bias)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    for given, scale in ((None, None), (branch, None), (branch, torch.rand(6, device=DEVICE))):
        arguments = (x, given, scale, weight, bias, 1e-5, torch.float32)
        torch.library.opcheck(torch.ops.umt_kernels.layer_norm.default, arguments)
    statistics = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    for kind, scale in ((None, None), (torch.bfloat16, torch.rand(6, device=DEVICE))):
        arguments = (torch.randn(6, 20, device=DEVICE), None, x.detach(), *statistics, scale, weight.detach(), kind)
        torch.library.opcheck(torch.ops.umt_kernels.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_stream_comes_back_with_its_gradient(kind: torch.dtype) -> None:
    """Values and gradients are those of the norm beside x, and no gradient is added outside the norm's backward pass."""
    x, _, weight, bias = (t.detach().requires_grad_() for t in inputs(3, 5, 20))
    found = []
    for with_stream in (True, False):
        leaf = x * 1  # not a leaf: a view of one may not be changed
        if with_stream:
            y, stream = kernels.layer_norm(leaf, weight, bias, with_stream=True, dtype=kind, backend="triton")
        else:
            y, stream = kernels.layer_norm(leaf, weight, bias, dtype=kind, backend="reference"), leaf
        assert torch.equal(stream, leaf) and y.dtype == kind
        loss = y.float().square().sum() + (stream * stream.detach().cos()).sum()
        with torch.profiler.profile() as profile:
            gradients = torch.autograd.grad(loss, (leaf, weight, bias))
        found.append((y.detach(), *gradients))
        names = [event.name for event in profile.events()]
        assert ("aten::add" in names or "aten::add_" in names) is not with_stream, names
    step = 2e-2 if kind == torch.bfloat16 else 1e-5
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=step, atol=step)
    with torch.no_grad():
        assert kernels.layer_norm(x, weight, bias, with_stream=True, backend="triton")[1] is x
    y, stream = kernels.layer_norm(x, weight, bias, with_stream=True, backend="triton")
    (alone,) = torch.autograd.grad(stream.sum(), x)
    assert (alone == 1).all()


def test_second_gradients_are_refused() -> None:
    x, _, weight, bias = (t.detach().requires_grad_() for t in inputs(4, 20))
    for with_stream in (False, True):
        y = kernels.layer_norm(x, weight, bias, with_stream=with_stream, backend="triton")
        (gradient,) = torch.autograd.grad((y[0] if with_stream else y).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_what_does_not_fit_is_named() -> None:
    x, one = torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"x is torch.int64 \(2, 8\)"):
        kernels.layer_norm(x.long(), one, one)
    with pytest.raises(ValueError, match=r"weight and bias are torch.float32 \(7,\) and torch.float32 \(8,\)"):
        kernels.layer_norm(x, one[:7], one)
    with pytest.raises(ValueError, match=r"branch is torch.float32 \(1, 8\)"):
        kernels.layer_norm(x, one, one, branch=x[:1])
    with pytest.raises(ValueError, match="branch_scale is that of a branch"):
        kernels.layer_norm(x, one, one, branch_scale=one[:1])
    with pytest.raises(
        ValueError, match=r"branch_scale is torch.float32 \(8,\); it must be float32 that broadcasts to \(2, 1\)"
    ):
        kernels.layer_norm(x, one, one, branch=x, branch_scale=one)
    with pytest.raises(ValueError, match="dtype is torch.int8"):
        kernels.layer_norm(x, one, one, dtype=torch.int8)
    with pytest.raises(ValueError, match="8 channels of torch.float64.*backend='reference'"):
        kernels.layer_norm(x.double(), one, one, backend="triton")
    wide = torch.ones(1, MAX_CHANNELS + 1, device=DEVICE)
    with pytest.raises(ValueError, match="16385 channels of torch.float32; the kernel takes at most 16384"):
        kernels.layer_norm(wide, wide[0], wide[0], backend="triton")
