"""Weights into the action detector."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from umt_fast.models.weights.files import load_state
from umt_fast.models.weights.layouts import fit

_TOWER = "vision_encoder."


def load_detector(detector: nn.Module, path: str | Path) -> None:
    """Loads a detection, stage-1, stage-2 or classifier file into a Detector; a line says what starts fresh.

    Detection files fill everything. Stage-1 and stage-2 files have the final `norm` and no head. Fine-tuned classifiers have
    an `fc_norm`, which norms averages of tokens and is not used: `norm` starts fresh, and so does a head of another size. A
    stored position table is not used either: it is constant, and resized to each batch.

    Raises WeightsError: any other difference between file and model.
    """
    fit_detector(detector, _unwrapped(load_state(path)), str(path), fresh=("norm.", "head."))


def fit_detector(detector: nn.Module, state: dict[str, Tensor], source: str, fresh: tuple[str, ...] = ()) -> None:
    """Copies tensors under the detector's own names as they are, as `fit` does; what detectors do not use is left out."""
    fit(detector, state, source, fresh=fresh, dropped=("fc_norm.", "clip_decoder.", "pool_norm.", "pos_embed"))


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that towers have in files of pre-training."""
    if any(key.startswith(_TOWER) for key in state):
        state = {key.removeprefix(_TOWER): value for key, value in state.items() if key.startswith(_TOWER)}
    for prefix in ("encoder.", "backbone."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
