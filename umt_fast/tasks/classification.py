"""Accuracy of a classifier on a list of clips."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from umt_fast.config import DataConfig, FinetuneConfig, from_dict
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import read_list
from umt_fast.engine.precision import pick_device
from umt_fast.models.weights import WeightsError
from umt_fast.objectives.supervised import Supervised


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor],
    list_path: str,
    data: DataConfig,
    *,
    num_frames: int,
    image_size: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[str, float]]:
    """Yields (`top1`, share), (`top5`, share), (`clips`, count): one centred view of each clip.

    logits: uint8 video (B, T, S, S, 3) -> (B, classes). A clip that cannot be read raises, it is not left out.
    """
    loader = ClipLoader(
        read_list(list_path, data),
        data,
        num_frames=num_frames,
        image_size=image_size,
        batch_size=batch_size,
        train=False,
    )
    hits = torch.zeros(2, device=device)
    count = 0
    for batch in loader:
        label = batch["label"].to(device)
        scores = logits(batch["video"].to(device))
        ranked = scores.topk(min(5, scores.shape[1])).indices == label[:, None]
        hits += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum()])
        count += len(label)
    top1, top5 = (hits / count).tolist()
    yield "top1", top1
    yield "top5", top5
    yield "clips", count


def evaluate_checkpoint(
    checkpoint: Path, list_path: Path, data: DataConfig, *, batch_size: int, device: str
) -> dict[str, float]:
    """accuracy() of a fine-tuning run's checkpoint, which says by itself what model it holds.

    Raises WeightsError: not a checkpoint, or not one of a fine-tuning run.
    """
    if not checkpoint.is_file():
        raise WeightsError(f"no checkpoint at {checkpoint}")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        record, model = content["config"], content["model"]
        classes = record.get("num_classes")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{checkpoint} is not a checkpoint of an umt_fast run (truncated, or of another kind)"
        ) from error
    if classes is None:
        raise WeightsError(f"{checkpoint} is of a pre-training run; eval needs one that was fine-tuned on labels")
    config = from_dict(FinetuneConfig, record)
    config.init = ""
    target = pick_device(device)
    objective = Supervised(config)
    objective.trainable.load_state_dict(model)
    return dict(
        accuracy(
            objective.to(target).eval().logits,
            str(list_path),
            data,
            num_frames=config.student.num_frames,
            image_size=config.student.image_size,
            batch_size=batch_size,
            device=target,
        )
    )
