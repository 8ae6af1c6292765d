"""Weights of a ViT in timm's layout, which DINO and DINOv2 share, under the names that a tower over frames has."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from umt_fast.models.weights.files import WeightsError, load_state
from umt_fast.models.weights.frame_towers import inflated, resized_positions

_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.weight": "conv1.weight",
    "patch_embed.proj.bias": "conv1.bias",
    "norm.weight": "ln_post.weight",
    "norm.bias": "ln_post.bias",
}
_IN_BLOCKS = {
    "norm1.": "ln_1.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
# The linear layer whose outputs a block scales by each of them (LayerScale).
_SCALES = {"ls1.gamma": "attn.proj.", "ls2.gamma": "mlp.fc2."}
# Not of the tower: a classifier, DINOv2's token for hidden patches.
_UNUSED = ("head.", "mask_token")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def tower_state(weights: str, positions: int, tubelet_size: int) -> dict[str, Tensor]:
    """The tensors of a file in fp32, for so many positions (class token included) and frames of a token.

    LayerScale is folded into the layer before it, which is exact. Names that timm's plain ViT does not have stay as they are,
    for the caller to refuse. Raises WeightsError: no such file, no ViT, one with register tokens.
    """
    if ":" in weights and not Path(weights).exists():
        raise WeightsError(
            f"teacher.weights is {weights!r}; this tower is read from a local file in timm's or DINO's own layout: "
            "--teacher.weights PATH"
        )
    state = load_state(weights)
    if not _NAMES.keys() <= state.keys():
        missing = ", ".join(sorted(_NAMES.keys() - state.keys()))
        raise WeightsError(f"{weights} is no ViT in timm's layout: it has no {missing}")
    registers = [key for key in ("reg_token", "register_tokens") if key in state]
    if registers:
        raise WeightsError(f"{weights} has register tokens ({registers[0]}), which this tower has no place for")
    state = _without_scales({key: value.float() for key, value in state.items() if not key.startswith(_UNUSED)})
    found = {_renamed(key): value for key, value in state.items()}
    found["class_embedding"] = found["class_embedding"].flatten()
    found["positional_embedding"] = resized_positions(found["positional_embedding"].squeeze(0), positions)
    found["conv1.weight"] = inflated(found["conv1.weight"], tubelet_size)
    return found


def _without_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """scale * (W x + b) as one layer: (scale * W) x + scale * b."""
    found = dict(state)
    for key, scale in state.items():
        block = _BLOCK.fullmatch(key)
        if block is not None and block[2] in _SCALES:
            weight, bias = (f"blocks.{block[1]}.{_SCALES[block[2]]}{name}" for name in ("weight", "bias"))
            if weight in state and bias in state:  # else the scale stays, and is refused as a name that no tower has
                found[weight], found[bias] = scale[:, None] * state[weight], scale * state[bias]
                del found[key]
    return found


def _renamed(key: str) -> str:
    block = _BLOCK.fullmatch(key)
    if block is None:
        return _NAMES.get(key, key)
    for theirs, ours in _IN_BLOCKS.items():
        if block[2].startswith(theirs):
            return f"transformer.resblocks.{block[1]}.{ours}{block[2].removeprefix(theirs)}"
    return key
