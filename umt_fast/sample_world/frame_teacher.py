"""The per-frame baseline: CLIP on each frame, averaged over frames, one linear head. It cannot see motion's sign."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import FinetuneConfig, TeacherConfig
from umt_fast.models import flops
from umt_fast.models.teachers import load_teacher
from umt_fast.models.teachers.clip import ClipTeacher


class FrameClassifier(nn.Module):
    """Mean over frames of CLIP's class embedding -> logits; all weights are trained unless frozen."""

    def __init__(self, teacher: TeacherConfig, num_classes: int, freeze: bool, head_scale: float) -> None:
        super().__init__()
        self.tower = ClipTeacher(teacher, 1)
        load_teacher(self.tower)
        self.tower.requires_grad_(not freeze)
        # The class embedding is taken before these two.
        self.tower.ln_post.requires_grad_(False)
        self.tower.proj.requires_grad_(False)
        self.norm = nn.LayerNorm(teacher.width)
        self.head = nn.Linear(teacher.width, num_classes)
        # As the student's head begins.
        nn.init.trunc_normal_(self.head.weight, std=0.02 * head_scale)
        nn.init.zeros_(self.head.bias)

    def forward(self, video: Tensor) -> Tensor:
        """uint8 (B, T, S, S, 3) -> (B, num_classes)."""
        x = self.tower.embed(video)
        for block in self.tower.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0].unflatten(0, (video.shape[0], -1)).mean(1)))


class FrameSupervised(nn.Module):
    """The objective of the per-frame baseline, with the fine-tuning settings of the student it is compared with."""

    def __init__(self, config: FinetuneConfig, teacher: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = FrameClassifier(teacher, config.num_classes, config.freeze, config.head_scale)
        self.teacher = teacher

    @property
    def trainable(self) -> nn.Module:
        return self.classifier

    def layer_id(self, name: str) -> int:
        """0 for what comes before the blocks, i + 1 for block i, depth + 1 after them."""
        if name.startswith("tower.transformer.resblocks."):
            return int(name.split(".")[3]) + 1
        return self.teacher.depth + 1 if name.startswith(("norm.", "head.")) else 0

    def logits(self, video: Tensor) -> Tensor:
        return self.classifier(video)

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        logits, label = self.logits(batch["video"]), batch["label"]
        loss = F.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "top1": (logits.detach().argmax(1) == label).float().mean()}

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip, forward and backward."""
        return flops.frames_flops(self.teacher, self.config.student.num_frames, frozen=self.config.freeze)
