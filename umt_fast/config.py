"""Typed run configurations: what a recipe page returns and what the command line may override.

Every field is documented where it stands; a wrong value is refused at construction with the field, the value
and the rule in the message. Shapes and defaults follow Unmasked Teacher (arXiv 2303.16058).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MaskKind = Literal["semantic", "random", "tube"]
Dtype = Literal["bf16", "fp32"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, the value and the rule."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


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
    table_frames: int = 0
    """Token frames the sinusoid table is made for before it is resized to this clip; 0: this clip's own. Fine-tuning
    with more frames than pre-training had sets what pre-training had: 8."""
    table_side: int = 0
    """The same for token rows and columns; fine-tuning at 384 pixels from 224 sets 14."""
    checkpoint_blocks: int = 0
    """Recompute the activations of the first so many blocks in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "patch_size", "tubelet_size", "image_size", "num_frames"):
            require(getattr(self, name) > 0, f"student.{name} is {getattr(self, name)}; it must be positive")
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
        for name in ("table_frames", "table_side"):
            require(getattr(self, name) >= 0, f"student.{name} is {getattr(self, name)}; it must not be negative")
        require(0 <= self.drop_path < 1, f"student.drop_path is {self.drop_path}; it must lie in [0, 1)")
        require(
            0 <= self.checkpoint_blocks <= self.depth,
            f"student.checkpoint_blocks is {self.checkpoint_blocks}; it must lie in [0, depth = {self.depth}]",
        )


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The frozen CLIP visual tower."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    """Pixels per side the teacher sees; CLIP L/14 runs at 196 so that its grid is the student's 14 x 14."""
    output_dim: int = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's weights were trained with x * sigmoid(1.702 x), most of open_clip's own with the exact GELU."""
    weights: str = "ViT-B-16:openai"
    """`ARCH:TAG` for open_clip, a local file (OpenAI, open_clip or official layout), or `untrained`:
    random weights, which train nothing useful and are announced loudly."""

    def __post_init__(self) -> None:
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

    def __post_init__(self) -> None:
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


@dataclass(kw_only=True, slots=True)
class MaskConfig:
    """Which tokens the student sees."""

    kind: MaskKind = "semantic"
    """`semantic`: drawn frame by frame from the teacher's class-token attention; `random`: uniformly over the
    clip; `tube`: the same uniform positions in every frame."""
    ratio: float = 0.8
    """Share of tokens hidden; n = N - int(N * ratio) stay visible."""

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; it must lie in [0, 1)")


@dataclass(kw_only=True, slots=True)
class AlignConfig:
    """The alignment of student outputs to teacher outputs (paper section 3.1)."""

    num_layers: int = 6
    """K: the last K blocks of both towers, paired in order."""
    normalize: Literal["l2", "none"] = "l2"
    loss: Literal["l2", "mse", "smooth_l1"] = "l2"
    """`l2`: 2 - 2 cos summed over channels, as in the official code; the others average over channels too."""


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
    """Alignment of the tower to the CLIP teacher, as in stage 1."""

    def __post_init__(self) -> None:
        for name in ("vtc", "vtm", "mlm", "uta"):
            require(getattr(self, name) >= 0, f"losses.{name} is {getattr(self, name)}; it must not be negative")
        require(self.vtc + self.vtm + self.mlm + self.uta > 0, "every weight of losses is 0; nothing would be trained")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which clips, and how they are cut."""

    train: str = ""
    """An official list (path, label), a manifest written by `scan`, or empty: then the run stops and says so."""
    root: str = ""
    """Folder put before relative paths of the list; empty: the list's own folder."""
    separator: str = ","
    """Field separator of the list."""
    sampling: Literal["sparse", "dense"] = "sparse"
    """`sparse`: one random frame in each of T equal segments; `dense`: T frames `sampling_rate` apart."""
    sampling_rate: int = 4
    """Frame stride of dense sampling."""
    num_sample: int = 1
    """Augmented crops per decoded clip (repeated augmentation)."""
    augment: Literal["multi_scale_crop", "random_resized_crop", "center"] = "multi_scale_crop"
    """`multi_scale_crop` as in stage 1, `random_resized_crop` (50 to 100% of the area) as in stage 2."""
    flip: bool = True
    workers: int = 4
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Batches each worker prepares ahead."""
    max_bad_share: float = 0.1
    """The run stops once more than this share of the list's files proved unreadable."""
    frame_pattern: str = "img_{:05d}.jpg"
    """File name of frame i (from 1) in lists of frame folders."""

    def __post_init__(self) -> None:
        require(len(self.separator) > 0, "data.separator is empty; give the character between the list's fields")
        require(self.num_sample >= 1, f"data.num_sample is {self.num_sample}; it must be at least 1")
        require(self.sampling_rate >= 1, f"data.sampling_rate is {self.sampling_rate}; it must be at least 1")
        require(self.workers >= 0, f"data.workers is {self.workers}; it must not be negative")
        require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; it must be at least 1")
        require(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}; it must lie in [0, 1]")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then half a cosine."""

    lr: float = 1.5e-4
    """Peak rate for `lr_batch` clips per step; scaled linearly with the true global batch."""
    min_lr: float = 1e-5
    """Final rate, scaled like lr."""
    warmup_lr: float = 0.0
    """Rate of the first step, scaled like lr; the official stage-1 run starts at 0."""
    lr_batch: int = 256
    """Batch the rates are meant for; 0 switches the scaling off."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Not applied to biases, to one-dimensional parameters, nor to position tables."""
    layer_decay: float = 1.0
    """Rate multiplier per layer from the top (fine-tuning); 1 switches it off."""
    clip_grad: float = 0.0
    """Largest gradient norm; 0 switches clipping off."""
    fused: Literal["torch", "apex"] = "torch"
    """`apex`: NVIDIA apex's FusedAdam (GPU only; not the registry's package of that name)."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_lr", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; it must not be negative")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay is {self.layer_decay}; it must lie in (0, 1]")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """How long, how large, where to."""

    out: str = "runs/default"
    """Folder of checkpoints, metrics.jsonl and TensorBoard events."""
    batch_size: int = 64
    """Clips per rank and micro-step, before `num_sample`."""
    accumulate: int = 1
    """Micro-steps whose gradients make one optimizer step."""
    epochs: int = 201
    warmup_epochs: float = 40
    max_steps: int = 0
    """Stop after so many optimizer steps; 0: only `epochs` decides. The schedule is not shortened."""
    dtype: Dtype = "bf16"
    """Compute precision; parameters and optimizer state stay fp32. On a CPU without bf16 instructions `bf16` computes in
    fp32 and says so."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = 0
    compile: bool = False
    """torch.compile the objective."""
    log_every: int = 10
    """Steps between log lines; the only steps on which the host waits for the device."""
    save_every: int = 0
    """Steps between checkpoints besides the one at each epoch's end; 0: none."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after a newer one is safely on disk."""
    keep_every_epochs: int = 0
    """Checkpoints of every so many epochs are never deleted; 0: none."""
    resume: bool = True
    """Continue from the newest checkpoint in `out`, if there is one."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "epochs", "log_every", "keep"):
            require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_epochs", "max_steps", "save_every", "keep_every_epochs"):
            require(getattr(self, name) >= 0, f"run.{name} is {getattr(self, name)}; it must not be negative")
        require(
            self.warmup_epochs < self.epochs,
            f"run.warmup_epochs {self.warmup_epochs} must be less than run.epochs {self.epochs}",
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
        require(self.num_classes >= 2, f"num_classes is {self.num_classes}; it must be at least 2")
        require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")


@dataclass(kw_only=True, slots=True)
class Stage2Config:
    """Pre-training on captioned clips: contrastive, matching, masked-language and alignment losses (paper section 3.2)."""

    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=128, epochs=10, warmup_epochs=1))
    data: DataConfig = field(default_factory=lambda: DataConfig(augment="random_resized_crop"))
    """How clips and images are cut; the lists are `videos` and `images`, data.train is not used."""
    videos: tuple[str, ...] = ()
    """Caption lists of clips (.json or SQLite), each as LIST or LIST=FOLDER, the folder its names are relative to."""
    images: tuple[str, ...] = ()
    """Caption lists of images, likewise. With both, each step takes a batch of one kind, in an order drawn for each epoch."""
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
    """Stage-1 weights of the tower; empty: from scratch."""
    bert: str = "bert-base-uncased"
    """Text weights by name or local folder; `untrained`: random."""
    tokenizer: str = "bert-base-uncased"
    """By name, or a local folder with a vocab.txt."""
    max_length: int = 32
    """Tokens of a caption, class token included; longer ones are cut."""
    sep_token: bool = False
    """Close captions with [SEP]; released UMT checkpoints were trained without."""
    mask_words: float = 0.5
    """Share of words hidden for the masked-language loss."""

    def __post_init__(self) -> None:
        require(0 < self.mask_words < 1, f"mask_words is {self.mask_words}; it must lie in (0, 1)")
        require(
            2 <= self.max_length <= self.text.max_positions,
            f"max_length is {self.max_length}; it must lie in [2, text.max_positions = {self.text.max_positions}]",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, for checkpoints and logs."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(kind: type[Any], values: dict[str, Any]) -> Any:
    """The inverse of to_dict. Raises ConfigError: an entry this version's configuration does not have."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{kind.__name__} has no {', '.join(unknown)}; it was written by another version")
    hints = typing.get_type_hints(kind)

    def value_of(name: str) -> Any:
        value = values[name]
        if dataclasses.is_dataclass(hints[name]):
            return from_dict(hints[name], value)
        return tuple(value) if typing.get_origin(hints[name]) is tuple else value

    return kind(**{name: value_of(name) for name in values})
