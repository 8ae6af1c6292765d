"""quantized_linear: a frozen linear layer in 8 bits, its activations quantized row by row as they come; quantized_mlp: a
pre-norm MLP of two of them.

    r = max|x[i]| / 127,  a = round(x[i] / r);    c = max|w[j]| / 127,  b = round(w[j] / c)
    out[i, j] = r[i] * c[j] * (a[i] . b[j]) + bias[j]

int8: the products are summed exactly in int32. fp8 (e4m3): the same with 448 in place of 127, float rounding in place of
integers, and sums in fp32. Each number is off by at most r / 2 or c / 2 (int8), or 1/16 of itself (fp8, above its
smallest normal number). 2*M*N*K operations on M*K + N*K bytes, at two to four times the rate of bf16 or fp32; what
quantizing and rescaling move besides is in quantize.py.

Backends: "reference" (float64 products: the definition), "onednn" (int8, CPUs with VNNI or AMX), "cublas" (int8 on CUDA) and
"scaled_mm" (fp8, compute capability 9.0 and above; bias and result are rounded to bf16). "auto" takes the one that fits
weight and device and raises where none does. Neither CUDA backend has been run on a GPU yet.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import Backend, one_device
from kernels.cpu_quantized import int8_linear, int8_mlp
from kernels.quantize import LARGEST, Precision, dequantize_product, quantize_rows
from kernels.token_gather import gather_norm

QuantizedBackend = Literal["auto", "reference", "onednn", "cublas", "scaled_mm"]
# Before VNNI, oneDNN sums pairs of products in 16 bits, which overflow.
_CPU_MULTIPLIES_INT8 = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
_BACKEND_OF = {("int8", "cpu"): "onednn", ("int8", "cuda"): "cublas", ("fp8", "cuda"): "scaled_mm"}


class Norm(NamedTuple):
    """A LayerNorm before a layer: weight and bias (K,), and its eps. Statistics and affine are fp32."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


class Quantized(NamedTuple):
    """A linear layer: weight (N, K) in 8 bits and scale fp32 (N,) from quantize_weight, bias fp32 (N,)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def quantize_weight(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> its 8-bit values (N, K) and fp32 scales (N,) of its output channels."""
    # Made once, and for devices that lack fp8 too.
    values, scale = quantize_rows(weight.float(), precision, backend="reference")
    return values, scale.flatten()


def quantized_backend(precision: Precision, device: torch.device) -> str:
    """The backend "auto" takes for weights of this precision. Raises ValueError where the device has none."""
    backend = _BACKEND_OF.get((precision, device.type))
    if backend is None:
        raise ValueError(
            f"{precision} has no backend on {device.type}; int8 runs on CPUs with VNNI and on CUDA, fp8 on Hopper"
        )
    if backend == "onednn" and not _CPU_MULTIPLIES_INT8:
        raise ValueError("int8 on a CPU needs AVX512-VNNI or AMX, which this one lacks; use the native precision")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        wanted, has = (8, 0) if precision == "int8" else (9, 0), torch.cuda.get_device_capability(device)
        if has < wanted:
            raise ValueError(
                f"{precision} needs compute capability {wanted[0]}.{wanted[1]}; this GPU has {has[0]}.{has[1]}"
            )
    return backend


def _backend() -> Backend:
    # A compiler fuses the plain quantizer into what makes x, and the plain rescaling into what takes the product: it can see
    # into neither kernel. Run eagerly, each plain operation passes over the whole tensor, a kernel once.
    return "reference" if torch.compiler.is_compiling() else "auto"


def _cublas(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    values, rows = quantize_rows(x, "int8", backend=_backend())
    return dequantize_product(torch._int_mm(values, weight.t()), rows, scale, bias, x.dtype, backend=_backend())


def _scaled_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    values, rows = quantize_rows(x, "fp8", backend=_backend())
    # The product adds its bias in fp32 before it rounds; with scales per row it takes it in bf16 alone.
    bias = bias.to(torch.bfloat16)
    out = torch._scaled_mm(
        values, weight.t(), rows, scale[None], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out.to(x.dtype)


def _reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    values, rows = quantize_rows(x, "int8" if weight.dtype == torch.int8 else "fp8", backend="reference")
    return ((values.double() @ weight.double().t()) * rows * scale.detach() + bias.detach()).to(x.dtype)


def _constants(weight: Tensor, scale: Tensor, bias: Tensor) -> Quantized:
    # The weight itself: it is known by its identity, and takes no gradient.
    return Quantized(weight, scale.detach(), bias.detach())


def _affine(norm: Norm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _onednn(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return int8_linear(x.detach(), *_constants(weight, scale, bias), None, None, 0.0)


_BACKENDS = {"onednn": _onednn, "cublas": _cublas, "scaled_mm": _scaled_mm, "reference": _reference}


def _check_layer(x: Tensor, inputs: int, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
    if not x.ndim or weight.dtype not in LARGEST or weight.ndim != 2 or weight.shape[1] != inputs:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)} and x {tuple(x.shape)}; they must be int8 or float8_e4m3fn "
            "(N, K) and (..., K)"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; it must be float32, bfloat16 or float16")
    if scale.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"scale is {scale.dtype} and bias {bias.dtype}; both must be float32")
    if scale.shape != weight.shape[:1] or bias.shape != weight.shape[:1]:
        raise ValueError(f"scale {tuple(scale.shape)} and bias {tuple(bias.shape)} must be ({weight.shape[0]},)")
    one_device(x=x, weight=weight, scale=scale, bias=bias)


def _check_norm(x: Tensor, norm: Norm) -> None:
    if not isinstance(norm, Norm):
        raise ValueError(f"norm is a {type(norm).__name__}; it must be a kernels.Norm of weight, bias and eps")
    if norm.weight.shape != x.shape[-1:] or norm.bias.shape != x.shape[-1:]:
        raise ValueError(
            f"norm's weight {tuple(norm.weight.shape)} and bias {tuple(norm.bias.shape)} must be ({x.shape[-1]},)"
        )


def _chosen(x: Tensor, weight: Tensor, backend: str, name: str) -> str:
    """The backend that computes."""
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"backend is {backend!r}; choose one of auto, {', '.join(_BACKENDS)}")
    precision = "int8" if weight.dtype == torch.int8 else "fp8"
    if backend != "reference":
        fits = quantized_backend(precision, x.device)
        if backend not in ("auto", fits):
            raise ValueError(f"backend={backend!r} does not fit {precision} on {x.device}; {fits!r} does")
        backend = fits
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} has no gradient, but x requires one; call it on detached x or under no_grad")
    return backend


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm of x (..., K) in x's dtype."""
    # Eager on a GPU, one kernel moves a fifth of the bytes of cast, norm and cast; a compiler fuses those itself.
    if x.is_cuda and not torch.compiler.is_compiling():
        rows = x.reshape(1, -1, x.shape[-1])
        return gather_norm(rows, None, norm.weight, norm.bias, eps=norm.eps).view(x.shape)
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    norm: Norm | None = None,
    backend: QuantizedBackend = "auto",
) -> Tensor:
    """x @ (weight * scale).T + bias, with x quantized row by row; of LayerNorm(x) with norm.

    Args:
        x: (..., K) fp32, bf16 or fp16.
        weight, scale: (N, K) int8 or float8_e4m3fn and (N,) fp32, from quantize_weight. Constant: the onednn backend keeps its
            own packed copy of a weight from the first call on. On CUDA K and N are multiples of 16 and x has more than 16
            rows.
        bias: (N,) fp32.
        norm: of x, computed on the way; on CPUs nothing is rounded between it and the quantizer.
        backend: which library computes it; one that does not fit the weight or the device raises.

    Returns:
        (..., N) in x's dtype. No gradient: for frozen layers.

    Raises:
        ValueError: shapes or dtypes that do not fit, an x that requires a gradient, or a device without such products.
    """
    _check_layer(x, x.shape[-1] if x.ndim else 0, weight, scale, bias)
    if norm is not None:
        _check_norm(x, norm)
    chosen = _chosen(x, weight, backend, "quantized_linear")
    if norm is not None and chosen == "onednn":
        out = int8_linear(x.detach().reshape(-1, x.shape[-1]), *_constants(weight, scale, bias), *_affine(norm))
    else:
        x = x if norm is None else _normed(x, norm)
        out = _BACKENDS[chosen](x.reshape(-1, x.shape[-1]), weight, scale, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def quantized_mlp(
    x: Tensor,
    norm: Norm,
    first: Quantized,
    second: Quantized,
    *,
    activation: Literal["gelu", "quick_gelu"],
    backend: QuantizedBackend = "auto",
) -> Tensor:
    """x + second(act(first(LayerNorm(x)))), the rows of both layers' inputs quantized as they come.

    Args:
        x: (..., K) fp32, bf16 or fp16.
        norm: before the MLP.
        first, second: weights (H, K) and (K, H); see quantized_linear.
        activation: "gelu" (exact) or "quick_gelu", x * sigmoid(1.702 x).
        backend: as of quantized_linear. On CPUs the hidden layer stays in the caches, in fp32; elsewhere it has x's dtype.

    Returns:
        (..., K) in x's dtype. No gradient: for frozen layers.

    Raises:
        ValueError: as quantized_linear; an unknown activation.
    """
    _check_layer(x, x.shape[-1] if x.ndim else 0, *first)
    _check_norm(x, norm)
    _check_layer(x, first.weight.shape[0], *second)
    if second.weight.shape[0] != x.shape[-1]:
        raise ValueError(f"second's weight is {tuple(second.weight.shape)}; it must be ({x.shape[-1]}, H) as x has")
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"activation is {activation!r}; choose gelu or quick_gelu")
    chosen = _chosen(x, first.weight, backend, "quantized_mlp")
    if chosen == "onednn":
        rows = x.detach().reshape(-1, x.shape[-1])
        layers = (part for layer in (first, second) for part in _constants(*layer))
        return int8_mlp(rows, *_affine(norm), *layers, activation).view(x.shape)
    hidden = _normed(x, norm)
    if activation == "gelu":
        return x + quantized_linear(F.gelu(quantized_linear(hidden, *first, backend=chosen)), *second, backend=chosen)
    # x * sigmoid(ax) = silu(ax) / a: a pass in place, and both factors ride on the products.
    a = 1.702
    hidden = quantized_linear(hidden, first.weight, first.scale * a, first.bias * a, backend=chosen)
    hidden = F.silu(hidden, inplace=True)
    return x + quantized_linear(hidden, second.weight, second.scale / a, second.bias, backend=chosen)
