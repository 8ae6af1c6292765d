"""CLIP's weights: from open_clip by name, or from a file in OpenAI's, open_clip's or the official layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from umt_fast.config import TeacherConfig
from umt_fast.extras import packages_of
from umt_fast.models.weights.files import WeightsError, load_state
from umt_fast.models.weights.frame_towers import inflated, resized_positions

# Numbers that OpenAI's own archives hold, and nobody else's files.
_OPENAI = {"input_resolution", "context_length", "vocab_size"}


def visual_state(config: TeacherConfig, positions: int, tubelet_size: int) -> dict[str, Tensor]:
    """The visual tower's tensors of teacher.weights in fp32, for so many positions (class token included) and frames of a
    token. Raises WeightsError: see clip_state."""
    state = clip_state(config)
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    found = {key: value.float() for key, value in (visual or state).items()}
    if "conv1.weight" in found:
        found["conv1.weight"] = inflated(found["conv1.weight"], tubelet_size)
    if "positional_embedding" in found:
        found["positional_embedding"] = resized_positions(found["positional_embedding"], positions)
    return found


def clip_state(config: TeacherConfig) -> dict[str, Tensor]:
    """Everything that teacher.weights, a name or a file, hold.

    Raises WeightsError: they cannot be had, or were trained with another activation than teacher.activation says.
    """
    weights = config.weights
    if ":" in weights and not Path(weights).exists():
        record, trained_with = _open_clip_record(weights)
        _require_activation(config, trained_with)
        return load_state(_fetch(weights, record))
    state = load_state(weights)
    if _OPENAI <= state.keys():  # other layouts do not tell: then the configuration knows
        _require_activation(config, "quick_gelu")
    return state


def _require_activation(config: TeacherConfig, trained_with: str) -> None:
    if trained_with != config.activation:
        raise WeightsError(
            f"{config.weights} was trained with {trained_with}, and teacher.activation is {config.activation}; "
            f"set --teacher.activation {trained_with}"
        )


def _open_clip_record(weights: str) -> tuple[dict[str, Any], str]:
    """open_clip's record of `ARCH:TAG`, and the activation those weights were trained with.

    The record says it, the architecture does not: open_clip builds ViT-B-16 with gelu, also for OpenAI's weights, which need
    quick_gelu.
    """
    with packages_of("train"):
        import open_clip

    arch, _, tag = weights.partition(":")
    if arch not in open_clip.list_models():
        raise WeightsError(f"open_clip knows no model {arch!r}; see open_clip.list_models()")
    record = open_clip.get_pretrained_cfg(arch, tag)
    if not record:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch))
        raise WeightsError(f"open_clip has no weights {tag!r} for {arch}; it has: {known}")
    quick = record.get("quick_gelu", False) or tag.lower() == "openai" or arch.endswith("-quickgelu")
    return record, "quick_gelu" if quick else "gelu"


def _fetch(weights: str, record: dict[str, Any]) -> str:
    """The file of `ARCH:TAG`, from open_clip's cache or the network. It is read here: open_clip takes no TorchScript."""
    with packages_of("train"):
        from open_clip import factory

    try:
        return factory.download_pretrained(record)
    except Exception as error:  # the hub client has its own tree of network errors
        raise WeightsError(
            f"open_clip could not fetch {weights} ({type(error).__name__}); without network give a local file: "
            "--teacher.weights PATH (OpenAI, open_clip or official layout)"
        ) from error
