"""Small models of tests."""

from __future__ import annotations

from typing import Any

from umt_fast.config import TextConfig


def small_text(**changes: Any) -> TextConfig:
    """Three layers of 32 channels, of which two fuse, over 50 words and 8 positions; nothing is dropped."""
    values = {"width": 32, "depth": 3, "fusion_layer": 1, "num_heads": 2, "vocab_size": 50, "max_positions": 8}
    return TextConfig(**(values | {"hidden_dropout": 0.0, "attention_dropout": 0.0} | changes))
