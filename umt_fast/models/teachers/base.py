"""What a teacher is: a frozen tower that looks at the frames of a clip, known by the name that teacher.kind has.

Legend: B clips, T token frames, L patch tokens per frame, N = T * L, n visible tokens per clip, K aligned layers, D output
width, R = B * T.
"""

from __future__ import annotations

import logging
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from umt_fast.config import ConfigError, MaskConfig, TeacherConfig, TeacherPrecision, VitConfig
from umt_fast.registry import Registry

log = logging.getLogger("umt_fast.weights")


class TeacherOutput(NamedTuple):
    """visible: int32 (B * M, n) ascending flat indices, the M = mask.per_clip views of a clip side by side. targets:
    (K, B * M, n, D) projected, not normalized. image: fp32 (B, D), the tower's own unit image embeddings averaged over frames.
    The last two where they were asked for."""

    visible: Tensor
    targets: Tensor | None
    image: Tensor | None = None


class Teacher(Protocol):
    """A module whose parameters take no gradient and that stays in evaluation mode."""

    name: ClassVar[str]
    """In configurations and checkpoints; never changed."""
    precisions: ClassVar[tuple[TeacherPrecision, ...]]
    """What teacher.precision may be: `native`, and the 8-bit forms that `quantize` has."""
    config: TeacherConfig
    """What it was built with."""

    def __init__(self, config: TeacherConfig, num_layers: int, tubelet_size: int = 1) -> None:
        """A tower with random weights whose last num_layers blocks give targets; tubelet_size: frames of a token."""

    @staticmethod
    def check(config: TeacherConfig) -> None:
        """Raises ConfigError: settings that such a tower cannot have."""

    @staticmethod
    def flops(
        config: TeacherConfig, vit: VitConfig, mask: MaskConfig, *, num_layers: int, with_image: bool = False
    ) -> float:
        """Matrix-product FLOPs of forward over a clip of the student `vit`; num_layers 0: no targets. See models/flops.py."""

    @staticmethod
    def load_text(config: TeacherConfig) -> nn.Module:
        """The text tower that belongs to it: ids (B, l) -> unit embeddings (B, D), with compute_in; for
        losses.text_projection. Raises ConfigError: it has none. WeightsError: these weights have none."""

    def load(self) -> None:
        """Fills it from config.weights. Raises WeightsError: weights that cannot be had, or of another tower."""

    def compute_in(self, dtype: torch.dtype) -> Teacher:
        """Casts the matrix weights once. No autocast is then needed, nor any cast per step."""

    def quantize(self, precision: TeacherPrecision) -> Teacher:
        """Computes in 8 bits from now on, as one of `precisions` says; `native` changes nothing."""

    def __call__(
        self, video: Tensor, mask: MaskConfig, seed: Tensor, *, with_image: bool = False, with_targets: bool = True
    ) -> TeacherOutput:
        """Draws the mask and computes the targets at its visible tokens; the host must not wait for it.

        Args:
            video: uint8 (B, T', S, S, 3), or ImageNet-normalized (B, 3, T', S, S); T' frames, of the student's resolution.
            mask: which tokens stay visible, and in how many views of each clip; see umt_fast/masking.
            seed: int64 (1,) on the video's device.
            with_image: give the image embedding too.
            with_targets: give the targets; without them only the mask is drawn.
        """

    def features(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens: targets (K, B, N, D), not normalized, and the class token's attention (R, L) fp32."""


TEACHER_KINDS: Registry[type[Teacher]] = Registry("teacher kind")


def register(kind: type[Teacher]) -> type[Teacher]:
    """Makes a kind known by its name, and returns it. Raises ValueError: another one has the name."""
    return TEACHER_KINDS.register(kind)


def teacher_kind(config: TeacherConfig) -> type[Teacher]:
    """The kind that a configuration names. Raises ConfigError: none has the name, or it cannot have these settings."""
    if config.kind not in TEACHER_KINDS:
        raise ConfigError(f"teacher.kind: {TEACHER_KINDS.unknown(config.kind)}")
    kind = TEACHER_KINDS.named(config.kind)
    if config.precision not in kind.precisions:
        raise ConfigError(
            f"teacher.precision is {config.precision!r}, which teacher.kind {config.kind!r} does not have; it has: "
            f"{', '.join(kind.precisions)}"
        )
    kind.check(config)
    return kind


def build_teacher(config: TeacherConfig, num_layers: int, tubelet_size: int = 1) -> Teacher:
    """A teacher with the weights and in the precision that its configuration says.

    Raises ConfigError: see teacher_kind. WeightsError: weights that cannot be had or read, or that belong to another tower.
    """
    teacher = teacher_kind(config)(config, num_layers, tubelet_size)
    load_teacher(teacher)
    return teacher


def load_teacher(teacher: Teacher) -> None:
    """Fills a teacher with config.weights, then quantizes it as config.precision says.

    Raises WeightsError: weights that cannot be had or read, or that belong to another tower.
    """
    if teacher.config.weights == "untrained":
        log.warning(
            "WARNING: the teacher is untrained (random weights). The student learns nothing useful; this is for trials."
        )
    else:
        teacher.load()
    teacher.quantize(teacher.config.precision)
