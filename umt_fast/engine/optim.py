"""AdamW over parameter groups: without decay for biases and vectors, with layer-wise rates where asked."""

from __future__ import annotations

import importlib
from collections.abc import Callable

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
        kind = 2 if parameter.ndim == 1 or name.endswith((".bias", *_NEVER_DECAYED)) else 1 if parameter.ndim == 0 else 0
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


def build_optimizer(
    module: nn.Module, optim: OptimConfig, *, lr: float, layer_of: LayerOf | None = None, num_layers: int = 0
) -> torch.optim.Optimizer:
    """AdamW over parameter_groups(module, ...), torch's fused one or apex's."""
    groups = parameter_groups(module, optim, layer_of, num_layers)
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen")
    if optim.fused == "apex":
        if next(module.parameters()).device.type != "cuda":
            raise ConfigError("optim.fused is 'apex', which needs a GPU; use --optim.fused torch")
        return apex_fused_adam()(groups, lr=lr, betas=optim.betas, eps=optim.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)
