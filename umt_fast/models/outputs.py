"""What the models of the Python API give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a tower makes of B clips; fp32, on the model's device."""

    pooled: Tensor
    """(B, C): one vector for each clip, of the mean of all tokens, through the model's own norm of it where it has one."""
    tokens: Tensor
    """(B, t, h, w, C): the last block's output, through the tower's final norm (a classifier has none)."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """(B, t, h, w, C) by the numbers that were asked for: outputs of blocks as they are, before any norm."""


class Predictions(NamedTuple):
    """classes: int64 (B, k), best first. probabilities: fp32 (B, k)."""

    classes: Tensor
    probabilities: Tensor
