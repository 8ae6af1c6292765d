"""The CLIP teacher's weights: from open_clip by name, or from a file in OpenAI's, open_clip's or the official layout."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import CLIP_TEXT_LENGTH, CLIP_TEXT_WORDS, TeacherConfig
from umt_fast.extras import packages_of
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.weights.files import WeightsError, load_state
from umt_fast.models.weights.layouts import fit

if TYPE_CHECKING:
    from umt_fast.models.teachers.clip_text import ClipText

log = logging.getLogger("umt_fast.weights")

# What OpenAI's layout has of the text tower.
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
# Numbers that OpenAI's own archives hold, and nobody else's files.
_OPENAI = {"input_resolution", "context_length", "vocab_size"}


def load_teacher(teacher: ClipTeacher, config: TeacherConfig) -> None:
    """Fills a teacher as its configuration says: `untrained`, `ARCH:TAG` of open_clip, or a local file.

    The weights are then quantized, if config.precision says so.
    Raises WeightsError: weights that cannot be fetched or read, or that belong to another tower.
    """
    weights = config.weights
    if weights == "untrained":
        log.warning(
            "WARNING: the teacher is untrained (random weights). The student learns nothing useful; this is for trials."
        )
        teacher.quantize(config.precision)
        return
    state = _clip_state(config)
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    fit(teacher, _adapt(visual or state, teacher), f"teacher weights {weights}")
    teacher.quantize(config.precision)


def _clip_state(config: TeacherConfig) -> dict[str, Tensor]:
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


def load_teacher_text(config: TeacherConfig) -> ClipText:
    """The text tower that belongs to the teacher, from the same weights; its sizes are theirs.

    Raises WeightsError: no weights, weights of the visual tower alone, a text tower of another kind than CLIP's.
    """
    from umt_fast.models.teachers.clip_text import (  # open_clip is slow to import, and few runs need it
        HEAD_WIDTH,
        ClipText,
    )

    source, need = f"teacher.weights {config.weights}", "losses.text_projection needs"
    if config.weights == "untrained":
        raise WeightsError(f"{source}: {need} a trained CLIP; give ARCH:TAG or a file, or set it to 0")
    if ":" in config.weights and not Path(config.weights).exists():
        _check_plain_text(config.weights.partition(":")[0], need)
    state = {key: value for key, value in _clip_state(config).items() if key.startswith(_TEXT)}
    try:
        vocabulary, width = state["token_embedding.weight"].shape
        length, output_dim = len(state["positional_embedding"]), state["text_projection"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{source} hold no CLIP text tower (token_embedding, text_projection), which {need}; give ARCH:TAG, or a file of "
            "the whole CLIP in OpenAI's or open_clip's layout, not its visual part"
        ) from error
    depth = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    found = {"words": vocabulary, "positions": length, "output_dim": output_dim, "width": width}
    if (
        vocabulary != CLIP_TEXT_WORDS
        or length < CLIP_TEXT_LENGTH
        or output_dim != config.output_dim
        or width % HEAD_WIDTH
    ):
        raise WeightsError(
            f"{source}: the text tower has {found}; {need} {CLIP_TEXT_WORDS} words, at least {CLIP_TEXT_LENGTH} positions, "
            f"teacher.output_dim {config.output_dim} and a width that is a multiple of {HEAD_WIDTH}"
        )
    text = ClipText(
        width=width,
        depth=depth,
        vocab_size=vocabulary,
        context_length=length,
        output_dim=output_dim,
        quick_gelu=config.activation == "quick_gelu",
    )
    fit(text.tower, {key: value.float() for key, value in state.items()}, f"the text tower of {source}")
    return text


def _check_plain_text(arch: str, need: str) -> None:
    """Refuses open_clip's text towers that have CLIP's names and compute something else."""
    with packages_of("train"):
        import open_clip

    from umt_fast.models.teachers.clip_text import HEAD_WIDTH

    text = (open_clip.get_model_config(arch) or {}).get("text_cfg", {})
    other = set(text) - {"context_length", "vocab_size", "width", "heads", "layers"}
    if other or text.get("width", 512) != HEAD_WIDTH * text.get("heads", 8):
        raise WeightsError(
            f"open_clip's {arch} has a text tower of another kind ({', '.join(sorted(other or text))}); {need} CLIP's own"
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


def _adapt(state: dict[str, Tensor], teacher: ClipTeacher) -> dict[str, Tensor]:
    """A 2-D patch weight as a 3-D one, and the position grid resized where the resolution differs."""
    state = {key: value.float() for key, value in state.items()}
    weight, own = state.get("conv1.weight"), teacher.conv1.weight
    if weight is not None and weight.ndim == 4:
        # Official rule: the 2-D kernel sits at the middle frame of the tubelet.
        inflated = torch.zeros(*weight.shape[:2], own.shape[2], *weight.shape[2:])
        inflated[:, :, own.shape[2] // 2] = weight
        state["conv1.weight"] = inflated
    table, positions = state.get("positional_embedding"), teacher.positional_embedding.shape[0]
    if table is not None and table.ndim == 2 and table.shape[0] != positions:
        old, new = round((table.shape[0] - 1) ** 0.5), round((positions - 1) ** 0.5)
        if old * old == table.shape[0] - 1:
            grid = table[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
            state["positional_embedding"] = torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(0, 2)])
    return state
