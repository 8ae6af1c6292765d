"""Linear layers by the library that is fastest where the tensors are: on CPUs oneDNN, where PyTorch would not take it.

    library_linear:  x @ W.T + bias, differentiable
    library_product: A @ B.T of matrices, for backward passes
    frozen_linear:   act(x @ W.T + bias) of a weight that stays, in oneDNN's own order

PyTorch gives fp32 products to MKL, which on CPUs of other makers than Intel runs at half of what oneDNN reaches there. A
constant weight in the order that oneDNN's kernels read saves another 3 to 20%, and its activation costs no pass. Elsewhere,
under autocast and in compiled code, all of them are F.linear.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

FrozenActivation = Literal["none", "gelu", "silu"]
_ATTRIBUTES = {"none": ("none", ""), "gelu": ("gelu", "none"), "silu": ("swish", "")}
# Of each weight: what it was packed from, and the packed one.
_packed_weights = WeakTensorKeyDictionary()


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows = 1
    for extent in x[:-1]:
        rows *= extent
    return 2 * rows * x[-1] * weight[0]


@functools.cache
def mkl_is_slow() -> bool:
    """Whether PyTorch's fp32 products come from an MKL that does not know this CPU. The same at every start of a machine."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _eager(*tensors: Tensor) -> bool:
    """Whether all are CPU tensors with values, in code that nobody traces."""
    # Under torch.func's transforms a tensor's values lie in another one.
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()) and all(
        tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter) for tensor in tensors
    )


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.numel() > 0
        and b.ndim == 2
        and a.shape[-1] == b.shape[1]
        and _eager(a, b)
        and mkl_is_slow()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, need = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        dx = _onednn(rows, weight.t()).view(x.shape) if need[0] else None
        dw = _onednn(rows.t(), x.reshape(-1, x.shape[-1]).t()) if need[1] else None
        return dx, dw, rows.sum(0) if need[2] else None


def library_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) for x (..., K), weight (N, K) and bias (N,) or None, differentiable once where oneDNN
    computes it."""
    # What does not fit is left to F.linear, which says so.
    by_onednn = _by_onednn(x, weight) and (bias is None or bias.shape == weight.shape[:1] and bias.dtype == x.dtype)
    return _Linear.apply(x, weight, bias) if by_onednn else F.linear(x, weight, bias)


def library_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for a (M, K) and b (N, K) of any strides; no gradient where oneDNN computes it. Raises ValueError for other
    shapes."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be (M, K) and (N, K)")
    return _onednn(a.detach(), b.detach()) if _by_onednn(a, b) else a @ b.t()


def _packed(weight: Tensor, rows: int) -> Tensor:
    origin = (weight.data_ptr(), weight._version, weight.dtype)
    known = _packed_weights.get(weight)
    if known is None or known[0] != origin:
        known = origin, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        _packed_weights[weight] = known
    return known[1]


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether frozen_linear keeps a packed copy of the weight for such an x."""
    return (
        x.dtype == weight.dtype
        and x.numel() > 0
        and _eager(x, weight)
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: FrozenActivation = "none"
) -> Tensor:
    """act(x @ weight.T + bias) of a frozen layer.

    Args:
        x: (..., K). weight: (N, K) in x's dtype; on a CPU a packed copy of it is kept as long as it lives, and made again when
            its values change. bias: (N,) or None.
        activation: "none", "gelu" (exact) or "silu".

    Returns:
        (..., N) in x's dtype. No gradient.

    Raises:
        ValueError: an unknown activation, shapes that do not fit, or an x that requires a gradient.
    """
    if activation not in _ATTRIBUTES:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(_ATTRIBUTES)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("frozen_linear has no gradient, but x requires one; call it on detached x or under no_grad")
    if (
        weight.ndim != 2
        or not x.ndim
        or x.shape[-1] != weight.shape[1]
        or bias is not None
        and len(bias) != len(weight)
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} must be "
            "(..., K), (N, K) and (N,) or None"
        )
    if packs(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        name, algorithm = _ATTRIBUTES[activation]
        bias = None if bias is None else bias.detach()
        out = torch.ops.mkldnn._linear_pointwise(rows, _packed(weight, len(rows)), bias, name, [], algorithm)
        return out.view(*x.shape[:-1], weight.shape[0])
    with torch.no_grad():
        out = F.linear(x, weight, bias)
        return out if activation == "none" else F.gelu(out) if activation == "gelu" else F.silu(out, inplace=True)
