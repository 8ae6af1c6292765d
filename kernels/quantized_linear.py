"""quantized_linear: a frozen linear layer in 8 bits, its activations quantized row by row as they come.

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

from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels._launch import Backend
from kernels.quantize import LARGEST, TINY, Precision, dequantize_product, largest_of_rows, quantize_rows

QuantizedBackend = Literal["auto", "reference", "onednn", "cublas", "scaled_mm"]
# Before VNNI, oneDNN sums pairs of products in 16 bits, which overflow.
_CPU_MULTIPLIES_INT8 = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
_BACKEND_OF = {("int8", "cpu"): "onednn", ("int8", "cuda"): "cublas", ("fp8", "cuda"): "scaled_mm"}

# Of 3,072 numbers in fp32, that is 3 MiB a core; 128 to 512 rows measure alike (AMX, 2 MiB of L2 a core).
_ROWS_PER_THREAD = 256

_packed_weights = WeakTensorKeyDictionary()


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


def _packed(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own order, made once: weights are frozen."""
    if weight not in _packed_weights:
        _packed_weights[weight] = torch.ops.onednn.qlinear_prepack(weight, None)
    return _packed_weights[weight]


@torch.library.custom_op("umt_kernels::int8_linear_onednn", mutates_args=())
def _int8_linear_onednn(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    packed, zero_points = _packed(weight), torch.zeros(scale.shape, dtype=torch.int64)
    # Quantizing and rescaling take more passes than the product: each block of rows stays in the cores' caches for them.
    rows = _ROWS_PER_THREAD * torch.get_num_threads()
    for block, result in zip(x.split(rows), out.split(rows), strict=True):
        values = block.to(torch.float32, copy=True)
        largest = largest_of_rows(values)
        # VNNI wants unsigned activations: shifted by 128, which oneDNN takes off again; the cast rounds down.
        shifted = values.mul_(127 / largest.clamp_min(TINY)).add_(128.5).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        result.copy_(torch.addcmul(bias, product, largest.div_(127), out=product))
    return out


@_int8_linear_onednn.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


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
    return ((values.double() @ weight.double().t()) * rows * scale + bias).to(x.dtype)


_BACKENDS = {"onednn": _int8_linear_onednn, "cublas": _cublas, "scaled_mm": _scaled_mm, "reference": _reference}


def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, backend: QuantizedBackend = "auto"
) -> Tensor:
    """x @ (weight * scale).T + bias, with x quantized row by row.

    Args:
        x: (..., K) fp32, bf16 or fp16.
        weight, scale: (N, K) int8 or float8_e4m3fn and (N,) fp32, from quantize_weight. Constant: the onednn backend keeps its
            own packed copy of a weight from the first call on. On CUDA K and N are multiples of 16 and x has more than 16
            rows.
        bias: (N,) fp32.
        backend: which library computes it; one that does not fit the weight or the device raises.

    Returns:
        (..., N) in x's dtype. No gradient: for frozen layers.

    Raises:
        ValueError: shapes or dtypes that do not fit, an x that requires a gradient, or a device without such products.
    """
    if weight.dtype not in LARGEST or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
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
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"backend is {backend!r}; choose one of auto, {', '.join(_BACKENDS)}")
    precision = "int8" if weight.dtype == torch.int8 else "fp8"
    if backend != "reference":
        fits = quantized_backend(precision, x.device)
        if backend not in ("auto", fits):
            raise ValueError(f"backend={backend!r} does not fit {precision} on {x.device}; {fits!r} does")
        backend = fits
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("quantized_linear has no gradient, but x requires one; call it on detached x or under no_grad")
    return _BACKENDS[backend](x.reshape(-1, x.shape[-1]), weight, scale, bias).view(*x.shape[:-1], weight.shape[0])
