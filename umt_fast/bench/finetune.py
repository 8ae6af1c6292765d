"""`bench finetune`: times a whole fine-tuning step on random clips and prints one JSON line.

The fast implementation is the Trainer's own step; the plain one is `reference/finetune.py`.
A step mixes the clips (Mixup or CutMix), runs the classifier over all tokens, and ends with soft-target loss, backward pass and
optimizer, with the published settings of Kinetics-400. The video is on the device when the clock starts, as each trainer
delivers it: uint8 for the fast implementation, normalized fp32 for the plain one. The fast step also erases boxes, which the
official loader does on the host before.
"""

from __future__ import annotations

import json
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from umt_fast.bench.measure import Case, Clock, Model, Steps, autocast, checked_case, normalized
from umt_fast.bench.trained import Border, steps_of
from umt_fast.config import AugmentConfig, ConfigError, DataConfig, FinetuneConfig, MixConfig, OptimConfig, RunConfig
from umt_fast.models import flops
from umt_fast.models.sizes import student_size
from umt_fast.reference.finetune import (
    PlainClassifier,
    layered_optimizer,
    mix_in_place,
    mixed_targets,
    soft_target_loss,
)
from umt_fast.tasks.classification import Classification, Supervised
from umt_fast.tasks.mixing import draw

RATES = {"tiny": (2e-5, 0.75), "b16": (2e-5, 0.75), "l16": (1e-5, 0.85)}
"""Peak rate and layer decay of the published fine-tuning on Kinetics-400."""


def finetune_config(
    model: Model,
    batch_size: int,
    dtype: str,
    frames: int = 8,
    image_size: int | None = None,
    checkpoint_blocks: int = 0,
) -> FinetuneConfig:
    """The published fine-tuning on Kinetics-400 from nothing. image_size: None, the model's own. Raises ConfigError."""
    sizes = {"num_frames": frames, "checkpoint_blocks": checkpoint_blocks}
    student = student_size(model, **sizes | ({} if image_size is None else {"image_size": image_size}))
    lr, layer_decay = RATES[model]
    return FinetuneConfig(
        run=RunConfig(batch_size=batch_size, dtype=dtype, epochs=5, warmup_epochs=1),
        data=DataConfig(num_sample=1),
        student=student,
        augment=AugmentConfig(protocol="published"),
        mix=MixConfig(),
        optim=OptimConfig(lr=lr, min_lr=1e-6, warmup_lr=1e-6, betas=(0.9, 0.999), layer_decay=layer_decay),
        num_classes=400,
    )


def flops_of(config: FinetuneConfig) -> float:
    """FLOPs of a clip in a step, forward and backward."""
    return flops.tower_flops(config.student, flops.visible_of(config.student, None))


def fast_steps(config: FinetuneConfig, batch: dict[str, Tensor], device: torch.device) -> Steps:
    """What `train` runs, as config.run says; the same step with a clock at each part's end."""
    objective = Supervised(config)
    borders = [
        Border(objective, "logits", True, "erasing and mixing"),
        Border(objective, "logits", False, "classifier forward"),
        Border(objective, "forward", False, "loss"),
    ]
    return steps_of(config, objective, batch, device, borders)


def plain_steps(config: FinetuneConfig, batch: dict[str, Tensor], device: torch.device) -> Steps:
    """The official step: see reference/finetune.py."""
    torch.backends.cudnn.benchmark = True  # as the official script sets it
    pixels, label, side = normalized(batch["video"]), batch["label"], config.student.image_size
    model = PlainClassifier(config.student, config.num_classes).to(device).train()
    parameters, optimizer = list(model.parameters()), layered_optimizer(model, config.optim)
    precision, rng = autocast(device, config.run.dtype), np.random.default_rng(0)

    def run(number: int, clock: Clock | None = None) -> None:
        lap = clock.lap if clock else lambda part: None
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * group["lr_scale"]
        shares, boxes = draw(config.mix, len(pixels), side, side, rng)
        share = float(shares[0])
        mix_in_place(pixels, share, tuple(boxes[0].tolist()))
        targets = mixed_targets(label, config.num_classes, share, config.label_smoothing)
        lap("mixing")
        with precision:
            logits = model(pixels)
            lap("classifier forward")
            loss = soft_target_loss(logits, targets)
        loss.item()
        lap("loss")
        loss.backward()
        lap("backward")
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]).item()  # logged, not clipped by
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        lap("optimizer")

    def timed(number: int, clock: Clock) -> None:
        clock.restart()
        run(number, clock)

    return run, timed


def measure(
    case: Case, frames: int = 8, image_size: int | None = None, checkpoint_blocks: int = 0
) -> dict[str, object]:
    """Every figure of the JSON line, by name; see Case.measure and finetune_config."""
    config = finetune_config(case.model, case.batch_size, case.computed_in, frames, image_size, checkpoint_blocks)
    config.run.compile = case.compiled
    (batch,) = Classification().random_batches(config)
    batch = {name: value.to(case.device) for name, value in batch.items()}
    implementations = {
        "fast": lambda: fast_steps(config, batch, case.device),
        "plain": lambda: plain_steps(config, batch, case.device),
    }
    found = case.measure("finetune", implementations[case.implementation], flops_of(config) * case.batch_size)
    return found | {
        "frames": frames,
        "image_size": config.student.image_size,
        "checkpoint_blocks": checkpoint_blocks,
    }


def main(
    model: Model = "b16",
    batch_size: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp32"] = "bf16",
    implementation: Literal["fast", "plain"] = "fast",
    steps: int = 5,
    frames: int = 8,
    image_size: int | None = None,
    checkpoint_blocks: int = 0,
    compile: bool = False,
) -> None:
    """Time a whole fine-tuning step on random clips; one JSON line.

    Args:
        model: The classifier's tower, untrained, with a head of 400 classes.
        batch_size: Clips per step.
        device: Where; auto takes a GPU if there is one.
        dtype: Compute precision; the fast implementation uses fp32 where a CPU has no bf16 instructions (see `computed_in`).
        implementation: fast is what `train` runs; plain does what the official step does.
        steps: Timed steps, after two that are not.
        frames: Frames of a clip; published models have 8 or 16.
        image_size: Height and width of a clip; published models have 224 or 384. Left out: 224, or 64 for tiny.
        checkpoint_blocks: As --student.checkpoint_blocks of a run: blocks whose activations are computed again.
        compile: torch.compile the objective (fast implementation only).
    """
    case = checked_case(
        model=model,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        implementation=implementation,
        steps=steps,
        compiled=compile,
    )
    if frames < 1 or (image_size is not None and image_size < 1):
        raise ConfigError(f"frames is {frames} and image_size is {image_size}; both must be at least 1")
    print(json.dumps(measure(case, frames, image_size, checkpoint_blocks)))
