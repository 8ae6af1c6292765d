"""AdamW over parameter groups: without decay for biases and vectors, with layer-wise rates where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from umt_fast.config import ConfigError, OptimConfig
from umt_fast.engine.apex_adamw import apex_adamw

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
    """AdamW over parameter_groups(module, ...), PyTorch's fused one or apex's.

    Either leaves parameters and moments as they are in a step whose `found_inf` is 1, without the host knowing.
    """
    groups = parameter_groups(module, optim, layer_of, num_layers)
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen")
    if optim.fused == "apex":
        if next(module.parameters()).device.type != "cuda":
            raise ConfigError("optim.fused is 'apex', which needs a GPU; use --optim.fused torch")
        return apex_adamw(groups, lr=lr, betas=tuple(optim.betas), eps=optim.eps)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)


def upgraded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state, as `optimizer` takes it, whichever of the two saved it.

    apex's FusedAdam counts steps in its groups, torch's counts them for each parameter; the moments are the same.
    """
    saved = state["param_groups"]
    by_group = any("step" in group for group in saved)
    if by_group == ("bias_correction" in optimizer.param_groups[0]):  # apex's groups alone have that
        return state
    own = [
        {**group, "params": theirs["params"], "lr": theirs["lr"]}
        for group, theirs in zip(optimizer.param_groups, saved, strict=True)
    ]
    if by_group:
        steps = {index: float(group["step"]) for group in saved for index in group["params"]}
        moments = {index: {**values, "step": torch.tensor(steps[index])} for index, values in state["state"].items()}
        return {"state": moments, "param_groups": own}
    moments = {index: {k: v for k, v in values.items() if k != "step"} for index, values in state["state"].items()}
    for group in own:
        counts = [int(state["state"][index]["step"]) for index in group["params"] if index in state["state"]]
        group["step"] = torch.tensor(
            [max(counts, default=0)], dtype=torch.int, device=optimizer.param_groups[0]["params"][0].device
        )
    return {"state": moments, "param_groups": own}
