"""`plan`: how long a run takes on a given number of GPUs, and what holds it back.

Arithmetic alone: FLOPs of the objective, bytes of its parameters, and rates that are measured, read from a datasheet or
predicted. Each is printed with its source. The model of a step, on one GPU:

    step = max(matmul + optimizer + exposed network, decode)

matmul: the FLOPs at a share of the matmul rate. optimizer: reading and writing parameters, gradients and moments. network:
what one GPU sends for gradients (and, sharded, parameters), exposed as far as it outlasts the student's backward pass.
decode: the clips at the rate of this GPU's share of the cores, beside the rest.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from umt_fast.config import ConfigError, check_numbers, require
from umt_fast.models.flops import tower_parts
from umt_fast.tasks import task_of

Gpu = Literal["a100", "h100", "h200"]


@dataclass(frozen=True)
class GpuSheet:
    """NVIDIA's datasheets: dense bf16 and fp32 FLOP/s, memory bytes, bytes/s of memory, of NVLink and of one GPU's network
    port."""

    name: str
    matmul: float
    matmul_fp32: float
    memory: float
    bandwidth: float
    nvlink: float
    port: float


SHEETS: dict[str, GpuSheet] = {
    "a100": GpuSheet("A100 80 GB SXM", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": GpuSheet("H100 SXM", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": GpuSheet("H200 SXM", 989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
}
GPUS_PER_NODE = 8
# Assumed share of the matmul rate.
SHARE = 0.3
# Bytes that AdamW moves for a parameter: reads value, gradient and two moments, writes value and moments, all fp32.
OPTIMIZER_BYTES = 28
# Bytes held for a trained parameter: value, gradient, two moments.
STATE_BYTES = 16
# Bytes that one token leaves behind in one block for the backward pass under bf16 autocast, per channel: two fp32
# residuals (8), two bf16 norms (4), q, k, v and the attention's output (8), the MLP's two wide layers (16).
ACTIVATION_BYTES = 36
ACTIVATION_SOURCE = f"prediction: {ACTIVATION_BYTES} bytes per visible token, channel and block of the tower"
DECODE_SOURCE = "prediction unless measured: PyAV reads 8 sparse frames of 10 s of 340x256 H.264 at 6 to 13"


@dataclass(kw_only=True, slots=True)
class PlanOptions:
    """What a plan assumes. 0 means: take the default that the plan prints."""

    gpus: int = 8
    """GPUs of the run, eight to a node."""
    gpu: Gpu = "a100"
    """Whose datasheet gives the rates."""
    clips: int = 0
    """Clips of an epoch; 0: those of the training list, else those that the recipe's page says its data set has."""
    measured: str = ""
    """File with a line that `bench stage1` printed on such a GPU: its matmul rate and share replace the assumed ones."""
    share: float = SHARE
    """Share of the matmul rate that the step reaches."""
    decode: float = 8.0
    """Clips that one core decodes per second."""
    cores: int = 0
    """Cores per GPU that decode; 0: data.workers."""
    link: float = 0.0
    """GB/s that one GPU sends over the network; 0: NVLink within a node, its port of the network between nodes."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.gpus >= 1, f"gpus is {self.gpus}; it must be at least 1")
        require(0 < self.share <= 1, f"share is {self.share}; it must lie in (0, 1]")
        require(
            not self.measured or self.share == SHARE,
            f"share is {self.share}, but measured is {self.measured}, which says the share itself; give one of them",
        )
        require(self.decode > 0, f"decode is {self.decode}; it must be positive")
        for name in ("clips", "cores", "link"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class Work:
    """What a configuration asks for. flops and activations are of one clip; parameters are counts."""

    flops: float
    backward: float
    """Share of flops in the backward pass, beside which gradients can cross the network."""
    trained: int
    frozen: int
    activation_bytes: float
    views: int = 1
    """How often the trained tower sees each clip in a step."""


@dataclass(frozen=True)
class Rates:
    """Per GPU: FLOP/s that the step reaches, bytes/s of memory and network, clips/s decoded, bytes of memory."""

    compute: float
    bandwidth: float
    link: float
    decode: float
    memory: float


@dataclass(frozen=True)
class Projection:
    """seconds: of each part of an optimizer step; `network` is what remains exposed of `network_all`."""

    seconds: dict[str, float]
    network_all: float
    step: float
    bound: str
    memory_bytes: float
    fits: bool


def meta_objective(config: Any) -> nn.Module:
    """The objective without any weights: its shapes and FLOPs."""
    log = logging.getLogger("umt_fast")
    level = log.level
    log.setLevel(logging.ERROR)  # weights are not wanted here: no warning that there are none
    try:
        with torch.device("meta"):
            return task_of(config).untrained(config)
    finally:
        log.setLevel(level)


def work_of(config: Any) -> Work:
    """Counts what one clip of a configuration costs."""
    objective = meta_objective(config)
    flops = objective.flops_per_clip()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    vit = config.student
    # A block whose activations are computed again leaves its fp32 input.
    kept = vit.depth - vit.checkpoint_blocks
    per_token = kept * ACTIVATION_BYTES * vit.width + vit.checkpoint_blocks * 4 * vit.width
    # Two thirds of what is trained is backward; the blocks' products stand for the rest in proportion.
    n, views = task_of(config).visible_tokens(config), getattr(objective, "views_per_clip", 1)
    backward = min(1.0, 2 * views * tower_parts(vit, n)["blocks"] / flops)
    return Work(flops, backward, trained, frozen, views * n * per_token, views)


def project(
    work: Work, rates: Rates, *, gpus: int, clips: int, micro_steps: int, decoded: int, sharded: bool, half: bool
) -> Projection:
    """The step of one GPU.

    Args:
        clips: this GPU's clips of an optimizer step.
        micro_steps: parts it is cut into; the activations of one are held at a time.
        decoded: clips decoded for them (fewer than clips with repeated augmentation).
        sharded: FSDP instead of DDP.
        half: bf16.
    """
    matmul = clips * work.flops / rates.compute
    shards = gpus if sharded else 1
    optimizer = work.trained / shards * OPTIMIZER_BYTES / rates.bandwidth
    # A ring sends (gpus - 1) / gpus of the bytes for each of: reducing, and gathering the result. Sharded: the parameters
    # are gathered for forward and backward of every micro-step, the gradients reduced once.
    ring = (gpus - 1) / gpus * work.trained
    width = 2 if half else 4
    sent = ring * (4 + 2 * width * micro_steps) if sharded else ring * 8
    network = sent / rates.link
    hidden = matmul / micro_steps * work.backward
    exposed = max(0.0, network - hidden)
    decode = decoded / rates.decode
    seconds = {"matmul": matmul, "memory": optimizer, "network": exposed, "decode": decode}
    on_gpu = matmul + optimizer + exposed
    bound = "decode" if decode > on_gpu else max(("matmul", "memory", "network"), key=seconds.get)
    memory = work.trained * STATE_BYTES / shards + work.frozen * width + clips / micro_steps * work.activation_bytes
    return Projection(seconds, network, max(on_gpu, decode), bound, memory, memory <= rates.memory)


def _measured(path: str) -> tuple[float, float, str]:
    """Matmul rate, share of it, and on what, of the last line that `bench stage1` wrote to a file."""
    try:
        line = Path(path).read_text().strip().splitlines()[-1]
        entry = json.loads(line)
        matmul, share = entry["matmul_tflops"] * 1e12, entry["share_of_matmul_rate"]
        if not (0 < matmul < math.inf and 0 < share < math.inf):
            raise ValueError("a rate that is no rate")
        return matmul, share, f"{entry['device']}, {entry['model']}"
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"measured is {path}, which does not end with a line of `python -m umt_fast bench stage1`"
        ) from error


def _clips(config: Any, options: PlanOptions, published: int | None) -> tuple[int, str]:
    if options.clips:
        return options.clips, "given"
    task = task_of(config)
    known = task.clips_of_epoch(config)
    if known is not None:
        return known
    if published is not None:
        return published, "assumed: CLIPS of the recipe's page"
    raise ConfigError(
        f"a plan of task {task.name} without a list needs the number of its clips (and images): --clips N"
    )


def report(name: str, config: Any, options: PlanOptions, published: int | None = None) -> str:
    """The plan as text. published: clips of the data set that the recipe is for, taken where nothing else tells them."""
    sheet, run = SHEETS[options.gpu], config.run
    half = run.dtype == "bf16"
    matmul, share, where = sheet.matmul if half else sheet.matmul_fp32, options.share, ""
    if options.measured:
        matmul, share, where = _measured(options.measured)
    clips, clips_from = _clips(config, options, published)
    inside = options.gpus <= GPUS_PER_NODE
    link = options.link * 1e9 or (sheet.nvlink if inside else sheet.port)
    cores = options.cores or max(1, config.data.workers)
    # Sharding takes several ranks.
    sharded = run.parallel == "fsdp" and options.gpus > 1
    work = work_of(config)
    rates = Rates(matmul * share, sheet.bandwidth, link, cores * options.decode, sheet.memory)
    per_gpu = run.batch_size * config.data.num_sample * run.accumulate
    found = project(
        work,
        rates,
        gpus=options.gpus,
        clips=per_gpu,
        micro_steps=run.accumulate,
        decoded=run.batch_size * run.accumulate,
        sharded=sharded,
        half=run.dtype == "bf16",
    )
    seen = clips * config.data.num_sample * run.epochs
    rate = options.gpus * per_gpu / found.step
    hours = seen / rate / 3600
    layout = "sharded (fsdp)" if sharded else "replicated (ddp)"
    lines = [
        f"{name} on {options.gpus} x {sheet.name}, {layout}, {run.dtype}: {per_gpu} clips per GPU and step, "
        f"{options.gpus * per_gpu} in all",
        f"{hours:.1f} hours, {hours * options.gpus:.0f} GPU hours: {clips} clips x {config.data.num_sample} crops x "
        f"{run.epochs} epochs at {rate:.0f} clips/s",
        f"bound: {found.bound}; a step takes {1e3 * found.step:.0f} ms",
    ]
    for part, note in (
        ("matmul", f"{work.flops / 1e9:.0f} GFLOP per clip"),
        ("memory", f"optimizer traffic of {work.trained / 1e6:.0f} M trained parameters"),
        ("network", f"exposed of {1e3 * found.network_all:.0f} ms"),
        ("decode", "beside the rest"),
    ):
        lines.append(f"  {part:<8}{1e3 * found.seconds[part]:8.0f} ms  {note}")
    if work.views > 1:
        lines.insert(2, f"{rate * work.views:.0f} views/s: the student sees each clip {work.views} times in a step")
    room = (
        "fits"
        if found.fits
        else "DOES NOT FIT: lower run.batch_size, raise student.checkpoint_blocks, or run.parallel fsdp"
    )
    lines.append(f"memory per GPU: {found.memory_bytes / 1e9:.1f} of {sheet.memory / 1e9:.0f} GB (prediction): {room}")
    predicted = "prediction; `bench stage1` measures it, --measured FILE takes it"
    port = "NVLink, one direction" if inside else "one port for each GPU"
    sources = [
        ("clips of an epoch", f"{clips}", clips_from),
        (
            "matmul rate",
            f"{matmul / 1e12:.0f} TFLOP/s",
            f"measured: {where}" if where else f"datasheet, dense {run.dtype}",
        ),
        ("share of it", f"{100 * share:.1f}%", f"measured: {where}" if where else predicted),
        ("memory bandwidth", f"{sheet.bandwidth / 1e9:.0f} GB/s", "datasheet"),
        ("network per GPU", f"{link / 1e9:.0f} GB/s", "given" if options.link else f"datasheet, {port}"),
        ("decoding", f"{options.decode:g} clips/s per core", DECODE_SOURCE),
        ("decoding cores", f"{cores} per GPU", "given" if options.cores else "data.workers"),
        ("activations", f"{work.activation_bytes / 1e6:.0f} MB per clip", ACTIVATION_SOURCE),
    ]
    lines.append("assumptions:")
    lines += [f"  {what:<18}{value:<22}{source}" for what, value, source in sources]
    lines.append("the hours are a prediction: nothing here was timed on that many GPUs")
    return "\n".join(lines)
