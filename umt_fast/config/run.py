"""The clips, the optimizer and the run around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umt_fast.config.core import check_numbers, require

Dtype = Literal["bf16", "fp32"]
TuneAxis = Literal["compile", "cuda_graph", "attention", "precision"]


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
    prepared: tuple[str, ...] = ()
    """Folders written by `prepare`: clips of any list that are found there by path are read there."""
    root: str = ""
    """Folder put before relative paths of the list; empty: the list's own folder."""
    separator: str = ","
    """Field separator of the list."""
    reader: Literal["auto", "cpu", "dali"] = "auto"
    """`cpu`: decoding processes; `dali`: NVIDIA DALI decodes on the GPU. `auto` is cpu: dali was not yet measured on one."""
    sampling: Literal["sparse", "dense"] = "sparse"
    """`sparse`: one random frame in each of T equal segments; `dense`: T frames `sampling_rate` apart."""
    sampling_rate: int = 4
    """Frame stride of dense sampling."""
    num_sample: int = 1
    """Augmented crops per decoded clip (repeated augmentation)."""
    augment: Literal["multi_scale_crop", "random_resized_crop", "center", "whole"] = "multi_scale_crop"
    """`multi_scale_crop` as in stage 1, `random_resized_crop` (50 to 100% of the area) as in stage 2; `center`: the largest
    centred square, `whole`: the frame pressed into a square, as retrieval is judged officially."""
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
        check_numbers(self, "data")
        require(len(self.separator) > 0, "data.separator is empty; give the character between the list's fields")
        require(self.num_sample >= 1, f"data.num_sample is {self.num_sample}; it must be at least 1")
        require(self.sampling_rate >= 1, f"data.sampling_rate is {self.sampling_rate}; it must be at least 1")
        require(self.workers >= 0, f"data.workers is {self.workers}; it must not be negative")
        require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; it must be at least 1")
        require(
            _numbers(self.frame_pattern),
            f"data.frame_pattern is {self.frame_pattern!r}; it must hold the frame's number in braces, as img_{{:05d}}.jpg",
        )
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
        check_numbers(self, "optim")
        for name in ("lr", "min_lr", "warmup_lr", "lr_batch", "eps", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name} is {value}; it must not be negative")
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas are {self.betas}; both must lie in [0, 1)")
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
    """Compute precision; parameters, gradients and optimizer state stay fp32 (the student's weights are cast in flight), the
    frozen teacher's matrices are cast once. On a CPU without bf16 instructions `bf16` computes in fp32 and says so."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = 0
    compile: bool = False
    """torch.compile the whole objective (teacher, mask, student, loss and their backward) as one graph, or fail."""
    cuda_graph: bool = False
    """Record forward and backward as a CUDA graph and replay it (one GPU; also with compile). Fails where it cannot."""
    tune: Literal["off", "fast", "full"] = "off"
    """Time other ways of computing the step before the first one, and train with the fastest that agrees with eager: `fast` at
    most four, `full` every combination. The choice is kept for later runs (in UMT_CACHE, else in ~/.cache/umt_fast) and in
    the checkpoints; tune.json in `out` holds the table. One device is timed, without the ranks' exchange of gradients."""
    tune_axes: tuple[TuneAxis, ...] = ("compile", "cuda_graph", "attention")
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
    checkpoint: Literal["full", "sharded"] = "full"
    """`full`: one file, gathered and written by the first rank; `sharded`: a folder to which every rank writes its part, for
    models too large for one host (all nodes must share `out`). Either is continued under either `parallel`."""
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
        for name in ("warmup_epochs", "max_steps", "save_every", "keep_every_epochs"):
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
