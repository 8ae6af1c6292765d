"""Detections of all ranks together: judged by frame mAP, and written as AVA's CSV.

They are judged as the result file holds them, rounded to five decimals, and in the order of the key frames, because between
equal scores the order decides.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.decode import boxes as moves
from umt_fast.data.decode.boxes import Size
from umt_fast.data.errors import DataError
from umt_fast.data.sources.detections import KeyFrames
from umt_fast.engine.distributed import gather
from umt_fast.files import atomic_path
from umt_fast.models.weights import WeightsError
from umt_fast.tasks.frame_map import Boxes, Frame, FrameMap, frame_map

_DECIMALS = 5


class _Clip(NamedTuple):
    """Detections of a clip: boxes fp32 (M, 4) in shares of the picture, scores fp32 (M, classes)."""

    boxes: np.ndarray
    scores: np.ndarray


@torch.no_grad()
def evaluate(
    scores: Callable[[dict[str, Tensor]], Tensor],
    batches: Collection[dict[str, Tensor]],
    keys: KeyFrames,
    truth: Boxes,
    names: dict[int, str],
    *,
    device: torch.device,
    excluded: set[Frame] = frozenset(),
    min_score: float = 0.0,
    idle: dict[str, Tensor] | None = None,
    result: str | Path | None = None,
) -> FrameMap:
    """Frame mAP of all ranks together, the same on each.

    Args:
        scores: batch -> (N, classes), as Detection.scores; class c is column c - 1.
        batches: this rank's, as data.decode.detection_view.batched makes them of test samples. A key frame that several ranks
            see, as samplers that fill up the last batch make it happen, counts once.
        keys: the key frames that the batches' `index` counts.
        truth, names, excluded: see frame_map.
        min_score: detections below it are left out.
        idle: a batch that a rank without further ones computes for nothing, so that all ranks call `scores` as often as each
            other, as parts of a sharded model need it; None: it waits.
        result: file that the first rank writes all detections to, AVA's CSV; it replaces an older one as a whole.

    Raises:
        WeightsError: scores that are not finite. DataError: the file cannot be written.
    """
    mine: dict[int, _Clip] = {}
    given = iter(batches)
    for _ in range(max(gather(len(batches)))):
        batch = next(given, None)
        if batch is None:
            if idle is not None:
                scores({name: value.to(device) for name, value in idle.items()})
            continue
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        found = scores(batch)
        if not found.isfinite().all():
            raise WeightsError("the detector's scores are not finite: the run that made these weights diverged")
        owner, found = batch["box_clip"].cpu(), found.float().cpu()
        if "box_valid" in batch:
            valid = batch["box_valid"].cpu()
            owner, found = owner[valid], found[valid]
        for number, (index, size) in enumerate(zip(batch["index"].tolist(), batch["sizes"].tolist(), strict=True)):
            key = keys[index]
            shares = _shares(key.boxes, key.size, (size[1], size[0]))
            mine[index] = _Clip(shares, found[owner == number].numpy())
    clips: dict[int, _Clip] = {}
    for part in gather(mine):
        clips |= part
    judged: FrameMap | OSError | None = None
    if _first():
        try:
            rows = _rows(keys, clips, min_score)
            if result is not None:
                write_result(result, rows)
            judged = frame_map(truth, rows, names, excluded)
        except OSError as error:
            judged = error
    # The first rank alone judges: all boxes of AVA's test set with all classes are millions of rows.
    judged = gather(judged)[0]
    if isinstance(judged, OSError):
        raise DataError(str(judged)) from judged
    return judged


def _first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _shares(boxes: Tensor, size: Size, shown: Size) -> np.ndarray:
    """Boxes in pixels of `size` as shares of the picture, in [0, 1], the last pixel's far edge included.

    They go to the size that the detector saw and back, as officially: five decimals show the rounding.
    """
    boxes = moves.resized(moves.resized(boxes, size, shown), shown, size)
    shares = (boxes + torch.tensor([0.0, 0, 1, 1])) / torch.tensor([*size, *size])
    return shares.clamp(0, 1).numpy()


def _rows(keys: KeyFrames, clips: dict[int, _Clip], min_score: float) -> Boxes:
    """All detections, by key frame, box and class, rounded as the result file rounds them."""
    frames: list[Frame] = []
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for index in sorted(clips):
        clip = clips[index]
        box, column = np.nonzero(clip.scores >= min_score)
        parts.append((clip.boxes[box], column + 1, clip.scores[box, column]))
        key = keys[index]
        frames += [(key.movie, key.second)] * len(box)
    if not parts:
        return Boxes.of([])
    boxes, classes, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Exactly what a reader of the file gets: float32 times 10^5 is exact in float64.
    boxes, scores = (np.round(values.astype(np.float64), _DECIMALS) for values in (boxes, scores))
    return Boxes(frames, boxes, classes.astype(np.int64), scores)


def write_result(path: str | Path, rows: Boxes) -> None:
    """Detections as AVA's CSV, `movie,second,x1,y1,x2,y2,class,score`: the second with four digits, numbers with five decimals.

    The file appears as a whole or not at all.
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns: Sequence[list] = (rows.boxes.tolist(), rows.classes.tolist(), rows.scores.tolist())
        for (movie, second), box, label, score in zip(rows.frames, *columns, strict=True):
            numbers = [f"{value:.{_DECIMALS}f}" for value in (*box, score)]
            writer.writerow([movie, f"{second:04d}", *numbers[:4], label, numbers[4]])
