"""The official teacher: CLIP's visual tower, under the parameter names of the `visual.` part of OpenAI's CLIP."""

from __future__ import annotations

from torch import nn

from umt_fast.config import MaskConfig, TeacherConfig, VitConfig
from umt_fast.models import flops
from umt_fast.models.teachers.base import register
from umt_fast.models.teachers.clip_text import load_clip_text
from umt_fast.models.teachers.frame_tower import FrameTower
from umt_fast.models.weights import fit
from umt_fast.models.weights.clip import visual_state


@register
class ClipTeacher(FrameTower):
    """CLIP's image encoder. All intermediate features go through its ln_post and its projection, as officially."""

    name = "clip"

    def __init__(self, config: TeacherConfig, num_layers: int, tubelet_size: int = 1) -> None:
        super().__init__(config, num_layers, tubelet_size, eps=1e-5, norm_first=True, patch_bias=False, projects=True)

    @staticmethod
    def check(config: TeacherConfig) -> None:
        """Every TeacherConfig is of a CLIP tower."""

    @staticmethod
    def flops(
        config: TeacherConfig, vit: VitConfig, mask: MaskConfig, *, num_layers: int, with_image: bool = False
    ) -> float:
        return flops.frame_tower_flops(config, vit, mask, num_layers=num_layers, with_image=with_image)

    @staticmethod
    def load_text(config: TeacherConfig) -> nn.Module:
        return load_clip_text(config)

    def load(self) -> None:
        positions, tubelet = len(self.positional_embedding), self.conv1.weight.shape[2]
        fit(self, visual_state(self.config, positions, tubelet), f"teacher weights {self.config.weights}")
