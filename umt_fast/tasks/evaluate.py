"""`eval`: the figures of a checkpoint, which says by itself what it holds, or of a weights file whose model is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import ConfigError, DataConfig, require
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.lists import DataError, check_labels, read_list
from umt_fast.data.sources.queries import Joining, read_queries
from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.sharded_checkpoint import read_weights as read_sharded
from umt_fast.models.classifier import Classifier
from umt_fast.models.description import MODELS, complete, found_in, text_config, vit_config
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import (
    UnreadableError,
    WeightsError,
    WeightsFile,
    fit_classifier,
    fit_video_text,
    kind_of,
    read_weights,
)
from umt_fast.tasks import retrieval
from umt_fast.tasks.classification import accuracy


def read_checkpoint(path: Path) -> WeightsFile:
    """The tensors of a checkpoint, file or folder, or of any weights file, and what lies beside them.

    Raises WeightsError, CheckpointError: nothing there, or nothing that can be read.
    """
    if not (path.is_file() or path.is_dir()):
        raise WeightsError(f"no checkpoint at {path}")
    try:
        if path.is_file():
            return read_weights(path)
        content = read_sharded(path)
    except UnreadableError as error:
        raise WeightsError(
            f"{path} is not a checkpoint of an umt_fast run, nor weights (truncated, or of another kind)"
        ) from error
    except (WeightsError, CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged folder fails in many ways
        raise WeightsError(f"{path} is not a checkpoint of an umt_fast run (truncated, or of another kind)") from error
    return WeightsFile(content.pop("model"), content)


def _described(file: WeightsFile, model: dict[str, Any] | None, checkpoint: Path) -> dict[str, Any]:
    """What the file says of its model; what was said of it where it says nothing."""
    own = found_in(file.rest, checkpoint)
    if (own or {}).get("task") == "pretraining" or (own is None and kind_of(file.state) == "stage-1"):
        raise WeightsError(
            f"{checkpoint} is of a stage-1 run; eval judges fine-tuned classifiers (accuracy) and stage-2 models (retrieval)"
        )
    if own is None and model is None:
        raise WeightsError(
            f"{checkpoint} does not say which model it is of; say it: --model {', '.join(MODELS)}, or a recipe as NAME:VARIANT"
        )
    if own is not None and model is not None:
        raise ConfigError(f"{checkpoint} says which model it is of (task {own['task']}); leave out --model")
    return own if model is None else complete(model, file.state, checkpoint)


def evaluate_checkpoint(
    checkpoint: Path,
    list_path: Path,
    data: DataConfig,
    *,
    batch_size: int,
    top_k: int,
    ranks: Ranks,
    joining: Joining = "each",
    max_length: int = 0,
    memory_gib: float = 8.0,
    scores: Path | None = None,
    tokenizer: str = "",
    model: dict[str, Any] | None = None,
    usual_tokenizer: str = "",
) -> dict[str, Any]:
    """Accuracy of a fine-tuned classifier, or zero-shot retrieval with a stage-2 model; over all ranks, the same on each.

    All but `batch_size` and `scores` is for retrieval alone; see `python -m umt_fast eval --help`.

    Args:
        list_path: labelled clips for a classifier; a caption list (see data.entries) for retrieval.
        batch_size: clips per rank and step.
        joining: see data.queries.read_queries.
        max_length: tokens of a caption; 0: as in training.
        scores: file that the first rank writes retrieval.listing to, or {"clips": what classification.accuracy found}.
        tokenizer: a name or folder; empty: what the run was given.
        model: the description (see models.description) of a file that has none; sizes it lacks are read from the tensors.
        usual_tokenizer: the tokenizer of such a file, where none is given.

    Raises:
        WeightsError, CheckpointError: not readable, weights that are not of the sizes named, or of a kind that has nothing to
            be judged by (stage 1).
        ConfigError: a number out of its range, an option for retrieval given with a classifier, a `model` for a file that
            describes its own.
        DataError: see data.queries.read_queries and retrieval.evaluate.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("top_k", top_k, 0), ("memory_gib", memory_gib, 0)):
        require(value >= least, f"{name} is {value}; it must be at least {least}")
    file = read_checkpoint(checkpoint)
    described = _described(file, model, checkpoint)
    if described["task"] == "classification":
        for name, value, default in (
            ("top_k", top_k, 128), ("captions", joining, "each"), ("max_length", max_length, 0),
            ("memory_gib", memory_gib, 8.0), ("tokenizer", tokenizer, ""),
        ):  # fmt: skip
            require(value == default, f"--{name} is for retrieval, and {checkpoint} is a classifier; leave it out")
        found: list[dict[str, Any]] | None = None if scores is None else []
        figures = _accuracy(checkpoint, described, file.state, list_path, data, batch_size, ranks, found)
        if found is not None and ranks.first:
            write_json(scores, {"clips": found})
        return figures
    require(
        described["task"] == "video_text",
        f"--model names a model of task {described['task']}, which nothing is judged by",
    )
    usual = DataConfig()
    for name in ("separator", "frame_pattern"):
        value, default = getattr(data, name), getattr(usual, name)
        require(
            value == default, f"--{name} is for lists of labelled clips, and retrieval reads captions; leave it out"
        )
    least, limit = 3 if described["sep_token"] else 2, described["text"]["max_positions"]
    require(
        max_length == 0 or least <= max_length <= limit,
        f"max_length is {max_length}; it must lie in [{least}, {limit}], the positions of this model's text encoder "
        "(0: as trained)",
    )
    record = file.rest.get("config")
    usual = usual_tokenizer or (record.get("tokenizer", "") if isinstance(record, dict) else "")
    words = _tokenizer(tokenizer, usual, described["text"]["vocab_size"], checkpoint)
    queries = read_queries(list_path, data.root, joining=joining, workers=data.workers)
    video_text = VideoText(
        vit_config(described), text_config(described), num_layers=described["num_layers"],
        output_dim=described["output_dim"], embed_dim=described["embed_dim"],
    )  # fmt: skip
    fit_video_text(video_text, file.state, str(checkpoint))
    tokens = Tokens(
        queries.captions, words, max_length=max_length or described["max_length"], sep=described["sep_token"]
    )
    whole = replace(data, sampling="intervals", augment="whole")
    figures, v2t, t2v = retrieval.evaluate(
        video_text.to(ranks.device), queries, tokens, whole, ranks, top_k=top_k, batch_size=batch_size,
        memory=int(memory_gib * 2**30),
    )  # fmt: skip
    if scores is not None and ranks.first:
        write_json(scores, retrieval.listing(queries, v2t, t2v))
    return figures


def _tokenizer(given: str, usual: str, vocab_size: int, checkpoint: Path) -> Any:
    """The given tokenizer, or the model's usual one. Raises DataError, ConfigError: none, or not the model's."""
    require(
        bool(given or usual), f"{checkpoint} does not say which tokenizer it was trained with; give it: --tokenizer"
    )
    try:
        tokenizer = load_tokenizer(given or usual)
    except DataError as error:
        if given:
            raise
        raise DataError(
            f"{error}. The model of {checkpoint} was trained with it; if it has moved, say where: --tokenizer"
        ) from error
    require(
        len(tokenizer) <= vocab_size,
        f"the tokenizer {given or usual} has {len(tokenizer)} words, but the model of {checkpoint} knows {vocab_size}; give "
        "the one it was trained with: --tokenizer",
    )
    return tokenizer


def _accuracy(
    checkpoint: Path,
    described: dict[str, Any],
    weights: dict[str, torch.Tensor],
    list_path: Path,
    data: DataConfig,
    batch: int,
    ranks: Ranks,
    found: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    remedy = "this classifier knows no others: give a list of its classes"
    check_labels(read_list(list_path, data), described["num_classes"], str(list_path), remedy)
    vit = vit_config(described)
    classifier = Classifier(vit, described["num_classes"])
    fit_classifier(classifier, weights, str(checkpoint))
    classifier.to(ranks.device).eval()

    def logits(video: torch.Tensor) -> torch.Tensor:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=described["dtype"] == "bf16"):
            return classifier(video).float()

    return dict(
        accuracy(
            logits, str(list_path), data, num_frames=vit.num_frames, image_size=vit.image_size, batch_size=batch,
            device=ranks.device, rank=ranks.rank, world_size=ranks.world_size, found=found,
        )
    )  # fmt: skip


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replaces a file as a whole, or leaves it as it was."""
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
