"""`eval`: the figures of a run's checkpoint, which says by itself what it holds and how it is judged."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import DataConfig, FinetuneConfig, Stage2Config, from_dict, require
from umt_fast.data.captions import Tokens, load_tokenizer
from umt_fast.data.manifest import DataError, check_labels, read_list
from umt_fast.data.queries import Joining, read_queries
from umt_fast.engine.checkpoint import CheckpointError, read_file
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.sharded_checkpoint import read_weights
from umt_fast.models.multimodal import VideoText
from umt_fast.models.weights import WeightsError, fit, quiet
from umt_fast.objectives.supervised import Supervised
from umt_fast.tasks import retrieval
from umt_fast.tasks.classification import accuracy


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not (checkpoint.is_file() or checkpoint.is_dir()):
        raise WeightsError(f"no checkpoint at {checkpoint}")
    try:
        with quiet():
            content = read_weights(checkpoint) if checkpoint.is_dir() else read_file(checkpoint)
        return dict(content["config"]), dict(content["model"])
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # what is no checkpoint fails in many ways
        raise WeightsError(
            f"{checkpoint} is not a checkpoint of an umt_fast run (truncated, or of another kind)"
        ) from error


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

    Raises:
        WeightsError, CheckpointError: not a checkpoint of a run, one whose weights are not of the sizes it names, or one of a
            kind that has nothing to be judged by (stage 1).
        ConfigError: a number out of its range, or an option for retrieval given with a classifier.
        DataError: see data.queries.read_queries and retrieval.evaluate.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("top_k", top_k, 0), ("memory_gib", memory_gib, 0)):
        require(value >= least, f"{name} is {value}; it must be at least {least}")
    record, weights = _read(checkpoint)
    if "num_classes" in record:
        for name, value, default in (
            ("top_k", top_k, 128), ("captions", joining, "each"), ("max_length", max_length, 0),
            ("memory_gib", memory_gib, 8.0), ("tokenizer", tokenizer, ""),
        ):  # fmt: skip
            require(value == default, f"--{name} is for retrieval, and {checkpoint} is a classifier; leave it out")
        found: list[dict[str, Any]] | None = None if scores is None else []
        figures = _accuracy(checkpoint, record, weights, list_path, data, batch_size, ranks, found)
        if found is not None and ranks.first:
            write_json(scores, {"clips": found})
        return figures
    if "losses" not in record:
        raise WeightsError(
            f"{checkpoint} is of a stage-1 run; eval judges fine-tuned classifiers (accuracy) and stage-2 models (retrieval)"
        )
    config = from_dict(Stage2Config, record)
    usual = DataConfig()
    for name in ("separator", "frame_pattern"):
        value, default = getattr(data, name), getattr(usual, name)
        require(
            value == default, f"--{name} is for lists of labelled clips, and retrieval reads captions; leave it out"
        )
    least, limit = 3 if config.sep_token else 2, config.text.max_positions
    require(
        max_length == 0 or least <= max_length <= limit,
        f"max_length is {max_length}; it must lie in [{least}, {limit}], the positions of this model's text encoder "
        "(0: as trained)",
    )
    words = _tokenizer(tokenizer, config, checkpoint)
    queries = read_queries(list_path, data.root, joining=joining, workers=data.workers)
    model = VideoText(
        config.student, config.text, num_layers=config.align.num_layers, output_dim=config.teacher.output_dim,
        embed_dim=config.embed_dim,
    )  # fmt: skip
    fit(model, weights, str(checkpoint))
    tokens = Tokens(queries.captions, words, max_length=max_length or config.max_length, sep=config.sep_token)
    whole = replace(data, sampling="intervals", augment="whole")
    figures, v2t, t2v = retrieval.evaluate(
        model.to(ranks.device), queries, tokens, whole, ranks, top_k=top_k, batch_size=batch_size,
        memory=int(memory_gib * 2**30),
    )  # fmt: skip
    if scores is not None and ranks.first:
        write_json(scores, retrieval.listing(queries, v2t, t2v))
    return figures


def _tokenizer(given: str, config: Stage2Config, checkpoint: Path) -> Any:
    """The given tokenizer, or the one the checkpoint's run had. Raises DataError, ConfigError: none, or not the model's."""
    try:
        tokenizer = load_tokenizer(given or config.tokenizer)
    except DataError as error:
        if given:
            raise
        raise DataError(
            f"{error}. The run of {checkpoint} was given it; if it has moved, say where: --tokenizer"
        ) from error
    require(
        len(tokenizer) <= config.text.vocab_size,
        f"the tokenizer {given or config.tokenizer} has {len(tokenizer)} words, but the model of {checkpoint} knows "
        f"{config.text.vocab_size}; give the one it was trained with: --tokenizer",
    )
    return tokenizer


def _accuracy(
    checkpoint: Path,
    record: dict[str, Any],
    weights: dict[str, torch.Tensor],
    list_path: Path,
    data: DataConfig,
    batch: int,
    ranks: Ranks,
    found: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    config = from_dict(FinetuneConfig, record | {"init": ""})
    remedy = "this classifier knows no others: give a list of its classes"
    check_labels(read_list(list_path, data), config.num_classes, str(list_path), remedy)
    objective = Supervised(config)
    fit(objective.trainable, weights, str(checkpoint))
    logits = objective.to(ranks.device).eval().logits
    vit = config.student
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
