"""Weights in and out in the official layouts.

A file may be safetensors or a PyTorch file; it may hold the parameters flat or under `model`, `module` or `state_dict`,
with or without the prefixes of DDP and torch.compile. PyTorch files are read with weights_only=True. Nothing is left
random in silence: each key that finds no partner is listed, and unless it is one that is expected to be absent
(a fresh classification head, say) loading fails.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umt_fast.config import CLIP_TEXT_LENGTH, CLIP_TEXT_WORDS, TeacherConfig
from umt_fast.models.clip_teacher import ClipTeacher

if TYPE_CHECKING:
    from umt_fast.models.clip_text import ClipText

log = logging.getLogger("umt_fast.weights")

_WRAPPERS = ("model", "module", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# What OpenAI's layout has of the text tower.
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the keys."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remarks on the kind of file that is loaded: our own message says what is wrong with it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.load|Detected pickle protocol")
        yield


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, unwrapped, on the CPU.

    Raises WeightsError: no such file, a truncated or foreign file, a file without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Official training files carry their command line as an argparse.Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]), quiet():
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no weights file fails in many ways
        if _is_torchscript(path):
            with quiet():
                content = torch.jit.load(path, map_location="cpu")
            return {key: value.float() for key, value in content.state_dict().items()}
        raise WeightsError(f"{path} is not a readable weights file (truncated, or of another kind)") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(
            f"{path} holds no tensors by name; expected a state dict, or one under {', '.join(_WRAPPERS)}"
        )
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    nameless = next((key for key in state if not isinstance(key, str)), None)
    if nameless is not None:
        raise WeightsError(
            f"{path} has a tensor under {nameless!r}, which is no name; expected a state dict, as a module's state_dict() is"
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_torchscript(path: Path) -> bool:
    """OpenAI ships CLIP as TorchScript archives."""
    try:
        with quiet():
            torch.jit.load(path, map_location="cpu")
        return True
    except RuntimeError:
        return False


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
        WeightsError: any other missing, unexpected or differently shaped entry; the log lists all, the message a few.
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
            log.error("%s: %s: %s", source, kind, key)
    if any(problems.values()):
        kinds = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise WeightsError(
            f"{source} does not fit the configured model: {kinds}. Give weights of this model, or configure the sizes they have"
        )
    if kept_fresh:
        log.warning("%s: starting fresh: %s", source, ", ".join(kept_fresh))
    if kept_out:
        log.info("%s: %d entries not used: %s", source, len(kept_out), ", ".join(kept_out))
    taken = {key: value for key, value in state.items() if key in own and key not in kept_fresh}
    module.load_state_dict(taken, strict=False)


def _some(entries: list[str], most: int = 3) -> str:
    """The first entries by name, the others by number."""
    more = len(entries) - most
    return ", ".join(entries[:most]) + (f" and {more} more" if more > 0 else "")


def load_student(student: nn.Module, path: str | Path) -> None:
    """Loads a stage-1 file (`encoder.*`, `clip_decoder.*`) into a Student."""
    fit(student, load_state(path), str(path))


def load_tower(tower: nn.Module, path: str | Path) -> None:
    """Loads a stage-1 file into stage 2's vision tower; its pooling norm starts fresh."""
    fit(tower, load_state(path), str(path), fresh=("pool_norm.",))


def load_video_text(model: nn.Module, path: str | Path) -> None:
    """Loads a stage-2 file into a VideoText; the frozen teacher that official files carry is not used."""
    fit(model, load_state(path), str(path), dropped=("clip_teacher.",))


def load_bert(text_encoder: nn.Module, name: str) -> None:
    """Fills the text encoder from Hugging Face weights by name or local folder; the cross-attention starts fresh.

    Raises WeightsError: weights that cannot be found, or of another size.
    """
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


def load_teacher(teacher: ClipTeacher, config: TeacherConfig) -> None:
    """Fills a teacher as its configuration says: `untrained`, `ARCH:TAG` of open_clip, or a local file.

    The weights are then quantised, if config.precision says so.
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
    """Everything that teacher.weights, a name or a file, hold."""
    if ":" in config.weights and not Path(config.weights).exists():
        return _open_clip_state(config)
    return load_state(config.weights)


def load_teacher_text(config: TeacherConfig) -> ClipText:
    """The text tower that belongs to the teacher, from the same weights; its sizes are theirs.

    Raises WeightsError: no weights, weights of the visual tower alone, a text tower of another kind than CLIP's.
    """
    from umt_fast.models.clip_text import HEAD_WIDTH, ClipText  # open_clip is slow to import, and few runs need it

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
        width=width, depth=depth, vocab_size=vocabulary, context_length=length, output_dim=output_dim,
        quick_gelu=config.activation == "quick_gelu",
    )  # fmt: skip
    fit(text.tower, {key: value.float() for key, value in state.items()}, f"the text tower of {source}")
    return text


def _check_plain_text(arch: str, need: str) -> None:
    """Refuses open_clip's text towers that have CLIP's names and compute something else."""
    import open_clip

    from umt_fast.models.clip_text import HEAD_WIDTH

    text = (open_clip.get_model_config(arch) or {}).get("text_cfg", {})
    other = set(text) - {"context_length", "vocab_size", "width", "heads", "layers"}
    if other or text.get("width", 512) != HEAD_WIDTH * text.get("heads", 8):
        raise WeightsError(
            f"open_clip's {arch} has a text tower of another kind ({', '.join(sorted(other or text))}); {need} CLIP's own"
        )


def _open_clip_state(config: TeacherConfig) -> dict[str, Tensor]:
    import open_clip

    arch, _, tag = config.weights.partition(":")
    if arch not in open_clip.list_models():
        raise WeightsError(f"open_clip knows no model {arch!r}; see open_clip.list_models()")
    if tag not in open_clip.list_pretrained_tags_by_model(arch):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch))
        raise WeightsError(f"open_clip has no weights {tag!r} for {arch}; it has: {known}")
    try:
        model = open_clip.create_model(arch, pretrained=tag)
    except Exception as error:  # the hub client has its own tree of network errors
        raise WeightsError(
            f"open_clip could not fetch {config.weights} ({type(error).__name__}); without network give a local file: "
            "--teacher.weights PATH (OpenAI, open_clip or official layout)"
        ) from error
    quick = "Quick" in type(model.visual.transformer.resblocks[0].mlp.gelu).__name__
    if quick != (config.activation == "quick_gelu"):
        found = "quick_gelu" if quick else "gelu"
        raise WeightsError(f"{config.weights} was trained with {found}; set --teacher.activation {found}")
    return model.state_dict()


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


def save_state(state: dict[str, Tensor], path: str | Path) -> None:
    """Writes tensors by name as safetensors or, for any other suffix, as a flat PyTorch file; whole or not at all."""
    path = Path(path)
    # Copies: safetensors takes no two names for the same memory, as tied weights have.
    state = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".safetensors":
            partial.touch()
            mode = partial.stat().st_mode
            save_file(state, partial)
            partial.chmod(mode)  # it writes a private temporary file; others read weights as they read any file
        else:
            torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise WeightsError(f"{path} cannot be written: {reason}") from error
