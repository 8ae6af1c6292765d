"""Stage-2 files into the models of downstream tasks, and fine-tuned official files in and out.

A stage-2 file names BERT `text_encoder.bert.*` and its word head `text_encoder.cls.*`; fine-tuned models hold plain BERT as
`text_encoder.*`. The answer decoder starts from the fusion layers, the embeddings and the word head. Fine-tuned files
have the names of the models and are taken as they are; `save_state(model.state_dict(), path)` writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from umt_fast.models.weights.files import WeightsError, load_state
from umt_fast.models.weights.layouts import fit, kind_of

if TYPE_CHECKING:
    from umt_fast.models.downstream import QuestionModel, RetrievalModel

log = logging.getLogger("umt_fast.weights")

# Tensors that are one tensor in the model: files keep both names or the first one alone.
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Constant, and not in every file.
_CONSTANT = ("text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids")
# What stage 2 has and downstream models have not.
_TEACHER = "clip_teacher."
_UNUSED = {
    "retrieval": (_TEACHER, "vision_encoder.clip_decoder.", "text_encoder.cls."),
    "question answering": (
        _TEACHER,
        "vision_encoder.clip_decoder.",
        "vision_encoder.pool_norm.",
        "vision_proj.",
        "text_proj.",
        "itm_head.",
        "temp",
    ),
}


class Sources(NamedTuple):
    """Where a model's tensors come from: `taken` model key -> file key; model keys that are `missing`; file keys that are
    `unexpected`, nothing of the model coming from them."""

    taken: dict[str, str]
    missing: list[str]
    unexpected: list[str]


def stage2_sources(model_keys: Iterable[str], file_keys: Iterable[str], *, fusion_layer: int) -> Sources:
    """Which entry of a stage-2 file each tensor of a downstream model starts from, by names alone.

    fusion_layer: the first layer of the file's BERT that is a fusion layer; the decoder's first one starts from it.
    """
    held = set(file_keys)
    taken, missing = {}, []
    for key in model_keys:
        source = _stage2_name(key, fusion_layer)
        if source in held:
            taken[key] = source
        else:
            missing.append(key)
    used = set(taken.values())
    used |= {f"text_encoder.{second}" for second, first in _TIED.items() if f"text_decoder.{second}" in taken}
    return Sources(taken, missing, sorted(held - used))


def same_sources(model_keys: Iterable[str], file_keys: Iterable[str]) -> Sources:
    """The same for a file that has the model's own names, as fine-tuned ones do."""
    own, held = list(model_keys), set(file_keys)
    return Sources(
        {key: key for key in own if key in held}, [key for key in own if key not in held], sorted(held - set(own))
    )


def _stage2_name(key: str, fusion_layer: int) -> str:
    """The stage-2 name of what a downstream model calls `key`."""
    if key.startswith("text_encoder."):
        return f"text_encoder.bert.{key.removeprefix('text_encoder.')}"
    if not key.startswith("text_decoder."):
        return key
    name = key.removeprefix("text_decoder.")
    name = _TIED.get(name, name)
    layers = "bert.encoder.layer."
    if name.startswith(layers):
        number, _, rest = name.removeprefix(layers).partition(".")
        name = f"{layers}{int(number) + fusion_layer}.{rest}"
    return f"text_encoder.{name}"


def load_retrieval(model: RetrievalModel, path: str | Path) -> None:
    """Fills a retrieval model from a stage-2 file (to fine-tune it, or zero-shot) or a fine-tuned one.

    Raises WeightsError: a file of another kind, tensors that are missing, unknown or of another shape.
    """
    fit_retrieval(model, load_state(path), str(path))


def load_question(model: QuestionModel, path: str | Path) -> None:
    """Fills a question-answering model from a stage-2 file, its decoder from the fusion layers, or from a fine-tuned file.

    Raises WeightsError: as load_retrieval; a tower and a text encoder of different width, as decoder layers that start
    from fusion layers must read text of the tower's width.
    """
    fit_question(model, load_state(path), str(path))


def fit_retrieval(model: RetrievalModel, state: dict[str, Tensor], source: str) -> None:
    """Copies the tensors of a stage-2 or fine-tuned retrieval file into a model; see load_retrieval."""
    _fit(model, state, source, "retrieval")


def fit_question(model: QuestionModel, state: dict[str, Tensor], source: str) -> None:
    """Copies the tensors of a stage-2 or fine-tuned question-answering file into a model; see load_question."""
    kind = kind_of(state)
    if kind == "downstream":
        raise WeightsError(
            f"{source} is fine-tuned for retrieval and has no answer decoder (text_decoder.*); question answering starts from "
            "a stage-2 file"
        )
    tower, text = model.vision_encoder.encoder.config.width, model.text_encoder.config.width
    if kind == "stage-2" and tower != text:
        raise WeightsError(
            f"the decoder cannot start from {source}: its fusion layers read tokens of width {tower}, the decoder reads text "
            f"of width {text}; use a text encoder as wide as the tower"
        )
    _fit(model, state, source, "question answering")


def _fit(model: nn.Module, state: dict[str, Tensor], source: str, task: str) -> None:
    kind = kind_of(state)
    own_kind = "question-answering" if task == "question answering" else "downstream"
    if kind not in ("stage-2", own_kind):
        raise WeightsError(
            f"{source} holds {kind} weights (by its keys); {task} starts from stage-2 or {own_kind} weights"
        )
    log.info("%s holds %s weights, told by its keys", source, kind)
    own = model.state_dict()
    if kind == "stage-2":
        found = stage2_sources(own, state, fusion_layer=model.text_encoder.config.fusion_layer)
        # What the model would not take keeps its name, so that `fit` names it.
        state = {key: state[name] for key, name in found.taken.items()} | {key: state[key] for key in found.unexpected}
        fit(model, state, source, fresh=_CONSTANT, dropped=_UNUSED[task])
        return
    # A fine-tuned file may keep a tied tensor under one name, as safetensors do.
    for second, first in _TIED.items():
        pair = f"text_decoder.{second}", f"text_decoder.{first}"
        if pair[0] in own and pair[0] not in state and pair[1] in state:
            state = state | {pair[0]: state[pair[1]]}
    fit(model, state, source, fresh=_CONSTANT, dropped=(_TEACHER,))
