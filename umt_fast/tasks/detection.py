"""Action detection on key frames, as on AVA: the Detection objective, its task, and how its weights are judged.

Training: binary cross-entropy of each class of each box of the ground truth. Judging: the sigmoid of each class, times the
score of the person's detected box, as frame mAP (tasks.frame_map).
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import AttentionBackend, ConfigError, DetectionConfig, VitConfig
from umt_fast.config.unused import Refuse
from umt_fast.data.decode.movies import Movies
from umt_fast.data.loaders.key_frames import KeyFrameLoader, movies_of, rule_of
from umt_fast.data.sources import ava_csv, detections
from umt_fast.data.sources.detections import AVA_CLASSES, KeyFrames
from umt_fast.engine.distributed import Ranks
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.description import base_description
from umt_fast.models.detector import Detector
from umt_fast.models.weights import load_detector
from umt_fast.tasks.base import register
from umt_fast.tasks.classification import with_position_grid
from umt_fast.tasks.clips import random_integers
from umt_fast.tasks.judge import Judge

# What of data.* key frames do not read.
_NOT_READ = (
    "data.prepared data.separator data.reader data.sampling data.max_seconds data.num_sample data.augment data.flip "
    "data.frame_pattern"
)


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
        return flops.tower_flops(self.vit, self.detector.grid.size)


def training_keys(config: DetectionConfig, movies: Movies) -> KeyFrames:
    """The key frames of data.train. Raises DataError: a file that cannot be used."""
    path = config.data.train
    if path.endswith(".json"):
        return detections.training_frames(path, config.num_classes)
    excluded = ava_csv.read_excluded(config.excluded) if config.excluded else set()
    return ava_csv.training_frames(path, movies.sizes(ava_csv.movies_of(path)), config.num_classes, excluded)


class DetectionValidation:
    """Frame mAP on data.validation between epochs."""

    best = "map"

    def __init__(self, config: DetectionConfig, ranks: Ranks) -> None:
        """Raises ConfigError, DataError: a file that cannot be used."""
        self.judge = Judge(
            Path(config.data.validation), config.judging, config.clips, config.student, config.data, config.num_classes
        )
        self.batch_size, self.ranks = config.run.batch_size, ranks

    def figures(self, objective: Detection) -> dict[str, float]:
        found = self.judge.figures(objective.scores, batch_size=self.batch_size, ranks=self.ranks)
        return {"map": found["map"]}


class DetectionTask:
    """Fine-tuning of a detector."""

    name = "detection"
    Config = DetectionConfig

    def settled(self, config: DetectionConfig) -> DetectionConfig:
        return with_position_grid(config)

    def refuse_unread(self, config: DetectionConfig, refuse: Refuse, world_size: int) -> None:
        clips = config.clips
        refuse(_NOT_READ, "key frames are read and cut as clips.* says")
        if clips.movies != "frames":
            refuse("clips.frame_pattern clips.frame_rate", f"clips.movies is {clips.movies!r}, without frames' files")
        if clips.movies == "seconds":
            refuse("clips.first_second", "clips.movies is 'seconds', and their files' names tell the second")
        if clips.frames == "still":
            refuse("clips.sparse clips.stride", "clips.frames is 'still', and the key frame alone is seen")
        elif clips.frames == "described" and clips.sparse:
            refuse("clips.stride", "clips.frames is 'described', and sparse frames are spread over all of the clip")
        if not config.data.validation:
            names = (f"judging.{entry.name}" for entry in dataclasses.fields(config.judging))
            refuse(" ".join(names), "data.validation is empty, and nothing is judged")
        if config.data.train.endswith(".json"):
            refuse("excluded", f"{config.data.train} lists the images to train on itself")

    def objective(self, config: DetectionConfig) -> Detection:
        return Detection(
            config.student,
            num_classes=config.num_classes,
            head_scale=config.head_scale,
            bf16=config.run.dtype == "bf16",
            attention=config.run.attention,
            init=config.init,
        )

    def untrained(self, config: DetectionConfig) -> Detection:
        config = copy.copy(config)
        config.init = ""
        return self.objective(config)

    def loader(self, config: DetectionConfig, ranks: Ranks) -> KeyFrameLoader:
        if not config.data.train:
            raise ConfigError(
                "data.train is empty; give AVA's ground truth (.csv) or annotations (.json): --data.train FILE"
            )
        movies = movies_of(config.clips, config.data, config.data.train)
        return KeyFrameLoader(
            training_keys(config, movies),
            movies,
            rule_of(config.clips, config.student),
            config.data,
            batch_size=config.run.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.run.seed,
        )

    def validation(self, config: DetectionConfig, ranks: Ranks) -> DetectionValidation | None:
        return DetectionValidation(config, ranks) if config.data.validation else None

    def random_batches(self, config: DetectionConfig) -> list[dict[str, Tensor]]:
        vit, count, room = config.student, config.run.batch_size, config.clips.max_boxes
        side, rows = vit.image_size, config.run.batch_size * config.clips.max_boxes
        corners = random_integers(side // 2, rows, 4).float()
        corners[:, 2:] += side // 2
        return [
            {
                "index": torch.arange(count),
                "video": random_integers(256, count, vit.num_frames, side, side, 3, dtype=torch.uint8),
                "sizes": torch.tensor([[side, side]] * count),
                "boxes": corners,
                "box_clip": torch.arange(count).repeat_interleave(room),
                "box_valid": random_integers(4, rows) == 0,
                "labels": random_integers(8, rows, config.num_classes) == 0,
            }
        ]

    def without_noise(self, config: DetectionConfig) -> DetectionConfig:
        return dataclasses.replace(config, student=dataclasses.replace(config.student, drop_path=0.0))

    def clips_of_epoch(self, config: DetectionConfig) -> tuple[int, str] | None:
        path = config.data.train
        if not path:
            return None
        json = path.endswith(".json")
        count = len(detections.training_frames(path, config.num_classes)) if json else ava_csv.count_frames(path)
        return count, f"counted in {path}"

    def visible_tokens(self, config: DetectionConfig) -> int:
        return flops.visible_of(config.student, None)

    def describe(self, config: DetectionConfig) -> dict[str, Any]:
        seen = {name: getattr(config.clips, name) for name in ("sparse", "frames", "stride", "short_side")}
        return base_description(self.name, config) | {"num_classes": config.num_classes, "clips": seen}


register(DetectionTask())
