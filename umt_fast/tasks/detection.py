"""Action detection on AVA: what is trained, and how detections are judged.

Training: binary cross-entropy of each class of each box of the ground truth. Judging: the sigmoid of each class, times the
score of the person's detected box, as frame mAP (tasks.frame_map). Detections are judged as the result file holds them, rounded
to five decimals, and in the order of the key frames, because between equal scores the order decides.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import AttentionBackend, VitConfig
from umt_fast.data.decode import boxes as moves
from umt_fast.data.decode.boxes import Size
from umt_fast.data.errors import DataError
from umt_fast.data.sources.detections import AVA_CLASSES, KeyFrames
from umt_fast.engine.distributed import gather
from umt_fast.files import atomic_path
from umt_fast.models.attention import use_attention
from umt_fast.models.detector import Detector
from umt_fast.models.weights import WeightsError, load_detector
from umt_fast.tasks.frame_map import Boxes, Frame, FrameMap, frame_map

_DECIMALS = 5


class Detection(nn.Module):
    """batch with boxes and labels -> loss."""

    def __init__(
        self,
        vit: VitConfig,
        *,
        num_classes: int = AVA_CLASSES,
        head_scale: float = 0.001,
        bf16: bool = True,
        attention: AttentionBackend = "auto",
        init: str = "",
    ) -> None:
        """
        Args:
            vit: the tower; its image_size is the side of training crops.
            head_scale: factor on the head's initial weights.
            bf16: compute in bf16 where autocast allows; else in fp32, as the official L/16 runs do.
            init: weights to start from (see load_detector); empty: from scratch.
        """
        super().__init__()
        self.vit, self.bf16 = vit, bf16
        self.detector = Detector(vit, num_classes, head_scale)
        if init:
            load_detector(self.detector, init)
        use_attention(self, attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official detection layout."""
        return self.detector

    def layer_id(self, name: str) -> int:
        """0 for the patch embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.vit.depth + 1

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network."""
        return self.detector.pieces()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(N, num_classes) fp32 of a batch as data.decode.detection_view.batched gives it."""
        video = batch["video"]
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.bf16):
            return self.detector(video, batch["boxes"], batch["box_clip"], batch.get("sizes")).float()

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """batch: see logits, with `labels`, (N, num_classes) of any dtype, 1 where the class applies. Rows of which `box_valid`
        is false do not count; without it all do. Returns the fp32 scalar `loss`.

        The official loss is the mean over boxes and classes, times the number of boxes: the sum over boxes of the mean over
        classes. A batch without boxes has loss 0.
        """
        losses = F.binary_cross_entropy_with_logits(self.logits(batch), batch["labels"].float(), reduction="none")
        rows = losses.mean(1)
        valid = batch.get("box_valid")
        return {"loss": rows.sum() if valid is None else (rows * valid).sum()}

    @torch.no_grad()
    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """(N, num_classes) fp32: the sigmoid of the logits times `scores` (N,), those of the detected boxes."""
        return self.logits(batch).sigmoid() * batch["scores"][:, None]

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a training crop, forward and backward, without the head: it reads a vector a box."""
        vit, grid = self.vit, self.detector.grid
        n = grid.size
        span = n if vit.attention == "joint" else grid.per_frame
        block = n * vit.width**2 * (8 + 4 * vit.mlp_ratio) + 4 * n * span * vit.width
        patch = n * vit.width * 6 * vit.tubelet_size * vit.patch_size**2
        # The pixels take no gradient: forward and weight gradient only.
        return 3 * vit.depth * block + 2 * patch


class _Clip(NamedTuple):
    """Detections of a clip: boxes fp32 (M, 4) in shares of the picture, scores fp32 (M, classes)."""

    boxes: np.ndarray
    scores: np.ndarray


@torch.no_grad()
def evaluate(
    scores: Callable[[dict[str, Tensor]], Tensor],
    batches: Iterable[dict[str, Tensor]],
    keys: KeyFrames,
    truth: Boxes,
    names: dict[int, str],
    *,
    device: torch.device,
    excluded: set[Frame] = frozenset(),
    min_score: float = 0.0,
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
        result: file that the first rank writes all detections to, AVA's CSV; it replaces an older one as a whole.

    Raises:
        WeightsError: scores that are not finite. DataError: the file cannot be written.
    """
    mine: dict[int, _Clip] = {}
    for batch in batches:
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
        raise DataError(f"{result} cannot be written: {judged}") from judged
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
    path = Path(path)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns: Sequence[list] = (rows.boxes.tolist(), rows.classes.tolist(), rows.scores.tolist())
        for (movie, second), box, label, score in zip(rows.frames, *columns, strict=True):
            numbers = [f"{value:.{_DECIMALS}f}" for value in (*box, score)]
            writer.writerow([movie, f"{second:04d}", *numbers[:4], label, numbers[4]])
