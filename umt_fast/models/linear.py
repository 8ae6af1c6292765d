"""Linear layers of the towers: the trained ones' own, and run.linear, which says whether products carry their epilogues."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from umt_fast.config import ConfigError, LinearBackend


class Linear(nn.Linear):
    """nn.Linear by the library that is fastest where x is (kernels.library_linear)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.library_linear(x, self.weight, self.bias)


class Multiplies(nn.Module):
    """A block whose products can carry what follows them (kernels.linear, kernels.mlp)."""

    linear_backend: LinearBackend = "library"

    def fuse(self, dtype: torch.dtype) -> None:
        """Computes by fused products from now on; dtype: in which."""
        self.linear_backend = "fused"


def use_linear(module: nn.Module, backend: LinearBackend, dtype: torch.dtype) -> None:
    """Has every block within a module compute as run.linear says; to be called before weights are cast to dtype."""
    if backend == "fused":
        for part in module.modules():
            if isinstance(part, Multiplies):
                part.fuse(dtype)


def require_linear(config: Any, device: torch.device) -> None:
    """Tries run.linear once on the device. Raises ConfigError where it cannot run there."""
    if config.run.linear == "fused":
        dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
        rows = torch.ones(16, 64, device=device, dtype=dtype)
        try:
            kernels.linear(rows, torch.ones(64, 64, device=device, dtype=dtype), backend="triton")
        except (ValueError, RuntimeError) as error:
            why = str(error).partition("; use ")[0]
            raise ConfigError(f"run.linear is 'fused': {why}; use --run.linear library") from error
