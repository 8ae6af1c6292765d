"""A DINO teacher: a self-supervised ViT (arXiv 2104.14294), or one of DINOv2 without registers (2304.07193).

It sees no captions. Its targets are intermediate features through the tower's last LayerNorm, with no projection, and its
class token, which follows foreground objects, draws the mask. LayerNorms have eps 1e-6, GELU is exact.
"""

from __future__ import annotations

from torch import nn

from umt_fast.config import ConfigError, MaskConfig, TeacherConfig, VitConfig
from umt_fast.models import flops
from umt_fast.models.teachers.base import register
from umt_fast.models.teachers.frame_tower import FrameTower
from umt_fast.models.weights import fit
from umt_fast.models.weights.timm_vit import tower_state


@register
class DinoTeacher(FrameTower):
    """A ViT in timm's layout. Its image embedding is the normed class token of the last block, as DINO is evaluated."""

    name = "dino"

    def __init__(self, config: TeacherConfig, num_layers: int, tubelet_size: int = 1) -> None:
        super().__init__(config, num_layers, tubelet_size, eps=1e-6, norm_first=False, patch_bias=True, projects=False)

    @staticmethod
    def check(config: TeacherConfig) -> None:
        if config.activation != "gelu":
            raise ConfigError(
                f"teacher.activation is {config.activation!r}, and DINO has the exact GELU; set --teacher.activation gelu"
            )
        if config.output_dim != config.width:
            raise ConfigError(
                f"teacher.output_dim is {config.output_dim}, and DINO has no projection: its outputs are as wide as the tower; "
                f"set --teacher.output_dim {config.width}"
            )

    @staticmethod
    def flops(
        config: TeacherConfig, vit: VitConfig, mask: MaskConfig, *, num_layers: int, with_image: bool = False
    ) -> float:
        return flops.frame_tower_flops(config, vit, mask, num_layers=num_layers, with_image=with_image, projects=False)

    @staticmethod
    def load_text(config: TeacherConfig) -> nn.Module:
        raise ConfigError("losses.text_projection needs a teacher with a text tower, and DINO has none; set it to 0")

    def load(self) -> None:
        positions, tubelet = len(self.positional_embedding), self.conv1.weight.shape[2]
        fit(self, tower_state(self.config.weights, positions, tubelet), f"teacher weights {self.config.weights}")
