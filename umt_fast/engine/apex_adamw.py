"""NVIDIA apex's FusedAdam as an AdamW that leaves a step alone whose gradients are not finite, as torch's fused one does.

Of apex's modes only the one for CUDA graphs (`capturable`) reads, on the device, whether to skip a step; it asks a gradient
scaler for that. Here the trainer's `found_inf` answers in its place, and the scale is 1.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import ConfigError


class _Overflow:
    """What FusedAdam asks of a gradient scaler, by the names that it calls."""

    def __init__(self, found_inf: Tensor) -> None:
        self.found_inf = found_inf

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones(1, device=self.found_inf.device)


def apex_fused_adam() -> type[torch.optim.Optimizer]:
    """NVIDIA apex's FusedAdam.

    Raises ConfigError: apex is missing, or is the registry's unrelated package of that name, which has no optimizers.
    """
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "optim.fused is 'apex', but apex.optimizers.FusedAdam does not import here. NVIDIA apex is built from "
            "github.com/NVIDIA/apex; the package that `pip install apex` fetches is another project. "
            "Use --optim.fused torch, which is as fast"
        ) from error


@functools.cache
def _adamw_of(fused_adam: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    class ApexAdamW(fused_adam):
        """FusedAdam with torch's interface: a rate that is a number, found_inf, zero_grad(set_to_none)."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            found_inf = self.found_inf
            device = found_inf.device
            for group in self.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)
                # It would count a first step that is skipped, in every group but the first.
                if "step" not in group:
                    group["step"] = torch.zeros(1, dtype=torch.int, device=device)
            return super().step(closure, grad_scaler=_Overflow(found_inf))

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.set_grad_none = set_to_none
            super().zero_grad()

    return ApexAdamW


def apex_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """The optimizer over parameter groups, all on one GPU; its `found_inf`, fp32 of one element there, is set before each step.

    Raises ConfigError, see apex_fused_adam.
    """
    return _adamw_of(apex_fused_adam())(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, capturable=True)
