"""`bench fidelity`: how far an 8-bit teacher is from the exact one, on given weights and videos; one JSON line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from umt_fast.bench.stage1 import Model, stage1_config
from umt_fast.config import ConfigError, DataConfig, Stage1Config
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.precision import pick_device, usable_dtype
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.tasks import task_of
from umt_fast.tasks.pretraining import UnmaskedAlignment


@torch.no_grad()
def compare(config: Stage1Config, precision: str, videos: Iterable[Tensor], device: torch.device) -> dict[str, object]:
    """The figures of the JSON line. videos: batches uint8 (B, T, H, W, 3).

    Both teachers have config's weights and the same student; they differ in teacher.precision alone.
    """
    towers = []
    for kind in ("native", precision):
        torch.manual_seed(0)
        changed = replace(config, teacher=replace(config.teacher, precision=kind))
        towers.append(UnmaskedAlignment(changed).to(device).eval())
    cosines, overlaps, losses = [], [], []
    for number, video in enumerate(videos):
        video, seed = video.to(device), torch.full((1,), number, dtype=torch.int64, device=device)
        exact, low = (tower.teacher.features(video)[0] for tower in towers)
        cosines.append(torch.cosine_similarity(exact.float(), low.float(), dim=-1).flatten(1))
        kept = [tower.teacher(video, config.mask, seed).visible for tower in towers]
        overlaps.append((kept[0][:, :, None] == kept[1][:, None]).any(2).float().mean())
        losses.append(torch.stack([tower({"video": video}, seed)["loss"] for tower in towers]))
    if not cosines:
        raise ConfigError("there is no video to compare on")
    cosine = torch.cat(cosines, 1)
    exact, low = torch.stack(losses).mean(0).tolist()
    return {
        "bench": "fidelity",
        "precision": precision,
        "weights": config.teacher.weights,
        "batches": len(cosines),
        "cosine_per_layer": [round(value, 6) for value in cosine.mean(1).tolist()],
        "cosine_lowest_percent": [round(value, 6) for value in cosine.quantile(0.01, dim=1).tolist()],
        "mask_overlap": round(torch.stack(overlaps).mean().item(), 4),
        "mask_overlap_of_chance": round(1 - config.mask.ratio, 4),
        "loss_native": round(exact, 6),
        f"loss_{precision}": round(low, 6),
    }


def main(
    precision: Literal["int8", "fp8"] = "int8",
    model: Model = "b16",
    weights: str = "untrained",
    videos: str = "",
    batches: int = 2,
    batch_size: int = 2,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp32"] = "bf16",
) -> None:
    """Compare an 8-bit teacher with the exact one; one JSON line.

    Args:
        precision: As --teacher.precision of a run.
        model: Student; the teacher is the official one of that size.
        weights: As --teacher.weights of a run. What an untrained teacher shows says little about CLIP's.
        videos: A list of videos; empty: random pixels.
        batches: How many batches.
        batch_size: Clips each.
        device: Where; auto takes a GPU if there is one.
        dtype: What the exact teacher computes in.
    """
    if batches < 1 or batch_size < 1:
        raise ConfigError(f"batches is {batches} and batch_size is {batch_size}; both must be at least 1")
    place = pick_device(device)
    config = stage1_config(model, batch_size, usable_dtype(dtype, place))
    config = replace(config, teacher=replace(config.teacher, weights=weights))
    require_precision(replace(config.teacher, precision=precision), place)
    if videos:
        config.data = DataConfig(train=videos, workers=0)
        loader = task_of(config).loader(config, Ranks(0, 1, place))
        if batches > len(loader):
            raise ConfigError(
                f"batches is {batches}, but {videos} fills {len(loader)} of batch_size {batch_size}; lower one of them"
            )
        loader.set_epoch(0)
        clips = (batch["video"] for batch in loader)
    else:
        side, frames = config.student.image_size, config.student.num_frames
        clips = (torch.randint(256, (batch_size, frames, side, side, 3), dtype=torch.uint8) for _ in range(batches))
    print(json.dumps(compare(config, precision, islice(clips, batches), place)))
