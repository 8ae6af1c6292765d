"""The modules against torch.nn in float64, and the conventions of nn.Module."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import kernels
from tests.kernels.truth import assert_as_good_as_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "reference"]


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTS = {"none": nn.Identity, "gelu": nn.GELU, "quick_gelu": QuickGELU}


class PlainMlp(nn.Module):
    """With the names of timm's."""

    def __init__(self, width: int, hidden: int, outputs: int, bias: bool, act: str) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden, bias), ACTS[act](), nn.Linear(hidden, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and the plain one in fp32, with the same random parameters."""
    kind, *words = name.split()
    bias = "biasless" not in words
    act = next((word for word in words if word in ACTS), "gelu" if kind == "mlp" else "none")
    if kind == "norm":
        ours, plain = kernels.LayerNorm(20, 1e-3), nn.LayerNorm(20, 1e-3)
    elif kind == "linear":
        ours = kernels.Linear(20, 12, bias, activation=act)
        plain = nn.Sequential(nn.Linear(20, 12, bias), ACTS[act]())
    else:
        save = "both" if "both" in words else "pre"
        ours, plain = kernels.Mlp(20, 28, 12, bias=bias, activation=act, save=save), PlainMlp(20, 28, 12, bias, act)
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    (plain[0] if kind == "linear" else plain).load_state_dict(ours.state_dict())
    return ours.to(DEVICE), plain.to(DEVICE)


NAMES = [
    *("norm", "linear", "linear gelu", "linear quick_gelu biasless"),
    *("mlp", "mlp quick_gelu", "mlp biasless", "mlp both"),
]


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(name: str, more: bool) -> None:
    """Also with the branch or the residual."""
    x = torch.randn(2, 3, 20, device=DEVICE)
    added = torch.randn(2, 3, 20 if name == "norm" else 12, device=DEVICE)
    found: dict[str, list[Tensor]] = {}
    for backend in (*BACKENDS, "truth"):
        ours, plain = pair(name)
        module = plain.double() if backend == "truth" else ours
        kind = torch.float64 if backend == "truth" else torch.float32
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, added)]
        if backend != "truth":
            module.backend = backend
            out = module(*leaves) if more else module(leaves[0])
        elif name == "norm":
            z = leaves[0] + leaves[1] if more else leaves[0]
            out = (module(z), z) if more else module(z)
        else:
            out = module(leaves[0]) + (leaves[1] if more else 0)
        outs = out if isinstance(out, tuple) else (out,)
        wanted = [*leaves[: 1 + more], *module.parameters()]
        upstream = [torch.linspace(-1, 1, part.numel(), dtype=kind, device=DEVICE).view(part.shape) for part in outs]
        found[backend] = [*(part.detach() for part in outs), *torch.autograd.grad(outs, wanted, upstream)]
    for triton, reference, truth in zip(*found.values(), strict=True):
        assert triton.dtype == torch.float32
        assert_as_good_as_reference(triton, reference, truth)


@pytest.mark.parametrize("name", NAMES)
def test_conventions(name: str) -> None:
    ours, plain = pair(name)
    x = torch.randn(4, 20, device=DEVICE)
    torch.testing.assert_close(ours(x), plain(x))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x), ours(x)) and repr(again) == repr(ours)
        assert {id(p) for p in again.parameters()}.isdisjoint(id(p) for p in ours.parameters())
    half = copy.deepcopy(ours).half()
    assert half(x.half()).dtype == torch.float16
    with torch.device("meta"):
        meta = copy.deepcopy(ours).to("meta")
    shape = meta(x.to("meta"))
    assert shape.is_meta and shape.shape == ours(x).shape
    filled = meta.to_empty(device=DEVICE)
    filled.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(filled(x), ours(x))


def test_factory_arguments_and_repr() -> None:
    made = {"device": "meta", "dtype": torch.bfloat16}
    modules = [kernels.LayerNorm(8, out_dtype=torch.bfloat16, **made), kernels.Linear(8, 4, activation="gelu", **made)]
    modules.append(kernels.Mlp(8, **made))
    for module in modules:
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    assert repr(modules[0]) == "LayerNorm(8, eps=1e-05, out_dtype=torch.bfloat16)"
    assert repr(modules[1]) == "Linear(in_features=8, out_features=4, bias=True, activation='gelu')"
    assert "activation='gelu', save='pre'" in repr(modules[2])
    assert [*modules[2].state_dict()] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert modules[2].fc1.weight.shape == modules[2].fc2.weight.shape == (8, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_fp32_stream_gives_half_numbers_to_the_product_behind_it(backend: str) -> None:
    norm = kernels.LayerNorm(16, out_dtype=torch.float16, backend=backend, device=DEVICE)
    mlp = kernels.Mlp(16, 32, backend=backend, device=DEVICE)
    stream = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    normed, summed = norm(stream, torch.randn(3, 16, device=DEVICE, dtype=torch.float16))
    out = mlp(normed, residual=summed)
    assert (normed.dtype, summed.dtype, out.dtype) == (torch.float16, torch.float32, torch.float32)
    out.sum().backward()
    assert mlp.fc1.weight.grad.dtype == stream.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_obeyed_as_by_torch(name: str, backend: str) -> None:
    ours, plain = pair(name)
    ours.backend = backend
    x = torch.randn(4, 20, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, expected = ours(x), plain(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.compile
@pytest.mark.parametrize("name", ["norm", "linear gelu", "mlp"])
def test_they_compile(name: str) -> None:
    ours, _ = pair(name)
    x = torch.randn(4, 20, device=DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours(x).square().sum().backward()
    for p, gradient in zip(ours.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"normalized_shape is \(3, 4\)"):
        kernels.LayerNorm((3, 4))
    with pytest.raises(ValueError, match="activation is 'relu'; choose one of none, gelu, quick_gelu"):
        kernels.Linear(3, 4, activation="relu")
    with pytest.raises(ValueError, match="activation is 'none' and save 'pre'"):
        kernels.Mlp(3, activation="none")


def test_branches_are_scaled_and_streams_come_back() -> None:
    """What the functions take, the modules do."""
    norm, mlp = kernels.LayerNorm(20).to(DEVICE), kernels.Mlp(20, 30).to(DEVICE)
    x, scale = torch.randn(3, 5, 20, device=DEVICE), torch.tensor([0.0, 1.0, 2.0], device=DEVICE).view(3, 1, 1)
    normed, summed = norm(x, x.cos(), branch_scale=scale)
    torch.testing.assert_close(summed, x + x.cos() * scale)
    torch.testing.assert_close(normed, norm(summed))
    assert norm(x, with_stream=True)[1] is x
    torch.testing.assert_close(mlp(x, x, branch_scale=scale), mlp(x) * scale + x)
