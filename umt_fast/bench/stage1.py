"""`bench stage1`: times a whole pre-training step on random clips and prints one JSON line.

The fast implementation is the Trainer's own step; the plain one is `reference/stage1.py`.
A step is teacher, mask, student, loss, backward and optimizer. The video is on the device when the clock starts, as each
trainer delivers it: uint8 for the fast implementation, normalized fp32 for the plain one.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Literal

import torch
from torch import Tensor

from umt_fast.bench import profile as profiles
from umt_fast.bench.measure import (
    TEACHER_OF,
    Case,
    Clock,
    Model,
    Steps,
    autocast,
    checked_case,
    normalized,
    random_video,
)
from umt_fast.bench.parts import Cost, backward_cost, optimizer_cost, student_costs, teacher_borders, teacher_costs
from umt_fast.bench.trained import Border, steps_of
from umt_fast.config import AlignConfig, ConfigError, MaskConfig, RunConfig, Stage1Config, TeacherPrecision
from umt_fast.models.sizes import student_size, teacher_size
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.reference.stage1 import PlainStage1, draw_mask, fill_at_random, official_optimizer
from umt_fast.tasks.pretraining import UnmaskedAlignment


def stage1_config(
    model: Model, batch_size: int, dtype: str, precision: TeacherPrecision = "native", per_clip: int = 1
) -> Stage1Config:
    """The official stage-1 sizes of a model with an untrained teacher."""
    student = student_size(model)
    return Stage1Config(
        run=RunConfig(batch_size=batch_size, dtype=dtype),
        student=student,
        teacher=teacher_size(TEACHER_OF[model], weights="untrained", precision=precision),
        mask=MaskConfig(per_clip=per_clip),
        align=AlignConfig(num_layers=min(6, student.depth)),
    )


def costs(config: Stage1Config, trained: int) -> dict[str, Cost]:
    """The cost of each part of a step of run.batch_size clips; trained: number of trained values."""
    own = student_costs(config, config.student, config.mask)
    return {
        **teacher_costs(config, config.student, config.mask),
        "student patches": own["patches"],
        "student blocks": own["blocks"],
        "student heads": own["heads"],
        "loss": own["loss"],
        "backward": backward_cost(own["patches"], [own["blocks"], own["heads"]], own["loss"]),
        "optimizer": optimizer_cost(trained),
    }


def borders_of(objective: UnmaskedAlignment) -> list[Border]:
    """The ends of the parts that `costs` names, up to the loss."""
    student = objective.student
    return [
        *teacher_borders(objective.teacher),
        Border(student.encoder.blocks[0], "forward", True, "student patches"),
        Border(student.encoder, "forward", False, "student blocks"),
        Border(student, "forward", False, "student heads"),
        Border(objective, "forward", False, "loss"),
    ]


def profile_of(config: Stage1Config, device: torch.device, steps: int) -> dict[str, object]:
    """The parts of `steps` steps beside their bounds; see profile.py."""
    side, frames = config.student.image_size, config.student.num_frames
    batch = {"video": random_video(config.run.batch_size, frames, side, device)}
    return profiles.profile(
        config, UnmaskedAlignment, batch, borders_of, functools.partial(costs, config), device, steps
    )


def fast_steps(config: Stage1Config, video: Tensor, device: torch.device) -> Steps:
    """What `train` runs, as config.run says; the same step with a clock at each part's end."""
    objective = UnmaskedAlignment(config)
    borders = [
        Border(objective.teacher, "forward", False, "teacher and mask"),
        Border(objective.student, "forward", False, "student forward"),
        Border(objective, "forward", False, "loss"),
    ]
    return steps_of(config, objective, {"video": video}, device, borders)


def plain_steps(config: Stage1Config, video: Tensor, device: torch.device) -> Steps:
    """The official step: see reference/stage1.py."""
    torch.backends.cudnn.benchmark = True  # as the official script sets it
    pixels = normalized(video)
    objective = PlainStage1(config).to(device).train()
    fill_at_random(objective.teacher)
    parameters = list(objective.student.parameters())
    optimizer = official_optimizer(parameters, config.optim)
    precision = autocast(device, config.run.dtype)

    def finish(loss: Tensor) -> None:
        loss.item()
        optimizer.zero_grad()
        loss.backward()

    def update() -> None:
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # logged, not clipped by
        optimizer.step()

    def step(number: int) -> None:
        with precision:
            loss = objective(pixels)
        finish(loss)
        update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(number: int, clock: Clock) -> None:
        clock.restart()
        with precision:
            features, attention = objective.teacher(pixels)
        clock.lap("teacher")
        mask = draw_mask(attention, pixels.shape[0], config.mask.ratio).to(device)
        clock.lap("mask")
        with precision:
            loss = objective.loss(pixels, features, mask)
        clock.lap("student forward and loss")
        finish(loss)
        clock.lap("backward")
        update()
        clock.lap("optimizer")

    return step, timed


def measure(case: Case) -> dict[str, object]:
    """Every figure of the JSON line, by name; see Case.measure."""
    config = stage1_config(case.model, case.batch_size, case.computed_in, case.precision, case.per_clip)
    config.run.compile = case.compiled
    video = random_video(case.batch_size, config.student.num_frames, config.student.image_size, case.device)
    implementations = {
        "fast": lambda: fast_steps(config, video, case.device),
        "plain": lambda: plain_steps(config, video, case.device),
    }
    return case.measure(
        "stage1", implementations[case.implementation], UnmaskedAlignment.flops_of(config) * case.batch_size
    )


def main(
    model: Model = "b16",
    batch_size: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp32"] = "bf16",
    implementation: Literal["fast", "plain"] = "fast",
    steps: int = 5,
    compile: bool = False,
    precision: TeacherPrecision = "native",
    per_clip: int = 1,
    profile: bool = False,
) -> None:
    """Time a whole stage-1 training step on random clips; one JSON line.

    Args:
        model: Student; the teacher is the official one of that size, untrained.
        batch_size: Clips per step.
        device: Where; auto takes a GPU if there is one.
        dtype: Compute precision; the fast implementation uses fp32 where a CPU has no bf16 instructions (see `computed_in`).
        implementation: fast is what `train` runs; plain does what the official step does.
        steps: Timed steps, after two that are not.
        compile: torch.compile the objective (fast implementation only).
        precision: As --teacher.precision of a run (fast implementation only).
        per_clip: As --mask.per_clip of a run, masks of each clip (fast implementation only): compare `views_per_s`.
        profile: Time the parts beside their bounds instead, as a table on stderr and a JSON line (fast implementation only).
    """
    if implementation == "plain" and (profile or precision != "native" or per_clip != 1):
        raise ConfigError(
            "precision, per_clip and profile are for the fast implementation; the plain one is the official eager step"
        )
    if compile and profile:
        raise ConfigError("profile times the parts of an eager step; leave compile out")
    case = checked_case(
        model=model,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        implementation=implementation,
        steps=steps,
        compiled=compile,
        precision=precision,
        per_clip=per_clip,
    )
    require_precision(teacher_size(TEACHER_OF[model], precision=precision), case.device)
    if not profile:
        print(json.dumps(measure(case)))
        return
    config = stage1_config(model, batch_size, case.computed_in, precision, per_clip)
    found = profile_of(config, case.device, steps)
    print(profiles.table(found), file=sys.stderr)
    print(json.dumps(case.profiled("stage1") | {"per_clip": per_clip, "teacher_precision": precision} | found))
