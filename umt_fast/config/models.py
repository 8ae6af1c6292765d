"""The towers, their masks and the losses between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from umt_fast.config.core import check_numbers, require
from umt_fast.masking import MASKS

MAX_FRAMES = 4096
"""Frames of a clip: more are a slip of the pen, which would ask for more memory than there is."""
TeacherPrecision = Literal["native", "int8", "fp8"]


@dataclass(kw_only=True, slots=True)
class VitConfig:
    """The student: a pre-LN ViT without class token (paper section 4.1)."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    tubelet_size: int = 1
    """Frames per token; every official script uses 1."""
    image_size: int = 224
    num_frames: int = 8
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    attention: Literal["joint", "spatial"] = "joint"
    """`joint` space-time attention, or `spatial`: within each frame only (paper Table 3)."""
    position_grid: tuple[int, ...] = ()
    """Token frames, rows and columns that the position table is made for before it is resized to this clip's. Empty:
    this clip's own in pre-training; in fine-tuning the grid that `init` was trained at, 8 14 14 where it does not say."""
    checkpoint_blocks: int = 0
    """Recompute the activations of the first so many blocks in the backward pass."""

    def __post_init__(self) -> None:
        check_numbers(self, "student")
        for name in ("width", "depth", "num_heads", "patch_size", "tubelet_size", "image_size", "num_frames"):
            require(getattr(self, name) > 0, f"student.{name} is {getattr(self, name)}; it must be positive")
        require(
            self.num_frames <= MAX_FRAMES,
            f"student.num_frames is {self.num_frames}; a clip has at most {MAX_FRAMES} frames",
        )
        require(
            self.width % self.num_heads == 0,
            f"student.width {self.width} is not a multiple of student.num_heads {self.num_heads}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"student.image_size {self.image_size} is not a multiple of student.patch_size {self.patch_size}",
        )
        require(
            self.num_frames % self.tubelet_size == 0,
            f"student.num_frames {self.num_frames} is not a multiple of student.tubelet_size {self.tubelet_size}",
        )
        require(
            len(self.position_grid) in (0, 3) and all(size > 0 for size in self.position_grid),
            f"student.position_grid is {self.position_grid}; give three positive numbers: token frames, rows, columns",
        )
        require(
            self.width * self.mlp_ratio >= 1,
            f"student.mlp_ratio is {self.mlp_ratio}; it must be at least 1 / student.width = {1 / self.width:.3g}",
        )
        require(0 <= self.drop_path < 1, f"student.drop_path is {self.drop_path}; it must lie in [0, 1)")
        require(
            0 <= self.checkpoint_blocks <= self.depth,
            f"student.checkpoint_blocks is {self.checkpoint_blocks}; it must lie in [0, depth = {self.depth}]",
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token frames, rows and columns of a clip."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """Stored fields under today's names: older records say table_frames and table_side, 0 for the clip's own."""
        if "table_frames" not in values and "table_side" not in values:
            return values
        values = dict(values)
        frames, side = values.pop("table_frames", 0), values.pop("table_side", 0)
        own = VitConfig(**values).grid
        return values | {"position_grid": (frames or own[0], side or own[1], side or own[2])}


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The frozen tower that the student learns from."""

    kind: str = "clip"
    """`clip`: CLIP's visual tower, the official teacher; `dino`: a ViT of DINO or DINOv2; or another one of
    umt_fast/models/teachers."""
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    """Pixels per side the teacher sees; CLIP L/14 runs at 196 so that its grid is the student's 14 x 14."""
    output_dim: int = 512
    """Channels of the targets; `dino` has no projection, and gives as many as teacher.width."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's weights were trained with x * sigmoid(1.702 x), most of open_clip's own and DINO's with the exact GELU."""
    weights: str = "ViT-B-16:openai"
    """`ARCH:TAG` for open_clip, a local file (OpenAI, open_clip or official layout; for `dino` timm's or DINO's own), or
    `untrained`: random weights, which train nothing useful and are announced loudly."""
    precision: TeacherPrecision = "native"
    """`native`: as run.dtype says. `int8` (CPUs with VNNI, GPUs from A100 on) and `fp8` (from H100 on) compute the
    large products of all blocks but the last in 8 bits; the targets then differ a little: `bench fidelity` says by how much
    for given weights."""

    def __post_init__(self) -> None:
        check_numbers(self, "teacher")
        for name in ("width", "depth", "num_heads", "patch_size", "image_size", "output_dim"):
            require(getattr(self, name) > 0, f"teacher.{name} is {getattr(self, name)}; it must be positive")
        require(self.output_dim >= 2, f"teacher.output_dim is {self.output_dim}; a direction needs at least 2")
        require(
            self.width % self.num_heads == 0,
            f"teacher.width {self.width} is not a multiple of teacher.num_heads {self.num_heads}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"teacher.image_size {self.image_size} is not a multiple of teacher.patch_size {self.patch_size}",
        )


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """BERT and its cross-modal upper layers (stage 2); the defaults are bert-base-uncased."""

    width: int = 768
    depth: int = 12
    fusion_layer: int = 9
    """First layer that also attends to vision tokens; 9 of 12 for base, 19 of 24 for large."""
    num_heads: int = 12
    vocab_size: int = 30522
    max_positions: int = 512
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    """Deviation of fresh weights. BERT's own is for widths of 768 and more; narrow models trained from nothing need more."""

    def __post_init__(self) -> None:
        check_numbers(self, "text")
        for name in ("width", "depth", "num_heads", "vocab_size", "max_positions"):
            require(getattr(self, name) > 0, f"text.{name} is {getattr(self, name)}; it must be positive")
        require(
            self.width % self.num_heads == 0,
            f"text.width {self.width} is not a multiple of text.num_heads {self.num_heads}",
        )
        require(
            0 < self.fusion_layer < self.depth,
            f"text.fusion_layer is {self.fusion_layer}; it must lie in (0, depth = {self.depth})",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, f"text.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        require(self.init_std > 0, f"text.init_std is {self.init_std}; it must be positive")


@dataclass(kw_only=True, slots=True)
class MaskConfig:
    """Which tokens the student sees."""

    kind: str = "semantic"
    """`semantic`: drawn frame by frame from the teacher's class-token attention; `random`: uniformly over the
    clip; `tube`: the same uniform positions in every frame; or another one of umt_fast/masking/kinds."""
    ratio: float = 0.8
    """Share of tokens hidden; n = N - int(N * ratio) stay visible."""
    per_clip: int = 1
    """M masks of each clip in one step, drawn apart from the same attention: the teacher runs once, the student sees M views
    of n tokens each, and the loss is their mean. Stage 1 alone; the learning rate still counts clips."""

    def __post_init__(self) -> None:
        check_numbers(self, "mask")
        require(self.kind in MASKS, MASKS.unknown(self.kind))
        require(self.per_clip >= 1, f"mask.per_clip is {self.per_clip}; it must be at least 1")
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; it must lie in [0, 1)")


@dataclass(kw_only=True, slots=True)
class AlignConfig:
    """The alignment of student outputs to teacher outputs (paper section 3.1)."""

    num_layers: int = 6
    """K: the last K blocks of both towers, paired in order."""
    normalize: Literal["l2", "none"] = "l2"
    loss: Literal["l2", "mse", "smooth_l1"] = "l2"
    """`l2`: 2 - 2 cos summed over channels, as in the official code; the others average over channels too. With `normalize
    none` l2 has no lower bound, as officially: take one of the others there."""

    def __post_init__(self) -> None:
        check_numbers(self, "align")


@dataclass(kw_only=True, slots=True)
class Stage2Losses:
    """Weights of the four losses of stage 2; 0 switches one off. The official ones are all 1."""

    vtc: float = 1.0
    """Contrastive: which caption belongs to which clip of the batch."""
    vtm: float = 1.0
    """Matching: whether a caption belongs to a clip, with hard negatives."""
    mlm: float = 1.0
    """Masked language: the hidden words of a caption, given its clip."""
    uta: float = 1.0
    """Alignment of the tower to the CLIP teacher, as in stage 1. 0 runs no teacher (unless vision_projection does), and
    `semantic` masks, which a teacher draws, then hide nothing (paper Table 6)."""
    vision_projection: float = 0.0
    """Alignment of the projected, pooled clip to CLIP's own image embedding, averaged over frames: 1 - cosine. Not in the
    official training; needs embed_dim equal to teacher.output_dim."""
    text_projection: float = 0.0
    """Alignment of the projected caption to the embedding CLIP's text tower gives it, likewise. Needs teacher.weights with
    that tower: `ARCH:TAG`, or a file of the whole CLIP in OpenAI's or open_clip's layout."""
    gather: Literal["official", "full"] = "official"
    """Gradient of the contrastive loss over several ranks. `official`: 1 / ranks of the joint batch's at the encoders and
    projections, all of it at the temperature, as the official gathering leaves it; `full`: the joint batch's own."""

    def __post_init__(self) -> None:
        check_numbers(self, "losses")
        names = ("vtc", "vtm", "mlm", "uta", "vision_projection", "text_projection")
        for name in names:
            require(getattr(self, name) >= 0, f"losses.{name} is {getattr(self, name)}; it must not be negative")
        require(any(getattr(self, name) for name in names), "every weight of losses is 0; nothing would be trained")
