"""The sizes by name: official students, their CLIP teachers, DINO's, and tiny ones for tests and trials."""

from __future__ import annotations

from typing import Any

from umt_fast.config import ConfigError, TeacherConfig, TextConfig, VitConfig


def _dino(width: int, depth: int, num_heads: int, patch_size: int, image_size: int) -> dict[str, Any]:
    sizes = {"width": width, "depth": depth, "num_heads": num_heads, "patch_size": patch_size, "image_size": image_size}
    return sizes | {"output_dim": width, "activation": "gelu", "kind": "dino"}


STUDENTS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 96, "depth": 4, "num_heads": 3, "patch_size": 16, "image_size": 64},
    "b16": {"width": 768, "depth": 12, "num_heads": 12, "drop_path": 0.1},
    "l16": {"width": 1024, "depth": 24, "num_heads": 16, "drop_path": 0.2},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "clip_tiny": {"width": 96, "depth": 4, "num_heads": 3, "patch_size": 16, "image_size": 64, "output_dim": 64},
    "clip_b16": {"width": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "image_size": 224, "output_dim": 512},
    "clip_l14": {"width": 1024, "depth": 24, "num_heads": 16, "patch_size": 14, "image_size": 196, "output_dim": 768},
    "dino_s16": _dino(384, 12, 6, 16, 224),
    "dino_b16": _dino(768, 12, 12, 16, 224),
    # DINOv2, at the resolution of the student's 14 x 14 tokens.
    "dinov2_b14": _dino(768, 12, 12, 14, 196),
    "dinov2_l14": _dino(1024, 24, 16, 14, 196),
}
# What the official recipes fill the teachers with.
USUAL_WEIGHTS = {"clip_b16": "ViT-B-16:openai", "clip_l14": "ViT-L-14:openai"}
TEXTS: dict[str, dict[str, Any]] = {
    "b16": {"width": 768, "depth": 12, "fusion_layer": 9, "num_heads": 12},
    "l16": {"width": 1024, "depth": 24, "fusion_layer": 19, "num_heads": 16},
}


def _size(table: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in table:
        raise ConfigError(f"unknown size {name!r}; known: {', '.join(table)}")
    return table[name]


def student_size(name: str, **changes: Any) -> VitConfig:
    """The student `tiny`, `b16` or `l16`, with fields changed."""
    return VitConfig(**(_size(STUDENTS, name) | changes))


def teacher_size(name: str, **changes: Any) -> TeacherConfig:
    """The teacher `clip_tiny`, `clip_b16`, `clip_l14` (at 196 pixels), or one of DINO's, with fields changed."""
    return TeacherConfig(**(_size(TEACHERS, name) | changes))


def text_size(name: str, **changes: Any) -> TextConfig:
    """The text encoder beside the student `b16` (BERT base) or `l16` (BERT large), with fields changed."""
    return TextConfig(**(_size(TEXTS, name) | changes))
