"""Which backend an operation takes, and the checks all operations share.

The tensor's device decides: CUDA tensors take the Triton kernel, all others the plain PyTorch reference. Forcing the
Triton backend on CPU tensors works only under Triton's interpreter (TRITON_INTERPRET=1) and raises otherwise.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

log = logging.getLogger("kernels")

Backend = Literal["auto", "reference", "triton"]
BACKENDS = ("auto", "reference", "triton")
# Of every launch, because the default is the triton release's: on up to 3.8, off since 3.9. Off, a product is rounded before
# it is added to something, as PyTorch's own operators round it. On, the two are one instruction: for kernels whose arithmetic
# would take longer than their bytes.
COMPILER_OPTIONS, FUSED_OPTIONS = {"enable_fp_fusion": False}, {"enable_fp_fusion": True}
# What the kernels compute with: fp32, and what is widened to it.
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# Of a kernel whose program holds a row in registers.
MAX_CHANNELS = 16384

# Asked here, since torch.compile of torch 2.11 cannot follow the question.
_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))

_forced: contextvars.ContextVar[str] = contextvars.ContextVar("kernels_backend", default="auto")
_checked: contextvars.ContextVar[bool] = contextvars.ContextVar("kernels_checked", default=False)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; must be set before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def force_backend(backend: Backend) -> Iterator[None]:
    """Within the block, operations called with backend="auto" take this backend. For tests and comparisons."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _say_slow_once(device: str) -> None:
    log.warning(
        "WARNING: there are no Triton kernels of umt_fast for %s tensors: every operation takes its plain PyTorch reference, "
        "which is correct and slow",
        device,
    )


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the Triton kernel runs for this tensor.

    Raises ValueError for an unknown backend, or for backend="triton" where no Triton kernel can run.
    """
    if backend == "auto" and not torch.compiler.is_compiling():
        backend = _forced.get()
    if backend == "auto":
        if tensor.device.type not in ("cuda", "cpu", "meta") and not torch.compiler.is_compiling():
            _say_slow_once(tensor.device.type)
        return tensor.device.type == "cuda"
    if backend == "reference":
        return False
    if backend != "triton":
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if tensor.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"backend='triton' needs a CUDA tensor, this one is on {tensor.device}; "
            "use backend='auto', or set TRITON_INTERPRET=1 before importing triton to interpret the kernel"
        )
    return True


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Within the block, index values are checked on the GPU too, as they always are on the CPU.

    Each check makes the host wait for the device: for finding a mistake, not for training.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def values_can_be_checked(tensor: Tensor) -> bool:
    """Whether reading this tensor's values on the host is possible and free, or asked for by checked()."""
    # Fake tensors, of another type, have no values.
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or not tensor.numel():
        return False
    return tensor.device.type == "cpu" or _checked.get()


def check_visible(visible: Tensor, batch: int, tokens: int) -> None:
    """Refuses indices of the wrong shape or type and, on the CPU or within checked(), out of range."""
    if visible.ndim != 2 or visible.shape[0] != batch or visible.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"visible is {visible.dtype} {tuple(visible.shape)}; it must be int32 or int64 of shape ({batch}, n)"
        )
    if values_can_be_checked(visible):
        low, high = visible.aminmax()
        if low < 0 or high >= tokens:
            raise IndexError(f"visible holds indices in [{low}, {high}]; they must lie in [0, {tokens})")


def one_device(**tensors: Tensor | None) -> None:
    """Refuses tensors, given by their names, that are not on the device of the first."""
    (first, anchor), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first} on {anchor.device}; all tensors must be on one device"
            )


def row_scale(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """The factors of the rows of x (..., K), given as fp32 that broadcasts to (..., 1), side by side: (rows,)."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        raise ValueError(f"branch_scale is {scale!r}; it must be a tensor, as torch.tensor([0.5])")
    one_device(x=x, branch_scale=scale)
    shape = (*x.shape[:-1], 1)
    broadcasts = scale.ndim <= x.ndim and all(a in (1, b) for a, b in zip(scale.shape[::-1], shape[::-1], strict=False))
    if scale.dtype != torch.float32 or scale.requires_grad or not broadcasts:
        raise ValueError(
            f"branch_scale is {scale.dtype} {tuple(scale.shape)}{' with a gradient' * scale.requires_grad}; it must be "
            f"float32 that broadcasts to {shape}, without a gradient"
        )
    return scale.expand(shape).reshape(-1).contiguous()  # one number for all rows would stay one


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return kind in _AUTOCAST and torch.is_autocast_enabled(kind)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which a reference computes in the dtypes it is given, as the kernels do under autocast."""
    kind = tensor.device.type
    if autocasts(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def check_out(
    out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor | None, name: str = "out"
) -> None:
    """Refuses a tensor that a result of this shape and dtype, on the first input's device, cannot be written to.

    Nothing that is written to a given tensor has a gradient, so that none of the inputs may want one.
    """
    device = inputs[0].device
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        laid = "" if out.is_contiguous() else f" of strides {out.stride()}"
        raise ValueError(
            f"{name} is {out.dtype} {tuple(out.shape)} on {out.device}{laid}; it must be contiguous {dtype} {tuple(shape)} on "
            f"{device}"
        )
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (out, *inputs)):
        raise ValueError(
            f"{name} takes no gradient, but a tensor here requires one; detach it, or call under torch.no_grad()"
        )


def both(out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The two tensors of an `out` for two results. Raises ValueError where there are not two."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise ValueError(f"out is a {type(out).__name__}; it must be a pair of tensors, one for each result")
    return out[0], out[1]


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """A context whose launches go to the tensor's GPU: Triton launches on the current one. For CPU tensors it does nothing."""
    return torch.cuda.device_of(tensor)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(width: int) -> int:
    """Warps for a kernel that reduces over a row: one for each 1024 channels. A sum over lanes and warps costs each of them as
    many instructions as some ten channels do."""
    return min(8, max(1, power_of_two(width) // 1024))


def check_grid(clips: int) -> None:
    """Refuses more clips than a launch over (rows, clips) takes: CUDA's limit on a grid's second axis."""
    if clips > 65535:
        raise ValueError(f"there are {clips} clips; a launch takes at most 65535; split the batch")


def rows_per_program(rows: int) -> int:
    """Rows that a backward program sums the gradients of a LayerNorm's weight over before it writes a partial result.

    Some 4000 programs keep every SM busy; more of them would only write more partial results.
    """
    return min(64, max(4, power_of_two(rows // 4096)))


def no_second_gradient(ctx: object, *gradients: Tensor) -> None:
    """The gradient of a backward operator: there is none, and saying so beats a wrong number."""
    raise RuntimeError(
        "this operation has no second derivative on the Triton backend; call it with backend='reference' where gradients of "
        "gradients are needed"
    )


def no_forward_mode(*tensors: Tensor | None) -> None:
    """Refuses tensors with a tangent of forward-mode differentiation, which an operator would drop: zero, and no word of it."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "this operation has no forward-mode derivative on the Triton backend; call it with backend='reference' under "
            "torch.func.jvp, jacfwd or forward_ad"
        )
