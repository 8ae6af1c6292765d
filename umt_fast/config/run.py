"""The clips, the optimizer and the run around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umt_fast.config.core import check_numbers, require

Dtype = Literal["bf16", "fp32"]
AttentionBackend = Literal["auto", "flash", "efficient", "cudnn", "math", "flash_attn", "xformers"]
LinearBackend = Literal["library", "fused"]
TuneAxis = Literal["compile", "cuda_graph", "attention", "linear", "precision"]


def _numbers(pattern: str) -> bool:
    """Whether a pattern names each frame's file."""
    try:
        return pattern.format(1) != pattern.format(2)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which clips, and how they are cut."""

    train: str = ""
    """An official list (path, label), a manifest written by `scan`, a folder written by `prepare`, or empty: then the run
    stops and says so."""
    validation: str = ""
    """Clips on which the model is judged between epochs (run.validate_epochs), a list as `train` is; empty: none."""
    prepared: tuple[str, ...] = ()
    """Folders written by `prepare`: clips of any list that are found there by path are read there."""
    root: str = ""
    """Folder put before relative paths of the list; empty: the list's own folder."""
    separator: str = ","
    """Field separator of the list."""
    reader: Literal["cpu", "dali"] = "cpu"
    """`cpu`: decoding processes; `dali`: NVIDIA DALI decodes on the GPU."""
    sampling: Literal["sparse", "intervals", "dense"] = "sparse"
    """`sparse`: one random frame in each of T equal segments, as in stage 1; `intervals`: one in each of T intervals that tile
    the clip, as in stage 2 and retrieval (data.sampling has both rules); `dense`: T frames `sampling_rate` apart."""
    sampling_rate: int = 4
    """Frame stride of dense sampling."""
    max_seconds: float = 0.0
    """Frames are drawn from the first so many seconds of a clip (DiDeMo: 30); 0: from all of it."""
    num_sample: int = 1
    """Augmented crops per decoded clip (repeated augmentation); for the random crops alone."""
    augment: Literal["multi_scale_crop", "random_resized_crop", "center", "whole"] = "multi_scale_crop"
    """`multi_scale_crop` as in stage 1, `random_resized_crop` (50 to 100% of the area) as in stage 2; `center`: the largest
    centered square, `whole`: the frame pressed into a square, as retrieval is judged officially. Frames are resized bilinearly
    as Pillow does; for `random_resized_crop` and `whole` bicubically without antialiasing, as the official stage 2 does."""
    flip: bool | None = None
    """Mirror each crop with probability one half; None: yes for the random crops, no for `center` and `whole`."""
    workers: int = 4
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Batches each worker prepares ahead."""
    max_bad_share: float = 0.1
    """The run stops once more than this share of the list's files proved unreadable."""
    frame_pattern: str = "img_{:05d}.jpg"
    """File name of frame i (from 1) in lists of frame folders."""

    def __post_init__(self) -> None:
        check_numbers(self, "data")
        if self.reader == "auto":  # checkpoints of earlier versions name it so
            self.reader = "cpu"
        require(len(self.separator) > 0, "data.separator is empty; give the character between the list's fields")
        require(self.num_sample >= 1, f"data.num_sample is {self.num_sample}; it must be at least 1")
        require(self.sampling_rate >= 1, f"data.sampling_rate is {self.sampling_rate}; it must be at least 1")
        require(self.max_seconds >= 0, f"data.max_seconds is {self.max_seconds}; it must not be negative")
        require(self.workers >= 0, f"data.workers is {self.workers}; it must not be negative")
        require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; it must be at least 1")
        require(
            _numbers(self.frame_pattern),
            f"data.frame_pattern is {self.frame_pattern!r}; it must hold the frame's number in braces, as img_{{:05d}}.jpg",
        )
        require(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}; it must lie in [0, 1]")

    def require_used(self) -> None:
        """Raises ConfigError where an option is set that changes nothing in training with this sampling and augment."""
        rate = DataConfig.__dataclass_fields__["sampling_rate"].default
        require(
            self.sampling == "dense" or self.sampling_rate == rate,
            f"data.sampling_rate is {self.sampling_rate}, but data.sampling {self.sampling} has no stride; take "
            "data.sampling dense or leave it out",
        )
        drawn = self.augment in ("multi_scale_crop", "random_resized_crop")
        require(
            drawn or self.num_sample == 1,
            f"data.num_sample is {self.num_sample}, but data.augment {self.augment} cuts a clip the same way each time; set "
            "data.num_sample 1 or take a random crop",
        )
        require(
            drawn or not self.flip,
            f"data.flip is True, but data.augment {self.augment} mirrors nothing; leave it out or take a random crop",
        )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then half a cosine (engine/schedule.py)."""

    lr: float = 1.5e-4
    """Peak rate for `lr_batch` clips per step; scaled linearly with the true global batch."""
    schedule: Literal["linear_cosine", "scaled_cosine"] = "linear_cosine"
    """`linear_cosine`: from warmup_lr to lr, then along half a cosine to min_lr (official stage 1 and fine-tuning);
    `scaled_cosine`: lr times the larger of min_factor and a line from 0 to 1, then half a cosine to 0 (official stage 2)."""
    min_lr: float = 1e-5
    """Final rate of linear_cosine, scaled like lr."""
    warmup_lr: float = 0.0
    """Rate of its first step, scaled like lr; the official stage-1 run starts at 0."""
    min_factor: float = 0.0
    """Least share of lr in scaled_cosine, at both ends."""
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
    ema_decay: float = 0.0
    """Keep a running average of the weights, average = ema_decay * average + (1 - ema_decay) * weights after each step. It is
    saved beside them (`model_ema`), and judged in their place. 0: none, as officially (whose option has .9999)."""
    fused: Literal["torch", "apex"] = "torch"
    """`apex`: NVIDIA apex's FusedAdam (GPU only; not the registry's package of that name)."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim")
        for name in ("min_lr", "warmup_lr", "lr_batch", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name} is {value}; it must not be negative")
        for name in ("lr", "eps"):
            require(getattr(self, name) > 0, f"optim.{name} is {getattr(self, name)}; it must be positive")
        for name in ("min_lr", "warmup_lr"):
            require(
                getattr(self, name) <= self.lr,
                f"optim.{name} is {getattr(self, name)}; it must not be above optim.lr = {self.lr}: lower it, or raise that",
            )
        require(0 <= self.ema_decay < 1, f"optim.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        require(0 <= self.min_factor <= 1, f"optim.min_factor is {self.min_factor}; it must lie in [0, 1]")
        unread = ("min_factor",) if self.schedule == "linear_cosine" else ("min_lr", "warmup_lr")
        for name in unread:
            require(
                getattr(self, name) == 0,
                f"optim.{name} is {getattr(self, name)}, but optim.schedule {self.schedule!r} does not read it; set it to 0 or "
                "choose the other schedule",
            )
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas are {self.betas}; both must lie in [0, 1)")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay is {self.layer_decay}; it must lie in (0, 1]")


def video_text_optim(lr: float) -> OptimConfig:
    """AdamW and its schedule as the official stage 2 and what is fine-tuned from it have them; lr holds for any batch."""
    return OptimConfig(
        lr=lr,
        schedule="scaled_cosine",
        min_factor=0.01,
        min_lr=0.0,
        lr_batch=0,
        betas=(0.9, 0.999),
        weight_decay=0.02,
    )


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
    """Compute precision; parameters, gradients and optimizer state stay fp32 (the student's weights are cast in flight), the
    frozen teacher's matrices are cast once. On a CPU without bf16 instructions `bf16` computes in fp32 and says so."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = 0
    compile: bool = False
    """torch.compile the whole objective (teacher, mask, student, loss and their backward) as one graph, or fail."""
    cuda_graph: bool = False
    """Record forward and backward as a CUDA graph and replay it (one GPU; also with compile). Fails where it cannot."""
    attention: AttentionBackend = "auto"
    """What computes attention, in student, teacher and text. `flash`, `efficient`, `cudnn`, `math`: PyTorch's kernels;
    `flash_attn`, `xformers`: those packages. `auto`: flash_attn where it is installed and fits, else flash, else efficient;
    never cudnn, which gives NaN gradients with masks and with one query in some releases, and is not given those if named.
    Calls that a backend does not take (masks, dropout) go by `auto`; the log says which kernel computes what."""
    linear: LinearBackend = "library"
    """What computes the blocks' linear layers, in stage 1. `library`: cuBLAS (on CPUs oneDNN or MKL) and a pass for each
    activation, sum and norm around it; `fused`: kernels.linear, products that carry those with them (GPU only; no GPU has
    timed them yet)."""
    deterministic: bool = False
    """Only algorithms that add in a fixed order, so that on a GPU too a stopped run continues bit for bit; slower, and an
    operation that has no such algorithm raises. On CPUs a run continues bit for bit without it."""
    tune: Literal["off", "fast", "full"] = "off"
    """Time other ways of computing the step before the first one, and train with the fastest that agrees with eager: `fast` at
    most four, `full` every combination. The choice is kept for later runs (in UMT_CACHE, else in ~/.cache/umt_fast) and in
    the checkpoints; tune.json in `out` holds the table. One device is timed, without the ranks' exchange of gradients."""
    tune_axes: tuple[TuneAxis, ...] = ("compile", "cuda_graph", "attention", "linear")
    """The settings tune may change; one that is not at its default stays. `precision`, the teacher's in 8 bits, changes what
    is learned a little, and is tried only where it is named here."""
    tune_deadline: float = 600.0
    """Seconds a candidate of tune may take, compiling included, before it is given up."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several ranks: `ddp` keeps the model whole on each; `fsdp` cuts trained parameters, their gradients and optimizer
    state over the ranks and gathers them block by block, for models that do not fit. The losses are the same."""
    compress: Literal["none", "bf16"] = "none"
    """How gradients cross the network: as they are, or rounded to bf16 (half the bytes)."""
    log_every: int = 10
    """Steps between log lines; the only steps on which the host waits for the device."""
    save_every: int = 0
    """Steps between checkpoints besides the one at each epoch's end; 0: none."""
    validate_epochs: int = 1
    """Epochs between judgments on data.validation; the last step's weights are judged too, and the best are kept as
    checkpoint-best. 0: never."""
    checkpoint: Literal["full", "sharded"] = "full"
    """`full`: one file, gathered and written by the first rank; `sharded`: a folder to which every rank writes its part, for
    models too large for one host (all nodes must share `out`). Either is continued under either `parallel`."""
    async_save: bool = False
    """Write sharded checkpoints while training goes on, from a copy of this rank's shards in host memory. A checkpoint has its
    name once it is whole; the next one, and the end of the run, wait for it."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after a newer one is safely on disk."""
    keep_every_epochs: int = 0
    """Checkpoints of every so many epochs are never deleted; 0: none."""
    resume: bool = True
    """Continue from the newest checkpoint in `out`, if there is one."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, "run")
        require(self.out != "", "run.out is empty; give a folder for checkpoints and metrics")
        require(0 <= self.seed < 2**63, f"run.seed is {self.seed}; it must lie in [0, 2^63)")
        for name in ("batch_size", "accumulate", "epochs", "log_every", "keep"):
            require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_epochs", "max_steps", "save_every", "validate_epochs", "keep_every_epochs"):
            require(getattr(self, name) >= 0, f"run.{name} is {getattr(self, name)}; it must not be negative")
        require(self.tune_deadline > 0, f"run.tune_deadline is {self.tune_deadline}; it must be positive")
        require(
            not (self.compile and self.parallel == "fsdp"),
            "run.compile does not go with run.parallel fsdp yet; switch one of them off",
        )
        require(
            self.warmup_epochs < self.epochs,
            f"run.warmup_epochs {self.warmup_epochs} must be less than run.epochs {self.epochs}",
        )
