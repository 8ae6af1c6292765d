"""Stage 1: the student aligns with a frozen CLIP teacher at the tokens the teacher's attention draws (paper section 3.1)."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from umt_fast.config import AlignConfig, Stage1Config
from umt_fast.config.unused import Refuse
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.precision import pick_device
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.description import base_description
from umt_fast.models.linear import use_linear
from umt_fast.models.student import Student
from umt_fast.models.teachers import build_teacher, teacher_kind
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.models.weights import load_student
from umt_fast.tasks.base import register
from umt_fast.tasks.clips import counted_clips, listed_clips, random_clips

log = logging.getLogger("umt_fast")


class UnmaskedAlignment(nn.Module):
    """batch -> loss. Only `student` is trained and saved; `teacher` is frozen."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.config = config
        vit, layers = config.student, config.align.num_layers
        self.student = Student(vit, layers, config.teacher.output_dim)
        self.teacher = build_teacher(config.teacher, layers, vit.tubelet_size)
        if config.init:
            load_student(self.student, config.init)
        dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
        use_linear(self, config.run.linear, dtype)
        if config.run.dtype == "bf16":
            self.teacher.compute_in(torch.bfloat16)
        use_attention(self, config.run.attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official stage-1 layout."""
        return self.student

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network: the teacher, student parts."""
        return [(self.teacher, "forward"), *self.student.pieces()]

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """One step's loss.

        Args:
            batch: `video` uint8 (B, T, H, W, 3), or ImageNet-normalized (B, 3, T, H, W).
            seed: int64 (1,) on the device; decides the mask.

        Returns:
            fp32 device scalars: `loss`, the mean over clips and their mask.per_clip views, and `loss_layer_{k}` (detached),
            k counting from the shallowest aligned layer.
        """
        video, align = batch["video"], self.config.align
        target = self.teacher(video, self.config.mask, seed)
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.config.run.dtype == "bf16"):
            heads = self.student(video, target.visible)
        layers = kernels.align_loss(
            heads,
            target.targets,
            self.student.norm_weight,
            self.student.norm_bias,
            normalize=align.normalize,
            loss=align.loss,
            per_layer=True,
        )
        return {"loss": layers.mean()} | {f"loss_layer_{k}": layer for k, layer in enumerate(layers.detach())}

    @property
    def views_per_clip(self) -> int:
        """How often the student sees each clip in a step."""
        return self.config.mask.per_clip

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs this objective spends on a clip."""
        return self.flops_of(self.config)

    @staticmethod
    def flops_of(config: Stage1Config) -> float:
        """Matrix-product FLOPs of a clip: teacher forward, student forward and backward (three times forward) of every
        view."""
        vit, layers = config.student, config.align.num_layers
        visible = flops.visible_of(vit, config.mask)
        student = flops.tower_flops(vit, visible, num_layers=layers, output_dim=config.teacher.output_dim)
        teacher = teacher_kind(config.teacher).flops(config.teacher, vit, config.mask, num_layers=layers)
        return config.mask.per_clip * student + teacher


class Pretraining:
    """Masked pre-training of the student, against a frozen teacher."""

    name = "pretraining"
    Config = Stage1Config
    fuses_linear = True

    def settled(self, config: Stage1Config) -> Stage1Config:
        require_precision(config.teacher, pick_device(config.run.device))
        warn_of_no_bound(config.align)
        return config

    def refuse_unread(self, config: Stage1Config, refuse: Refuse, world_size: int) -> None:
        refuse_teacher(config, refuse)

    def objective(self, config: Stage1Config) -> UnmaskedAlignment:
        return UnmaskedAlignment(config)

    def untrained(self, config: Stage1Config) -> UnmaskedAlignment:
        config = copy.deepcopy(config)
        config.init, config.teacher.weights = "", "untrained"
        return UnmaskedAlignment(config)

    def loader(self, config: Stage1Config, ranks: Ranks) -> ClipLoader:
        return listed_clips(config, ranks)

    def validation(self, config: Stage1Config, ranks: Ranks) -> None:
        return None

    def random_batches(self, config: Stage1Config) -> list[dict[str, Tensor]]:
        return [random_clips(config, config.student.num_frames)]

    def without_noise(self, config: Stage1Config) -> Stage1Config:
        return dataclasses.replace(config, student=dataclasses.replace(config.student, drop_path=0.0))

    def clips_of_epoch(self, config: Stage1Config) -> tuple[int, str] | None:
        return counted_clips(config)

    def visible_tokens(self, config: Stage1Config) -> int:
        return flops.visible_of(config.student, config.mask)

    def describe(self, config: Stage1Config) -> dict[str, Any]:
        heads = {"num_layers": config.align.num_layers, "output_dim": config.teacher.output_dim}
        return base_description(self.name, config) | heads


def warn_of_no_bound(align: AlignConfig) -> None:
    """Says so where a loss can fall for ever: products of vectors of any length, as the official code has them too."""
    if (align.normalize, align.loss) == ("none", "l2"):
        log.warning(
            "WARNING: align.loss l2 with align.normalize none has no lower bound: it falls for ever as outputs grow. Take "
            "--align.loss mse or smooth_l1, or --align.normalize l2"
        )


def refuse_teacher(config: Any, refuse: Refuse) -> None:
    """What pre-training with a teacher does not read, in either stage."""
    if config.teacher.depth == 1:
        refuse("teacher.precision", "the last block is always exact, and teacher.depth is 1")
    refuse("optim.layer_decay", "only fine-tuning has a rate for each layer", 1.0)


register(Pretraining())
