"""What a recipe page returns: one configuration for each kind of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from umt_fast.config.core import MOST_SCORES, MOST_TOKENS, check_numbers, require
from umt_fast.config.models import AlignConfig, MaskConfig, Stage2Losses, TeacherConfig, TextConfig, VitConfig
from umt_fast.config.run import DataConfig, OptimConfig, RunConfig


def _check_mask(name: str, mask: MaskConfig, student: VitConfig, frames: int) -> None:
    """Raises ConfigError where the grid has more tokens than one draw takes: of a frame, or for `random` of the clip."""
    frame = (student.image_size // student.patch_size) ** 2
    clip = frame * (frames // student.tubelet_size)
    drawn = {"semantic": (frame, MOST_TOKENS), "random": (clip, MOST_SCORES), "tube": (frame, MOST_SCORES)}
    tokens, most = drawn[mask.kind]
    where = "a clip" if mask.kind == "random" else "a frame"
    others = " or ".join(repr(kind) for kind, (count, limit) in drawn.items() if count <= limit)
    remedy = f"{name}.kind {others}, " if others else ""
    require(
        tokens <= most,
        f"{name}.kind {mask.kind!r} draws from at most {most} tokens of {where}, and student.image_size "
        f"{student.image_size} with student.patch_size {student.patch_size} makes {tokens}; choose {remedy}smaller pictures "
        "or larger patches",
    )


@dataclass(kw_only=True, slots=True)
class Stage1Config:
    """Masked video pre-training against a frozen CLIP teacher."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    student: VitConfig = field(default_factory=VitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: str = ""
    """Student weights to start from (official stage-1 layout); empty: from scratch."""

    def __post_init__(self) -> None:
        check_numbers(self)
        student_side = self.student.image_size // self.student.patch_size
        teacher_side = self.teacher.image_size // self.teacher.patch_size
        require(
            student_side == teacher_side,
            f"the student's grid is {student_side} x {student_side} and the teacher's {teacher_side} x {teacher_side}; "
            "choose teacher.image_size so that both are equal",
        )
        for tower, depth in (("student", self.student.depth), ("teacher", self.teacher.depth)):
            require(
                1 <= self.align.num_layers <= depth,
                f"align.num_layers is {self.align.num_layers}; it must lie in [1, {tower}.depth = {depth}]",
            )
        _check_mask("mask", self.mask, self.student, self.student.num_frames)


@dataclass(kw_only=True, slots=True)
class FinetuneConfig:
    """Supervised classification of clips, from pre-trained weights or from scratch."""

    run: RunConfig = field(default_factory=lambda: RunConfig(epochs=35, warmup_epochs=2, batch_size=16))
    data: DataConfig = field(default_factory=lambda: DataConfig(num_sample=2))
    student: VitConfig = field(default_factory=VitConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-4, min_lr=1e-6, warmup_lr=1e-6, betas=(0.9, 0.999), layer_decay=0.75)
    )
    num_classes: int = 710
    init: str = ""
    """Encoder weights to start from (stage-1, classifier or stage-2 file); empty: from scratch."""
    freeze: bool = False
    """Train the final norm and head alone (a linear probe)."""
    label_smoothing: float = 0.1
    head_scale: float = 0.001
    """Factor on the head's initial weights (normal, .02). The official value makes a short run start on a plateau."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.num_classes >= 2, f"num_classes is {self.num_classes}; it must be at least 2")
        require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")


@dataclass(kw_only=True, slots=True)
class Stage2Config:
    """Pre-training on captioned clips: contrastive, matching, masked-language and alignment losses (paper section 3.2)."""

    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=128, epochs=10, warmup_epochs=1))
    data: DataConfig = field(default_factory=lambda: DataConfig(augment="random_resized_crop"))
    """How clips and images are cut; the lists are `videos` and `images`, data.train is not used."""
    videos: tuple[str, ...] = ()
    """Caption lists of clips (.json, SQLite, or tars as `cc12m/{00000..01242}.tar`), each as LIST or LIST=FOLDER, the folder
    its names are relative to (not for tars)."""
    images: tuple[str, ...] = ()
    """Caption lists of images, likewise."""
    co_training: Literal["alternating", "packed"] = "alternating"
    """With both: `alternating` gives each step a batch of one kind, in an order drawn for each epoch; `packed` gives it a
    batch of each, packed through the tower together, and averages their losses. A packed epoch is as long as the longer kind
    is; the shorter one starts over."""
    student: VitConfig = field(default_factory=lambda: VitConfig(num_frames=4))
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    image_mask: MaskConfig = field(default_factory=lambda: MaskConfig(ratio=0.5))
    """Which tokens of an image the tower sees."""
    align: AlignConfig = field(default_factory=AlignConfig)
    losses: Stage2Losses = field(default_factory=Stage2Losses)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, min_lr=1e-6, warmup_lr=1e-6, lr_batch=0, betas=(0.9, 0.999), weight_decay=0.02
        )
    )
    embed_dim: int = 512
    """Width of the common space of clips and captions."""
    init: str = ""
    """Stage-1 weights of the tower, or stage-2 weights of everything (ours or official); empty: from scratch."""
    bert: str = "bert-base-uncased"
    """Text weights by name or local folder; `untrained`: random. Not read where `init` has the text encoder."""
    tokenizer: str = "bert-base-uncased"
    """By name, or a local folder with a vocab.txt."""
    max_length: int = 32
    """Tokens of a caption, class token included; longer ones are cut."""
    sep_token: bool = False
    """Close captions with [SEP]; released UMT checkpoints were trained without."""
    mask_words: float = 0.5
    """Share of words hidden for the masked-language loss."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.embed_dim > 0, f"embed_dim is {self.embed_dim}; it must be positive")
        require(0 < self.mask_words < 1, f"mask_words is {self.mask_words}; it must lie in (0, 1)")
        require(
            2 <= self.max_length <= self.text.max_positions,
            f"max_length is {self.max_length}; it must lie in [2, text.max_positions = {self.text.max_positions}]",
        )
        for name in ("vision_projection", "text_projection"):
            require(
                not getattr(self.losses, name) or self.embed_dim == self.teacher.output_dim,
                f"losses.{name} needs embed_dim {self.embed_dim} to be teacher.output_dim {self.teacher.output_dim}",
            )
        require(
            self.co_training == "alternating" or self.student.attention == "joint",
            "co_training 'packed' needs student.attention 'joint'; choose that, or 'alternating'",
        )
        _check_mask("mask", self.mask, self.student, self.student.num_frames)
        if self.images:
            _check_mask("image_mask", self.image_mask, self.student, self.student.tubelet_size)
