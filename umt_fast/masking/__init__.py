"""The token grid of a clip and the kinds of masks, each a file of its own in `kinds`.

Importing this package makes the kinds known and imports no torch: a configuration is checked before torch is needed.
"""

from umt_fast.masking import kinds
from umt_fast.masking.base import (
    MASKS,
    MAX_SCORES,
    MAX_TOKENS,
    ClassAttention,
    Limit,
    MaskKind,
    TokenGrid,
    flatten_frames,
    mask_named,
    num_visible,
    register,
    seed_of_view,
)

__all__ = [
    "MASKS",
    "MAX_SCORES",
    "MAX_TOKENS",
    "ClassAttention",
    "Limit",
    "MaskKind",
    "TokenGrid",
    "flatten_frames",
    "kinds",
    "mask_named",
    "num_visible",
    "register",
    "seed_of_view",
]
