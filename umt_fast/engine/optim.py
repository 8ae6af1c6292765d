"""AdamW over parameter groups: without decay for biases and vectors, with layer-wise rates where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from umt_fast.config import ConfigError, OptimConfig

LayerOf = Callable[[str], int]

# Position tables and class tokens: offsets, not matrices, though some are stored with two dimensions.
_NEVER_DECAYED = ("pos_embed", "positional_embedding", "temporal_embedding", "cls_token", "class_embedding")


def parameter_groups(
    module: nn.Module, optim: OptimConfig, layer_of: LayerOf | None = None, num_layers: int = 0
) -> list[dict]:
    """Groups of trainable parameters with their weight_decay and lr_scale = layer_decay ** (num_layers - layer).

    One-dimensional parameters, biases, position tables and class tokens are not decayed; scalars, as stage 2's
    temperature, are (official rule).
    """
    # 0: decayed, 1: decayed scalars, 2: not decayed. Earlier versions counted scalars among the last; between the two,
    # every parameter keeps the number under which their checkpoints know it.
    groups: dict[tuple[int, int], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = (
            2 if parameter.ndim == 1 or name.endswith((".bias", *_NEVER_DECAYED)) else 1 if parameter.ndim == 0 else 0
        )
        layer = layer_of(name) if layer_of is not None and optim.layer_decay < 1 else num_layers
        group = groups.setdefault(
            (kind, layer),
            {
                "params": [],
                "weight_decay": 0.0 if kind == 2 else optim.weight_decay,
                "lr_scale": optim.layer_decay ** (num_layers - layer),
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    module: nn.Module, optim: OptimConfig, *, lr: float, layer_of: LayerOf | None = None, num_layers: int = 0
) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW over parameter_groups(module, ...).

    It leaves parameters and moments as they are in a step whose `found_inf` is 1, without the host knowing; of apex's
    FusedAdam, which earlier versions offered too, only a mode with a gradient scaler does so, and it is no faster.
    """
    groups = parameter_groups(module, optim, layer_of, num_layers)
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen")
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)


def upgraded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state, as this version's AdamW takes it.

    apex's FusedAdam counted steps in its groups, torch's counts them for each parameter; the moments are the same.
    """
    groups = state["param_groups"]
    if not any("step" in group for group in groups):
        return state
    steps = {index: int(group["step"]) for group in groups for index in group["params"]}
    moments = {
        index: {"step": torch.tensor(float(steps[index])), **{k: values[k] for k in ("exp_avg", "exp_avg_sq")}}
        for index, values in state["state"].items()
    }
    own = [
        {**group, "params": saved["params"], "lr": saved["lr"]}
        for group, saved in zip(optimizer.param_groups, groups, strict=True)
    ]
    return {"state": moments, "param_groups": own}
