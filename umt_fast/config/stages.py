"""What a recipe page returns: one configuration for each kind of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from umt_fast.config.augment import AugmentConfig, MixConfig, no_mix
from umt_fast.config.core import check_numbers, require
from umt_fast.config.models import AlignConfig, MaskConfig, Stage2Losses, TeacherConfig, TextConfig, VitConfig
from umt_fast.config.run import DataConfig, OptimConfig, RunConfig, video_text_optim
from umt_fast.masking import MASKS, TokenGrid, mask_named


def _check_heads(student: VitConfig, align: AlignConfig) -> None:
    """Raises ConfigError where the student has no block for each alignment head."""
    require(
        1 <= align.num_layers <= student.depth,
        f"align.num_layers is {align.num_layers}; it must lie in [1, student.depth = {student.depth}]",
    )


def _check_towers(student: VitConfig, teacher: TeacherConfig, align: AlignConfig) -> None:
    """Raises ConfigError where a frame has other tokens for the student than for the teacher, or a tower too few blocks."""
    student_side, teacher_side = (tower.image_size // tower.patch_size for tower in (student, teacher))
    require(
        student_side == teacher_side,
        f"student.image_size {student.image_size} gives the student {student_side} x {student_side} tokens a frame and "
        f"teacher.image_size {teacher.image_size} gives the teacher {teacher_side} x {teacher_side}; choose "
        f"teacher.image_size {student_side * teacher.patch_size}",
    )
    require(
        align.num_layers <= teacher.depth,
        f"align.num_layers is {align.num_layers}; it must lie in [1, teacher.depth = {teacher.depth}]",
    )


def _check_mask(name: str, mask: MaskConfig, student: VitConfig, frames: int) -> None:
    """Raises ConfigError where a mask cannot be drawn from the grid, or hides nothing.

    A draw takes at most so many tokens: of a frame, or for `random` of the clip.
    """
    kind = mask_named(mask.kind)
    grid = TokenGrid.of(
        num_frames=frames,
        tubelet_size=student.tubelet_size,
        image_size=student.image_size,
        patch_size=student.patch_size,
    )
    tokens, most, where = kind.limit(grid)
    limits = {other.name: other.limit(grid) for other in MASKS}
    others = " or ".join(repr(other) for other, limit in limits.items() if limit.tokens <= limit.most)
    remedy = f"{name}.kind {others}, " if others else ""
    require(
        tokens <= most,
        f"{name}.kind {mask.kind!r} draws from at most {most} tokens of {where}, and student.image_size "
        f"{student.image_size} with student.patch_size {student.patch_size} makes {tokens}; choose {remedy}smaller pictures "
        "or larger patches",
    )
    require(
        kind.count(grid, mask.ratio) < grid.size or mask.ratio == 0,
        f"{name}.ratio {mask.ratio} hides none of {tokens} tokens of {where}; give at least {1 / tokens:.3g}, or 0 for no mask",
    )
    rectangular = " or ".join(repr(other.name) for other in MASKS if other.rectangular)
    require(
        kind.rectangular or student.attention == "joint" or frames == student.tubelet_size,
        f"student.attention 'spatial' needs as many visible tokens in every frame, which {name}.kind {mask.kind!r} does not "
        f"give; choose {rectangular}",
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
        _check_heads(self.student, self.align)
        _check_towers(self.student, self.teacher, self.align)
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
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=no_mix)
    num_classes: int = 710
    init: str = ""
    """Weights to start from (stage-1, classifier or stage-2 file, or a deepspeed checkpoint folder); empty: from scratch."""
    init_as: Literal["encoder", "classifier", "new_head"] = "encoder"
    """What is taken of `init`. `encoder`: the encoder, and `fc_norm` and `head` where the file has them in this size; a stored
    position table is built anew. The others start as the official fine-tuning does, with the file's position table and
    `fc_norm`: `classifier` also with its head, of whose 710 rows (Kinetics-710) 400 classes take the first 400, and 600 or 700
    those of `label_map`; another number of classes is refused. `new_head`: with a fresh head."""
    label_map: str = ""
    """JSON list that has a Kinetics-710 row for each of 600 or 700 classes (the official label_mixto600.json)."""
    freeze: bool = False
    """Train the final norm and head alone (a linear probe)."""
    label_smoothing: float = 0.1
    head_scale: float = 0.001
    """Factor on the head's initial weights (normal, .02). The official value makes a short run start on a plateau."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.num_classes >= 2, f"num_classes is {self.num_classes}; it must be at least 2")
        require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")
        require(self.head_scale >= 0, f"head_scale is {self.head_scale}; it must not be negative")


@dataclass(kw_only=True, slots=True)
class Stage2Config:
    """Pre-training on captioned clips: contrastive, matching, masked-language and alignment losses (paper section 3.2)."""

    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=128, epochs=10, warmup_epochs=1))
    data: DataConfig = field(default_factory=lambda: DataConfig(sampling="intervals", augment="random_resized_crop"))
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
    same_sample: Literal["row", "media"] = "row"
    """Which captions and clips are each other's right answers in the contrastive and matching losses. `row`: those of one
    row of a list, so that another caption of the same picture counts as wrong, as in the official pre-training; `media`: all
    rows of a list that name the same file. Officially equal row numbers of two lists meet as well, by accident; here rows of
    different lists never do."""
    optim: OptimConfig = field(default_factory=lambda: video_text_optim(1e-4))
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
        require(self.embed_dim >= 2, f"embed_dim is {self.embed_dim}; a direction needs at least 2")
        require(0 < self.mask_words < 1, f"mask_words is {self.mask_words}; it must lie in (0, 1)")
        least = 3 if self.sep_token else 2  # a word besides the special tokens
        require(
            least <= self.max_length <= self.text.max_positions,
            f"max_length is {self.max_length}; it must lie in [{least}, text.max_positions = {self.text.max_positions}]",
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
        require(
            not self.losses.vtm or self.run.batch_size >= 2,
            f"run.batch_size is {self.run.batch_size}; losses.vtm draws its negatives within a rank's batch, which needs at "
            "least 2: raise it, or set losses.vtm to 0",
        )
        _check_heads(self.student, self.align)
        if self.runs_teacher:
            _check_towers(self.student, self.teacher, self.align)
        for name, mask in (("mask", self.mask), ("image_mask", self.image_mask)):
            require(
                mask.per_clip == 1,
                f"{name}.per_clip is {mask.per_clip}; stage 2 draws one mask of each clip: set it to 1",
            )
        frames = self.student.grid[0]
        require(
            not (self.images and self.student.position_grid) or self.student.position_grid[0] <= frames,
            f"student.position_grid is {self.student.position_grid}, of more frames than the {frames} of a clip: an image, "
            "which takes the first frame's positions, would get those of several; leave it out or raise student.num_frames",
        )
        for name, mask, frames in (
            ("mask", self.mask_of(image=False), self.student.num_frames),
            ("image_mask", self.mask_of(image=True) if self.images else None, self.student.tubelet_size),
        ):
            if mask is not None:
                _check_mask(name, mask, self.student, frames)

    @property
    def runs_teacher(self) -> bool:
        """Whether a loss reads CLIP's visual tower; where none does, it is neither built nor loaded."""
        return self.losses.uta > 0 or self.losses.vision_projection > 0

    def mask_of(self, *, image: bool) -> MaskConfig | None:
        """The mask of clips or of images. None: all tokens are seen, as such a mask is drawn from a teacher and no loss runs
        one; masks that need none are drawn all the same."""
        mask = self.image_mask if image else self.mask
        return mask if self.runs_teacher or not mask_named(mask.kind).needs_teacher else None

    @property
    def pools_frames(self) -> bool:
        """Whether each frame of a clip is pooled apart and similarities averaged over frames, which the official code does
        where nothing is hidden, or only tubes are."""
        kinds = (mask_named(mask.kind) for mask in (self.mask, self.image_mask))
        return self.mask_of(image=False) is None or all(kind.same_positions for kind in kinds)
