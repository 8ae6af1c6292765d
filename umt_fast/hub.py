"""The library's door: models by name and by file. `import umt_fast` offers these functions without importing torch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import ConfigError, Vocabulary, require
from umt_fast.engine.precision import device_of, usable_dtype
from umt_fast.models.description import MODELS, STAGE1_MODELS, TOKENIZERS, complete, found_in
from umt_fast.models.sizes import TEACHERS, USUAL_WEIGHTS, teacher_size
from umt_fast.models.teachers import Teacher, build_teacher
from umt_fast.models.weights import WeightsError, WeightsFile, is_saved_folder, kind_of, vocabulary_in
from umt_fast.pretrained import DTYPES, Dtype, PretrainedModel, build
from umt_fast.tasks.evaluate import read_checkpoint
from umt_fast.zoo import REPOSITORY, ZOO, ZooFile, list_models, require_known

_UNTRAINED = "untrained"
# What official models have where a description leaves it to the tensors.
_OFFICIAL = {"b16": 512, "l16": 768}
# What a file of each task may hold; the first is what that task itself saves.
_KINDS = {
    "pretraining": ("stage-1",),
    "video_text": ("stage-2", "downstream"),
    "question_answering": ("question-answering",),
    "classification": ("classifier",),
    "retrieval": ("downstream", "stage-2"),
    "detection": ("detector",),
}


def load_model(
    name: str | None = None,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    tokenizer: str | Path | None = None,
) -> PretrainedModel:
    """A trained model, ready to be used, of the class of its task (umt_fast/pretrained).

    Args:
        name: an architecture or a released file of list_models. None: the file says by itself what it is of.
        weights: a checkpoint, converted or bare weights of ours, an official file of stage 1, stage 2 or fine-tuned, a folder
            that save_pretrained wrote, or a released file by name, which is then fetched from Hugging Face. None: the released
            file that `name` is. `untrained`: random weights.
        device: `auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:1`, or a torch.device.
        dtype: `bf16` or `fp32`, or torch's. None: as `eval` computes, a classifier as it was trained, others in fp32.
        num_frames, image_size: of a clip, with `name`; None: as the file's position table, the released file or the model says.
        num_classes: of an untrained classifier or detector.
        tokenizer: of a model that reads texts, by name or folder; None: the one it was trained with, where that is known.

    Raises:
        ConfigError: an unknown name (with the nearest), no weights, an option that would not be read.
        WeightsError: weights that are not there, cannot be read or fetched, or are of another model.
    """
    for option, value in (("name", name), ("weights", weights), ("tokenizer", tokenizer)):
        require(
            value is None or isinstance(value, (str, Path)),
            f"{option} is of type {type(value).__name__}; give a name or a path, as a text or a Path",
        )
    if name is not None:
        require(
            not Path(name).exists() or name in list_models(),
            f"load_model({str(name)!r}) names a file or folder where the name of an architecture goes; give it as "
            f"weights={str(name)!r}",
        )
        require_known(name)
    released = ZOO.get(name or "")
    require(
        weights is not None or released is not None,
        f"load_model({name or ''!r}) has no weights; give weights=PATH, or weights='untrained' for random ones",
    )
    given = str(tokenizer or "")
    if weights == _UNTRAINED:
        described = _untrained(released.model if released else name, released, num_frames, image_size, num_classes)
        _refuse_tokenizer(given, described, str(name))
        return build(described, None, _UNTRAINED, device=device, dtype=dtype, words=Vocabulary(given))
    require(num_classes is None, f"num_classes is {num_classes}; it is read from the weights, leave it out")
    path, fetched = weights_path(weights if weights is not None else str(name))
    released = released or fetched
    if is_saved_folder(path):
        require(name is None, f"{path} says which model it is of; leave {name!r} out")
        _refuse_sizes(path, num_frames, image_size)
        model = PretrainedModel.from_pretrained(path, device=device, dtype=dtype)
        _refuse_tokenizer(given, model.description, path)
        model.words = model.words.given(given)
        return model
    file = read_checkpoint(path)
    own = found_in(file.rest, path)
    if own is not None:
        require(name is None, f"{path} says which model it is of (task {own['task']}); leave {name!r} out")
        _refuse_sizes(path, num_frames, image_size)
        words, described = vocabulary_in(file.rest), own
    else:
        architecture = _architecture(released, name, file, path)
        described = _described(architecture, released, num_frames, image_size)
        _require_kind(architecture, described["task"], file, path)
        described = complete(described, file.state, path)
        words = Vocabulary(TOKENIZERS.get(architecture, ""))
    _refuse_tokenizer(given, described, path)
    return build(described, file.state, str(path), device=device, dtype=dtype, words=words.given(given))


def from_pretrained(
    folder_or_repository: str | Path, *, device: str | torch.device = "auto", dtype: Dtype | None = None, **options: Any
) -> PretrainedModel:
    """The model of a folder that save_pretrained wrote or a repository that push_to_hub filled, of whatever task.

    device, dtype: as for load_model. options: revision, token, cache_dir, force_download, local_files_only.
    Raises WeightsError: no such place, or nothing of umt_fast there.
    """
    return PretrainedModel.from_pretrained(folder_or_repository, device=device, dtype=dtype, **options)


def load_teacher(
    name: str = "clip_b16",
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype | None = None,
    num_layers: int = 6,
    tubelet_size: int = 1,
) -> Teacher:
    """The frozen tower that stage 1 learns from.

    Its `features(video)` takes uint8 (B, T, S, S, 3) on its device and gives the last num_layers projected outputs
    (num_layers, B, N, D) and the class token's attention (B * T, N / T).

    Args:
        name: clip_b16, clip_l14 (at 196 pixels), clip_tiny, dino_s16, dino_b16, dinov2_b14 or dinov2_l14 (at 196 pixels).
        weights: `ARCH:TAG` of open_clip, a file in OpenAI's, open_clip's or the official layout (of DINO in timm's or DINO's
            own), or `untrained`. None: OpenAI's.
        device: as for load_model. dtype: `fp32` (None) or `bf16`, for the matrices.
        num_layers: how many of the last blocks `features` gives. tubelet_size: frames of a token.

    Raises:
        ConfigError: an unknown name, no weights where none are usual. WeightsError: weights that cannot be had or do not fit.
    """
    near = difflib.get_close_matches(name, TEACHERS, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    require(name in TEACHERS, f"unknown teacher {name!r}{hint} There are: {', '.join(TEACHERS)}")
    weights = str(weights) if weights is not None else USUAL_WEIGHTS.get(name)
    require(weights is not None, f"teacher {name!r} has no usual weights; give weights=PATH, or 'untrained'")
    require(dtype is None or dtype in DTYPES, f"dtype is {dtype!r}; give 'bf16' or 'fp32'")
    config = teacher_size(name, weights=weights)
    require(1 <= num_layers <= config.depth, f"num_layers is {num_layers}; {name} has {config.depth} blocks")
    place = device_of(device)
    teacher = build_teacher(config, num_layers, tubelet_size)
    if dtype is not None and usable_dtype(DTYPES[dtype], place) == "bf16":
        teacher.compute_in(torch.bfloat16)
    return teacher.to(place)


def weights_path(weights: str | Path) -> tuple[Path, ZooFile | None]:
    """Where weights lie, and which released file they are if they were named as one, which is then fetched.

    Raises WeightsError: no such path or released file, or one that cannot be fetched.
    """
    path = Path(weights)
    if path.exists():
        return path, None
    released = ZOO.get(str(weights).removesuffix(".pth"))
    if released is not None:
        return _fetched(released), released
    near = difflib.get_close_matches(str(weights), ZOO, 1, 0.6)
    hint = f"; did you mean the released file {near[0]!r}?" if near else ""
    raise WeightsError(f"no weights at {path}, and no released file of that name{hint}")


def _fetched(released: ZooFile) -> Path:
    """A released file from the cache of earlier calls, or from its authors' repository."""
    from huggingface_hub import hf_hub_download, model_info, snapshot_download

    # The file is found by its name: folders of that repository are its authors' to change.
    try:
        cached = Path(snapshot_download(REPOSITORY, local_files_only=True)).rglob(released.file)
        return next(cached)
    except (OSError, StopIteration):
        pass  # not there yet
    try:
        files = [entry.rfilename for entry in model_info(REPOSITORY, timeout=10).siblings or ()]
        found = next((file for file in files if Path(file).name == released.file), None)
        if found is not None:
            return Path(hf_hub_download(REPOSITORY, found))
    except Exception as error:  # the hub client has its own tree of network errors
        raise WeightsError(
            f"{released.name} could not be fetched ({type(error).__name__}): that needs the network, the terms of "
            f"{REPOSITORY} on Hugging Face accepted, and `hf auth login`; or fetch {released.file} there by hand and give "
            "weights=PATH"
        ) from error
    raise WeightsError(f"{REPOSITORY} on Hugging Face has no {released.file}; fetch it elsewhere and give weights=PATH")


def _architecture(released: ZooFile | None, name: str | None, file: WeightsFile, path: Path) -> str:
    """The architecture of a file that does not describe itself. Raises WeightsError: nothing was said."""
    if released is not None:
        return released.model
    if name is not None:
        return name
    guess = _guess(file)
    hint = f"its tensors look like {guess!r}, so give that name" if guess else "give its name, see list_models()"
    raise WeightsError(f"{path} does not say which model it is of; {hint}")


def _guess(file: WeightsFile) -> str | None:
    """The official architecture whose kind and sizes the tensors have."""
    kind = kind_of(file.state)
    weight = next((value for key, value in file.state.items() if key.endswith("patch_embed.proj.weight")), None)
    if weight is None:
        return None
    for name, make in (MODELS | STAGE1_MODELS).items():
        described = make()
        if kind == _KINDS[described["task"]][0] and described["vit"]["width"] == len(weight):
            return name
    return None


def _require_kind(name: str, task: str, file: WeightsFile, path: Path) -> None:
    kind = kind_of(file.state)
    if kind not in (*_KINDS[task], "unknown"):
        guess = _guess(file)
        hint = f"; they look like {guess!r}" if guess else ""
        raise WeightsError(
            f"{path} holds {kind} weights (by its keys), and {name!r} is of {' or '.join(_KINDS[task])}{hint}"
        )


def _described(
    architecture: str, released: ZooFile | None, num_frames: int | None, image_size: int | None
) -> dict[str, Any]:
    """The architecture's description with what is known of its clips."""
    described = (MODELS | STAGE1_MODELS)[architecture]()
    if released is not None:
        described["vit"] |= {"num_frames": released.frames, "image_size": released.image_size}
    given = {"num_frames": num_frames, "image_size": image_size}
    described["vit"] |= {key: value for key, value in given.items() if value is not None}
    return described


def _untrained(
    name: str | None, released: ZooFile | None, num_frames: int | None, image_size: int | None, num_classes: int | None
) -> dict[str, Any]:
    """A complete description without tensors."""
    require(bool(name), "weights='untrained' needs the name of an architecture; see list_models()")
    described = _described(str(name), released, num_frames, image_size)
    vit, width = described["vit"], _OFFICIAL[str(name).split("_")[1]]
    vit |= {"num_frames": vit["num_frames"] or 8, "image_size": vit["image_size"] or 224}
    classes = "num_classes" in described
    require(classes or num_classes is None, f"num_classes is {num_classes}, and {name} is no classifier; leave it out")
    if classes:
        require(num_classes is not None and num_classes >= 1, f"an untrained {name} needs num_classes, at least 1")
        return described | {"num_classes": num_classes}
    own = {"num_layers": 6, "output_dim": width, "embed_dim": width}
    described |= {name: value for name, value in own.items() if name in described}
    if "text" in described:
        described |= {"text": described["text"] | {"vocab_size": 30522, "max_positions": 512}}
    return described


def _refuse_tokenizer(given: str, described: dict[str, Any], source: object) -> None:
    require(
        not given or "text" in described,
        f"tokenizer is {given!r}, and the model of {source} reads no texts; leave it out",
    )


def _refuse_sizes(path: Path, num_frames: int | None, image_size: int | None) -> None:
    for option, value in (("num_frames", num_frames), ("image_size", image_size)):
        if value is not None:
            raise ConfigError(f"{option} is {value}, but {path} says which clips its model takes; leave it out")
