"""Weights into our models: what kind of file it is, what of it is used, what starts fresh."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from umt_fast.extras import packages_of
from umt_fast.models.weights.files import WeightsError, load_state

if TYPE_CHECKING:
    from umt_fast.models.classifier import Classifier
    from umt_fast.models.video_text import VideoText

log = logging.getLogger("umt_fast.weights")

Kind = Literal["stage-1", "stage-2", "downstream", "question-answering", "classifier", "detector", "CLIP", "unknown"]
# Constant, and not in every file.
_POSITION_IDS = "text_encoder.bert.embeddings.position_ids"


def kind_of(state: dict[str, Tensor]) -> Kind:
    """What a file holds, told by its keys.

    `stage-1`: tower and alignment heads. `stage-2`: tower, text encoder, masked-language head. `downstream`: the same without
    that head and the alignment heads, as stage-2 models are after official fine-tuning; `question-answering`: that, with a
    decoder of answers and nothing to compare clips with texts. `classifier`: tower and head. `detector`: the same with the
    tower's own norm, and none of its averaged tokens.
    """
    patch = "patch_embed.proj.weight"
    if f"vision_encoder.encoder.{patch}" in state:
        if not any(key.startswith("text_encoder.embeddings.") for key in state):
            return "stage-2"
        return "question-answering" if any(key.startswith("text_decoder.") for key in state) else "downstream"
    if f"encoder.{patch}" in state:
        return "stage-1"
    if patch in state:
        detects = {"norm.weight", "head.weight"} <= state.keys() and "fc_norm.weight" not in state
        return "detector" if detects else "classifier"
    if "conv1.weight" in state or "visual.conv1.weight" in state:
        return "CLIP"
    return "unknown"


def fit(
    module: nn.Module, state: dict[str, Tensor], source: str, *, fresh: Sequence[str] = (), dropped: Sequence[str] = ()
) -> None:
    """Copies a state dict into a module, strictly.

    Args:
        module: receives the tensors under equal names.
        source: named in messages.
        fresh: prefixes of parameters that may be missing or of another shape; they keep their initial values, and a
            line says so.
        dropped: prefixes of entries of the file that the module has no place for; a line counts them.

    Raises:
        WeightsError: any other missing, unexpected or differently shaped entry; one line counts them, names a few and says
            what the file seems to be. The log has all of them at level DEBUG.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    kept_fresh = [key for key in missing + shaped if key.startswith(tuple(fresh))] if fresh else []
    kept_out = [key for key in unexpected if key.startswith(tuple(dropped))] if dropped else []
    problems = {
        "missing": [f"{key} {tuple(own[key].shape)}" for key in missing if key not in kept_fresh],
        "not known to the model": [key for key in unexpected if key not in kept_out],
        "other size": [
            f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
            for key in shaped
            if key not in kept_fresh
        ],
    }
    for kind, keys in problems.items():
        for key in keys:
            log.debug("%s: %s: %s", source, kind, key)
    if any(problems.values()):
        kinds = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        holds, wants = kind_of(state), kind_of(own)
        seems = f" By its keys the file holds {holds} weights, the model {wants} ones." if holds != wants else ""
        raise WeightsError(
            f"{source} does not fit the configured model: {kinds}.{seems} Give weights of this model, or configure the sizes "
            "they have"
        )
    if kept_fresh:
        log.warning("%s: starting fresh: %s", source, ", ".join(kept_fresh))
    if kept_out:
        log.info("%s: %d entries not used: %s", source, len(kept_out), _some(kept_out))
    taken = {key: value for key, value in state.items() if key in own and key not in kept_fresh}
    module.load_state_dict(taken, strict=False)


def _some(entries: list[str], most: int = 3) -> str:
    """The first entries by name, the others by number."""
    more = len(entries) - most
    return ", ".join(entries[:most]) + (f" and {more} more" if more > 0 else "")


def _expect(state: dict[str, Tensor], path: str | Path, task: str, *wanted: Kind) -> Kind:
    """The kind of a file that a task starts from, said in a line; refuses one that is clearly another."""
    kind = kind_of(state)
    if kind not in (*wanted, "unknown"):
        raise WeightsError(
            f"{path} holds {kind} weights (by its keys); {task} starts from {' or '.join(wanted)} weights"
        )
    log.info("%s holds %s weights, told by its keys", path, kind)
    return kind


def load_student(student: nn.Module, path: str | Path) -> None:
    """Loads a stage-1 file (`encoder.*`, `clip_decoder.*`) into a Student."""
    state = load_state(path)
    _expect(state, path, "stage 1", "stage-1")
    fit(student, state, str(path))


def start_video_text(model: VideoText, path: str | Path) -> bool:
    """Fills what a stage-1 or stage-2 file has of a VideoText, and names what starts fresh.

    Returns whether the text encoder was filled, too: it is in stage-2 files, not in stage-1 files.
    """
    state = load_state(path)
    kind = _expect(state, path, "stage 2", "stage-1", "stage-2")
    if kind == "stage-2":
        fit_video_text(model, state, str(path))
        return True
    fit(model.vision_encoder, state, str(path), fresh=("pool_norm.",))
    log.info(
        "%s: starting fresh beside the tower: vision_proj, text_proj, itm_head, temp; the text encoder is as bert says",
        path,
    )
    return False


def load_video_text(model: VideoText, path: str | Path) -> None:
    """Loads a stage-2 file into a VideoText; see fit_video_text."""
    fit_video_text(model, load_state(path), str(path))


def fit_video_text(model: VideoText, state: dict[str, Tensor], source: str) -> None:
    """Copies stage-2 or downstream tensors into a VideoText.

    The frozen teacher that official files carry is not used. A downstream file has neither masked-language nor alignment
    heads: those start fresh.
    """
    fresh = [_POSITION_IDS]
    if kind_of(state) == "downstream":
        fresh += ["text_encoder.cls.", "vision_encoder.clip_decoder."]
        state = {
            f"text_encoder.bert.{key.removeprefix('text_encoder.')}" if key.startswith("text_encoder.") else key: value
            for key, value in state.items()
        }
    fit(model, state, source, fresh=fresh, dropped=("clip_teacher.",))


def fit_classifier(classifier: Classifier, state: dict[str, Tensor], source: str) -> None:
    """Copies classifier tensors as they are. A stored position table of this clip's size is used, another is not."""
    table = state.get("pos_embed")
    if table is not None and table.shape == (1, *classifier.position.shape):
        classifier.position.copy_(table[0])
        state = {key: value for key, value in state.items() if key != "pos_embed"}
    fit(classifier, state, source, dropped=("pos_embed",))


def load_bert(text_encoder: nn.Module, name: str) -> None:
    """Fills the text encoder from Hugging Face weights by name or local folder; the cross-attention starts fresh.

    Raises WeightsError: weights that cannot be found, or of another size.
    """
    with packages_of("text"):
        from transformers import BertForMaskedLM

    try:
        state = BertForMaskedLM.from_pretrained(name).state_dict()
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"no BERT weights {name!r}: neither a local folder nor a name that can be fetched; `untrained` starts at random"
        ) from error
    fresh = [key for key in text_encoder.state_dict() if ".crossattention." in key or key.endswith("position_ids")]
    fit(text_encoder, state, f"BERT {name}", fresh=fresh)


def load_encoder(classifier: nn.Module, path: str | Path) -> None:
    """Loads the encoder of a stage-1, classifier or stage-2 file into a Classifier.

    The pre-training norm and alignment heads are not used; `fc_norm` and a `head` of another size start fresh. A stored
    position table is not used either: it is constant and rebuilt for the configured clip.
    """
    state = load_state(path)
    log.info("%s holds %s weights, told by its keys", path, kind_of(state))
    if any(key.startswith("vision_encoder.") for key in state):
        state = {
            key.removeprefix("vision_encoder."): value
            for key, value in state.items()
            if key.startswith("vision_encoder.")
        }
    for prefix in ("encoder.", "backbone."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    fit(
        classifier,
        state,
        str(path),
        fresh=("fc_norm.", "head."),
        dropped=("clip_decoder.", "norm.", "pos_embed", "pool_norm."),
    )
