"""What torch computes with during a run, stated once: fp32 that is fp32, and sums in a fixed order where that is asked for.

torch.backends.cudnn.benchmark stays off: no step has a convolution for it to choose (patches are cut and multiplied, see
kernels.patch_gather).

run.deterministic: on a GPU sums may otherwise be added in another order in each run, by atomic operations of embedding's and
attention's backward passes and by split matrix products. Our own Triton kernels have no atomic operation and add in an order
that their shapes fix. On a CPU, with as many threads, nothing needs to be switched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from umt_fast.config import ConfigError, RunConfig

# What cuBLAS needs to split matrix products alike each time, and what it may be.
_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextlib.contextmanager
def numerics(run: RunConfig) -> Iterator[None]:
    """torch's global switches as a run wants them, for the block; to be entered before the GPU is first used.

    Raises ConfigError: run.deterministic with a CUBLAS_WORKSPACE_CONFIG that rules it out.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exact_fp32())
        # For attention that is not ours (CLIP's text tower): see kernels.attention. Ours names what it takes call by call.
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(False)
        if run.deterministic:
            stack.enter_context(_fixed_order())
        yield


@contextlib.contextmanager
def _exact_fp32() -> Iterator[None]:
    """fp32 products are computed in fp32, not in TF32 or bf16 parts."""
    backends = torch.backends
    owners = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [owner.fp32_precision for owner in owners]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer switches, in a way that the older one has no word for
        legacy = None
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


@contextlib.contextmanager
def _fixed_order() -> Iterator[None]:
    """Only algorithms that give the same bits each time; an operator that has none raises."""
    workspace = os.environ.get(_WORKSPACE)
    if workspace not in (None, *_WORKSPACES):
        raise ConfigError(
            f"run.deterministic needs {_WORKSPACE} to be one of {', '.join(_WORKSPACES)}; it is {workspace}: unset it"
        )
    cudnn, filled = torch.backends.cudnn, torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        filled.fill_uninitialized_memory,
    )
    os.environ[_WORKSPACE] = workspace or _WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    # Every torch.empty would be filled: our kernels write all of what they make.
    cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory = True, False, False
    try:
        # Inductor then chooses by rule what it would choose by timing.
        from torch._inductor import config as inductor

        with inductor.patch(deterministic=True) if hasattr(inductor, "deterministic") else contextlib.nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory = before[2:]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
