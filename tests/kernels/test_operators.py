"""What every operator of umt_kernels keeps to, however it is registered."""

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor

import kernels
from kernels import _operator
from kernels._operator import operator, register_autograd, register_fake

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
for module in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"kernels.{module.name}")
NAMES = sorted(_operator._libraries)


@pytest.fixture
def doubled(request: pytest.FixtureRequest):
    """An operator of each test's own. It is kept: torch still names an operator that is gone."""

    @operator(f"doubled_in_{request.node.name}")
    def doubled(x: Tensor, scale: float) -> Tensor:
        return x * scale

    @register_fake(doubled)
    def _(x, scale):
        return torch.empty_like(x)

    return doubled


def test_the_operators_are_found() -> None:
    assert len(NAMES) >= 18 and {"token_gather", "layer_norm_backward", "mlp", "int8_mlp_onednn"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_says_what_a_compiler_asks(name: str) -> None:
    op = getattr(torch.ops.umt_kernels, name).default
    assert torch.Tag.pt2_compliant_tag in op.tags
    assert (torch.Tag.flexible_layout in op.tags) == (not name.endswith("onednn"))
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Meta")
    written = [argument.name for argument in op._schema.arguments if argument.is_write]
    assert bool(written) == (name.endswith("_out") or "add_" in name)
    assert not written or not op._schema.returns


def test_a_change_in_place_is_seen_by_autograd() -> None:
    """Its version counter rises, so that a backward pass that needs the old values refuses."""
    out = torch.ones(4, 4, device=DEVICE)
    weight = torch.ones(4, 4, device=DEVICE, requires_grad=True)
    product = (weight * out).sum()
    x = torch.ones(16, 4, device=DEVICE)
    kernels.weight_gradient(x, x, out=out, backend="triton")
    assert out.min() > 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():  # such tensors count no versions
        out = torch.zeros(4, 4, device=DEVICE)
        assert kernels.weight_gradient(x, x, out=out, backend="triton") is out and out.min() > 0


def test_an_operator_can_be_defined_again(doubled) -> None:
    """As where a notebook loads a changed module again."""
    register_autograd(doubled, lambda ctx, grad: (grad * 2, None))
    x = torch.ones(3, requires_grad=True)
    doubled(x, 2.0).sum().backward()
    assert x.grad.tolist() == [2.0] * 3

    @operator(doubled.name().removeprefix("umt_kernels::"))
    def again(x: Tensor, scale: float) -> Tensor:
        return x * scale + 1

    assert getattr(torch.ops.umt_kernels, doubled.name().removeprefix("umt_kernels::"))(torch.ones(1), 2.0).item() == 3
    assert again(torch.ones(1), 2.0).item() == 3
    module = importlib.import_module("kernels.token_gather")
    importlib.reload(module)
    table, kept = torch.randn(1, 5, 8, device=DEVICE, requires_grad=True), torch.tensor([[3, 1]], device=DEVICE)
    module.token_gather(table, kept, backend="triton").sum().backward()
    assert table.grad.sum(2)[0].tolist() == [0, 8, 0, 8, 0]


def test_a_kernel_is_not_traced_where_compiled_code_breaks(doubled) -> None:
    """A frame that the compiler gives up calls operators eagerly, with the compiler still watching what they call."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def given_up(x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = doubled(x, 2.0)
        return x

    assert torch.compile(given_up, backend=backend)(torch.ones(2)).tolist() == [4, 4]
    assert not any("mul" in str(node.target) for g in graphs for node in g.graph.nodes)


def test_frozen_operations_detach() -> None:
    """No operator without a gradient is given a tensor that wants one: PyTorch would only warn, in backward."""
    q, k = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True), torch.randn(2, 3, 6, 8, device=DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    scale, bias = (torch.ones(4, device=DEVICE, requires_grad=True) for _ in range(2))
    product, rows = torch.ones(2, 4, dtype=torch.int32, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    for backend in ("triton", "reference"):
        visible, scores = kernels.semantic_mask(q, k, 2, seed, return_scores=True, backend=backend)
        assert not scores.requires_grad
        drawn = kernels.sample_visible(scores.clone().requires_grad_(), 2, seed, backend=backend)
        assert (drawn == visible).all()
        assert not kernels.dequantize_product(product, rows, scale, bias, torch.float32, backend=backend).requires_grad
        affine = torch.ones(2, 8, device=DEVICE).requires_grad_()
        assert not kernels.gather_norm(q, None, *affine, backend=backend).requires_grad
