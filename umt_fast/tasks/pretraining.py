"""Stage 1: the student aligns with a frozen CLIP teacher at the tokens the teacher's attention draws (paper section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from umt_fast.config import Stage1Config
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.student import Student
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.weights import load_student, load_teacher


class UnmaskedAlignment(nn.Module):
    """batch -> loss. Only `student` is trained and saved; `teacher` is frozen."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.config = config
        vit, layers = config.student, config.align.num_layers
        self.student = Student(vit, layers, config.teacher.output_dim)
        self.teacher = ClipTeacher(config.teacher, layers, vit.tubelet_size)
        load_teacher(self.teacher, config.teacher)
        if config.init:
            load_student(self.student, config.init)
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
            batch: `video` uint8 (B, T, H, W, 3), or ImageNet-normalised (B, 3, T, H, W).
            seed: int64 (1,) on the device; decides the mask.

        Returns:
            fp32 device scalars: `loss`, and `loss_layer_{k}` (detached), k counting from the shallowest aligned layer.
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

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs this objective spends on a clip."""
        return self.flops_of(self.config)

    @staticmethod
    def flops_of(config: Stage1Config) -> float:
        """Matrix-product FLOPs of a clip: teacher forward, student forward and backward (three times forward)."""
        vit, layers = config.student, config.align.num_layers
        visible = flops.visible_of(vit, config.mask)
        student = flops.tower_flops(vit, visible, num_layers=layers, output_dim=config.teacher.output_dim)
        return student + flops.teacher_flops(config.teacher, vit, config.mask, num_layers=layers)
