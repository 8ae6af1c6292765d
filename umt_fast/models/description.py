"""What a weights file is of: the model's task and sizes, as plain values that checkpoints carry.

A description holds what is needed to build the module and to feed it, and nothing of the run that made it: no rates, paths or
batch sizes. Its keys are its own, not the configuration's fields, so that an option can be renamed without orphaning files.
A description may lack sizes (None); `complete` takes those from the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from umt_fast.config import ConfigError, TextConfig, VitConfig
from umt_fast.models.sizes import STUDENTS, TEXTS

# Raised when what is stored no longer means the same.
VERSION = 1

_VIT = (
    "width",
    "depth",
    "num_heads",
    "patch_size",
    "tubelet_size",
    "image_size",
    "num_frames",
    "mlp_ratio",
    "attention",
    "position_grid",
)
_TEXT = ("width", "depth", "fusion_layer", "num_heads", "vocab_size", "max_positions")


def base_description(task: str, config: Any) -> dict[str, Any]:
    """What the description of every task's model begins with: task, tower, and the dtype it was computed in."""
    vit = {key: getattr(config.student, key) for key in _VIT} | {"position_grid": list(config.student.position_grid)}
    return {"version": VERSION, "task": task, "vit": vit, "dtype": config.run.dtype}


def text_description(text: TextConfig) -> dict[str, Any]:
    """The text encoder's part of a description."""
    return {key: getattr(text, key) for key in _TEXT}


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """The description of a checkpoint older than descriptions, from the configuration stored in it.

    Reads the names that configurations had then, whatever they are called today. Raises KeyError, TypeError: another record.
    """
    student = VitConfig.upgraded(record["student"])
    vit = {key: student[key] for key in _VIT} | {"position_grid": list(student["position_grid"])}
    base = {"version": VERSION, "vit": vit, "dtype": record["run"]["dtype"]}
    if "num_classes" in record:
        # There was one rule of frames then.
        return base | {"task": "classification", "num_classes": record["num_classes"], "frames": "kinetics"}
    heads = {"num_layers": record["align"]["num_layers"], "output_dim": record["teacher"]["output_dim"]}
    if "losses" not in record:
        return base | {"task": "pretraining"} | heads
    text = {key: record["text"][key] for key in _TEXT}
    words = {"max_length": record["max_length"], "sep_token": record["sep_token"]}
    return base | {"task": "video_text"} | heads | {"text": text, "embed_dim": record["embed_dim"]} | words


def found_in(rest: dict[str, Any], source: object) -> dict[str, Any] | None:
    """The description that a file carries beside its tensors, in `model_config` or an older `config`, or None.

    Raises ConfigError: a description of a version that this one does not read.
    """
    described = rest.get("model_config")
    if isinstance(described, dict) and "task" in described:
        version = described.get("version")
        if version != VERSION:
            raise ConfigError(
                f"{source} describes its model in version {version!r}, and this umt_fast reads version {VERSION}; update it"
            )
        vit = described.get("vit")
        if not isinstance(vit, dict) or vit.keys() != set(_VIT):
            raise ConfigError(f"{source}: model_config is damaged: vit must have exactly {', '.join(_VIT)}")
        return described
    try:
        return from_record(rest["config"])
    except (KeyError, TypeError):
        return None


def vit_config(description: dict[str, Any]) -> VitConfig:
    """The tower, without the settings of its training: nothing is dropped or computed again."""
    grid = {"position_grid": tuple(description["vit"]["position_grid"])}
    return VitConfig(**(description["vit"] | grid), drop_path=0.0, checkpoint_blocks=0)


def text_config(description: dict[str, Any]) -> TextConfig:
    """The text encoder, likewise."""
    return TextConfig(**description["text"], hidden_dropout=0.0, attention_dropout=0.0)


# Models by name, for files that do not say what they are of


def _vit(size: str, num_frames: int | None, image_size: int | None) -> dict[str, Any]:
    tower = {key: STUDENTS[size][key] for key in ("width", "depth", "num_heads")}
    plain = {"patch_size": 16, "tubelet_size": 1, "mlp_ratio": 4.0, "attention": "joint"}
    return tower | plain | {"num_frames": num_frames, "image_size": image_size, "position_grid": []}


def _retrieval(size: str) -> dict[str, Any]:
    stage2 = _video_text(size)
    del stage2["num_layers"], stage2["output_dim"]
    return stage2 | {"task": "retrieval", "vit": _vit(size, 12, 224)}


def _text(size: str) -> dict[str, Any]:
    return TEXTS[size] | {"vocab_size": None, "max_positions": None}


def _video_text(size: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "task": "video_text",
        "dtype": "fp32",
        "vit": _vit(size, 4, 224),
        "num_layers": None,
        "output_dim": None,
        "text": _text(size),
        "embed_dim": None,
        "max_length": 32,
        "sep_token": False,
    }


def _answers(size: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "task": "question_answering",
        "dtype": "fp32",
        "vit": _vit(size, 12, 224),
        "text": _text(size),
        "max_length": 25,
        "max_answer": 5,
    }


def _classifier(size: str) -> dict[str, Any]:
    # Official tables for more frames or pixels are the one of 8 frames at 224 pixels, resized.
    vit = _vit(size, None, None) | {"position_grid": [8, 14, 14]}
    return {"version": VERSION, "task": "classification", "dtype": "fp32", "vit": vit, "num_classes": None}


def _detector(size: str) -> dict[str, Any]:
    vit = _vit(size, 8, 224) | {"position_grid": [8, 14, 14]}
    clips = {"sparse": True, "frames": "released", "stride": 8, "short_side": 256}
    # B/16 was trained in fp16, L/16 in fp32.
    dtype = "bf16" if size == "b16" else "fp32"
    return {
        "version": VERSION,
        "task": "detection",
        "dtype": dtype,
        "vit": vit,
        "num_classes": None,
        "clips": clips,
    }


def _pretraining(size: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "task": "pretraining",
        "dtype": "fp32",
        "vit": _vit(size, 8, 224),
        "num_layers": None,
        "output_dim": None,
    }


STAGE1_MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "umt_b16_stage1": lambda: _pretraining("b16"),
    "umt_l16_stage1": lambda: _pretraining("l16"),
}
"""Students of stage 1, 8 frames at 224 pixels. Apart from MODELS, which `eval` can judge."""
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "umt_b16": lambda: _video_text("b16"),
    "umt_l16": lambda: _video_text("l16"),
    "umt_b16_qa": lambda: _answers("b16"),
    "umt_l16_qa": lambda: _answers("l16"),
    "umt_b16_ft": lambda: _classifier("b16"),
    "umt_l16_ft": lambda: _classifier("l16"),
    "umt_b16_ret": lambda: _retrieval("b16"),
    "umt_l16_ret": lambda: _retrieval("l16"),
    "umt_b16_ava": lambda: _detector("b16"),
    "umt_l16_ava": lambda: _detector("l16"),
}
"""umt_*: the stage-2 models, 4 frames at 224 pixels. umt_*_ret, umt_*_qa: those fine-tuned for retrieval and for question
answering, 12 frames. umt_*_ft: the classifiers. umt_*_ava: the detectors of AVA."""
# The tokenizer whose words each text encoder knows.
TOKENIZERS = {
    f"umt_{size}{suffix}": name
    for suffix in ("", "_ret", "_qa")
    for size, name in (("b16", "bert-base-uncased"), ("l16", "bert-large-uncased"))
}
# What official classifiers are trained on.
_FRAMES, _PIXELS = (8, 16), (224, 384)


def complete(description: dict[str, Any], state: dict[str, Tensor], source: object) -> dict[str, Any]:
    """The description with each size that it lacks read from the tensors.

    Raises ConfigError: a size that they do not tell, with the option that does.
    """

    def rows(key: str, dim: int = 0) -> int:
        if key not in state or state[key].ndim <= dim:
            first = next(iter(state))
            raise ConfigError(f"{source} has no {key}, so it is no file of this --model; its first key is {first}")
        return state[key].shape[dim]

    found = {key: dict(value) if isinstance(value, dict) else value for key, value in description.items()}

    def fill(part: dict[str, Any], key: str, value: Callable[[], int]) -> None:
        if key in part and part[key] is None:
            part[key] = value()

    decoders = ("clip_decoder.", "vision_encoder.clip_decoder.")
    heads = [key for key in state if key.startswith(decoders) and key.endswith(".head.weight")]
    fill(found, "num_layers", lambda: len(heads))
    fill(found, "output_dim", lambda: rows(heads[0]) if heads else 1)  # without heads there is no output
    fill(found, "embed_dim", lambda: rows("vision_proj.weight"))
    fill(found, "num_classes", lambda: rows("head.weight"))
    if "text" in found:
        prefix = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in state else "text_encoder.bert."
        fill(found["text"], "vocab_size", lambda: rows(f"{prefix}embeddings.word_embeddings.weight"))
        fill(found["text"], "max_positions", lambda: rows(f"{prefix}embeddings.position_embeddings.weight"))
    if None in (found["vit"]["num_frames"], found["vit"]["image_size"]):
        _fill_clip(found["vit"], state, source)
    return found


def _fill_clip(vit: dict[str, Any], state: dict[str, Tensor], source: object) -> None:
    """Frames and pixels from a stored position table (1, tokens, C); without one they are 8 and 224, officially."""
    patch, tubelet = vit["patch_size"], vit["tubelet_size"]
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state else None
    frames = (vit["num_frames"],) if vit["num_frames"] else _FRAMES
    pixels = (vit["image_size"],) if vit["image_size"] else _PIXELS
    if tokens is None:
        vit["num_frames"], vit["image_size"] = frames[0], pixels[0]
        return
    fitting = [(t, side) for t in frames for side in pixels if t // tubelet * (side // patch) ** 2 == tokens]
    if len(fitting) != 1:
        raise ConfigError(
            f"{source} has a position table of {tokens} tokens, which is none of {frames} frames at {pixels} pixels; give "
            "--num_frames and --image_size"
        )
    ((vit["num_frames"], vit["image_size"]),) = fitting
