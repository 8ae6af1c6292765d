"""`eval`: the figures of a run's checkpoint, which says by itself what it holds and how it is judged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import DataConfig, FinetuneConfig, Stage2Config, from_dict
from umt_fast.data.captions import Tokens, load_tokenizer, read_captions
from umt_fast.engine.checkpoint import read_file
from umt_fast.engine.precision import pick_device
from umt_fast.engine.sharded_checkpoint import read_weights
from umt_fast.models.multimodal import VideoText
from umt_fast.models.weights import WeightsError
from umt_fast.objectives.supervised import Supervised
from umt_fast.tasks import retrieval
from umt_fast.tasks.classification import accuracy


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not checkpoint.exists():
        raise WeightsError(f"no checkpoint at {checkpoint}")
    try:
        content = read_weights(checkpoint) if checkpoint.is_dir() else read_file(checkpoint)
        return dict(content["config"]), content["model"]
    except FileNotFoundError as error:
        raise WeightsError(
            f"{checkpoint} is not a checkpoint of an umt_fast run: it has no {error.filename}"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{checkpoint} is not a checkpoint of an umt_fast run (truncated, or of another kind)"
        ) from error


def evaluate_checkpoint(
    checkpoint: Path, list_path: Path, data: DataConfig, *, batch_size: int, top_k: int, device: str, show: int = 0
) -> dict[str, Any]:
    """Accuracy of a fine-tuned classifier, or zero-shot retrieval with a stage-2 model.

    Args:
        list_path: labelled clips for a classifier, a caption list (.json or SQLite) for retrieval.
        batch_size: clips per step.
        top_k: candidates that the matching head re-ranks; 0: none. Retrieval only.
        show: captions whose best clips are returned too (see retrieval.evaluate).

    Raises:
        WeightsError: not a checkpoint of a run, or one of a kind that has nothing to be judged by (stage 1).
    """
    record, weights = _read(checkpoint)
    target = pick_device(device)
    if "num_classes" in record:
        config = from_dict(FinetuneConfig, record | {"init": ""})
        objective = Supervised(config)
        objective.trainable.load_state_dict(weights)
        logits = objective.to(target).eval().logits
        vit = config.student
        return dict(
            accuracy(
                logits, str(list_path), data, num_frames=vit.num_frames, image_size=vit.image_size,
                batch_size=batch_size, device=target,
            )
        )  # fmt: skip
    if "losses" not in record:
        raise WeightsError(
            f"{checkpoint} is of a stage-1 run; eval judges fine-tuned classifiers (accuracy) and stage-2 models (retrieval)"
        )
    config = from_dict(Stage2Config, record)
    model = VideoText(
        config.student, config.text, num_layers=config.align.num_layers, output_dim=config.teacher.output_dim,
        embed_dim=config.embed_dim,
    )  # fmt: skip
    model.load_state_dict(weights)
    captions = read_captions(list_path, data.root)
    tokenizer = load_tokenizer(config.tokenizer)
    tokens = Tokens(captions.captions, tokenizer, max_length=config.max_length, sep=config.sep_token)
    return retrieval.evaluate(
        model.to(target), captions, tokens, data, top_k=top_k, batch_size=batch_size, show=show, device=target
    )
