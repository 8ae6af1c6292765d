"""Which attention backend a run computes with: told to every attention of its models, tried before the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import kernels
from umt_fast.config import AttentionBackend, ConfigError


class Attends(nn.Module):
    """A module that calls kernels.attention, with `prefer=self.attention_backend`."""

    attention_backend: AttentionBackend = "auto"


def use_attention(module: nn.Module, backend: AttentionBackend) -> None:
    """Has every attention within a module computed by a backend, where it takes that call (see kernels.attention, prefer)."""
    for part in module.modules():
        if isinstance(part, Attends):
            part.attention_backend = backend


def head_widths(config: Any) -> set[int]:
    """Channels of a head in the towers of a configuration."""
    towers = (getattr(config, name, None) for name in ("student", "teacher", "text"))
    return {tower.width // tower.num_heads for tower in towers if tower is not None}


def require_attention(config: Any, device: torch.device) -> None:
    """Tries run.attention once on the device for every head width, in the dtype that the run computes in.

    Raises ConfigError where it cannot run there.
    """
    dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
    try:
        if config.run.deterministic and config.run.attention in ("cudnn", "xformers"):
            raise ValueError("its backward pass adds in any order, which run.deterministic rules out")
        for width in sorted(head_widths(config)):
            kernels.require_attention(config.run.attention, device, dtype, width)
    except ValueError as error:
        why = str(error).partition("; use ")[0]  # the kernel's own remedy is an argument of it
        raise ConfigError(f"run.attention is {config.run.attention!r}: {why}; use --run.attention auto") from error
