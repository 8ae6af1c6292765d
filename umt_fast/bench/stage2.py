"""`bench stage2`: times a whole stage-2 step on random captioned clips or images and prints one JSON line.

The fast implementation is the Trainer's own step; the plain one is `reference/stage2.py`.
A step is teacher, mask, tower, text, the four losses, backward and optimizer. Clips and token ids are on the device when the
clock starts, as each trainer delivers them. For the fast implementation they are uint8 and padded to the batch's longest; for
the plain one, normalized fp32 and padded to the longest allowed. The official step also tokenizes, which is left out here.
"""

from __future__ import annotations

import json
from typing import Literal

import torch
from torch import Tensor

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
from umt_fast.bench.trained import Border, steps_of
from umt_fast.config import AlignConfig, ConfigError, RunConfig, Stage2Config, TextConfig
from umt_fast.models.sizes import student_size, teacher_size
from umt_fast.reference.stage1 import fill_at_random, official_optimizer
from umt_fast.reference.stage2 import PlainStage2
from umt_fast.tasks.video_text import VideoTextPretraining

Media = Literal["video", "image"]
TEXTS = {
    "tiny": {"width": 96, "depth": 3, "fusion_layer": 2, "num_heads": 3, "vocab_size": 1000},
    "b16": {},
    "l16": {"width": 1024, "depth": 24, "fusion_layer": 19, "num_heads": 16},
}
# [MASK], and [PAD], [CLS], [SEP], as bert-base-uncased numbers them (in the tiny vocabulary too).
MASK_ID, SPECIAL, CLS_ID = 103, (0, 101, 102), 101


def stage2_config(model: Model, batch_size: int, dtype: str) -> Stage2Config:
    """The official stage-2 sizes of a model with untrained teacher and text."""
    student = student_size(model, num_frames=4)
    teacher = teacher_size(TEACHER_OF[model], weights="untrained")
    return Stage2Config(
        run=RunConfig(batch_size=batch_size, dtype=dtype),
        student=student,
        teacher=teacher,
        text=TextConfig(**TEXTS[model]),
        align=AlignConfig(num_layers=min(6, student.depth)),
        embed_dim=teacher.output_dim,
        bert="untrained",
    )


def random_captions(config: Stage2Config, device: torch.device) -> dict[str, Tensor]:
    """`ids`, `mask`, `sample` of captions of 8 tokens to the longest allowed; the first is that long, as in a large batch
    one always is."""
    batch, longest = config.run.batch_size, config.max_length
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(110, config.text.vocab_size, (batch, longest), generator=generator)
    ids[:, 0] = CLS_ID
    found = {"ids": ids * mask, "mask": mask, "sample": torch.arange(batch)}
    return {key: value.to(device) for key, value in found.items()}


def fast_steps(config: Stage2Config, video: Tensor, captions: dict[str, Tensor], device: torch.device) -> Steps:
    """What `train` runs, as config.run says; the same step with a clock at each part's end."""
    objective = VideoTextPretraining(config, mask_id=MASK_ID, special=SPECIAL)
    borders = [
        Border(objective, "prepare", False, "teacher and masks"),
        Border(objective, "forward", False, "forward and losses"),
    ]
    return steps_of(config, objective, {"video": video, **captions}, device, borders)


def plain_steps(config: Stage2Config, video: Tensor, captions: dict[str, Tensor], device: torch.device) -> Steps:
    """The official step: see reference/stage2.py."""
    pixels = normalized(video)
    objective = PlainStage2(config, MASK_ID).to(device).train()
    fill_at_random(objective.teacher)
    optimizer = official_optimizer(list(objective.model.parameters()), config.optim)
    precision = autocast(device, config.run.dtype)

    def run(number: int, clock: Clock | None = None) -> None:
        lap = clock.lap if clock else lambda part: None
        with precision:
            features, attention = objective.teacher(pixels)
        lap("teacher")
        hidden = objective.draw_mask(attention, len(pixels)).to(device)
        words = objective.hide_words(captions["ids"], captions["mask"], SPECIAL)
        lap("masks")
        with precision:
            found = objective.losses(pixels, features, hidden, words, captions["sample"])
        for value in found.values():
            value.item()
        lap("forward and losses")
        optimizer.zero_grad()
        sum(found.values()).backward()
        lap("backward")
        optimizer.step()
        lap("optimizer")

    def timed(number: int, clock: Clock) -> None:
        clock.restart()
        run(number, clock)

    return run, timed


def measure(case: Case, media: Media) -> dict[str, object]:
    """Every figure of the JSON line, by name; see Case.measure."""
    config = stage2_config(case.model, case.batch_size, case.computed_in)
    config.run.compile = case.compiled
    frames = config.student.num_frames if media == "video" else config.student.tubelet_size
    video = random_video(case.batch_size, frames, config.student.image_size, case.device)
    captions = random_captions(config, case.device)
    implementations = {
        "fast": lambda: fast_steps(config, video, captions, case.device),
        "plain": lambda: plain_steps(config, video, captions, case.device),
    }
    flops = VideoTextPretraining.flops_of(config, image=media == "image") * case.batch_size
    return case.measure("stage2", implementations[case.implementation], flops) | {"media": media}


def main(
    model: Model = "b16",
    batch_size: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp32"] = "bf16",
    implementation: Literal["fast", "plain"] = "fast",
    steps: int = 5,
    media: Media = "video",
    compile: bool = False,
) -> None:
    """Time a whole stage-2 training step on random captioned clips or images; one JSON line.

    Args:
        model: Tower and text of this size; the teacher is the official one, untrained.
        batch_size: Clips, or images, per step.
        device: Where; auto takes a GPU if there is one.
        dtype: Compute precision; the fast implementation uses fp32 where a CPU has no bf16 instructions (see `computed_in`).
        implementation: fast is what `train` runs; plain does what the official step does.
        steps: Timed steps, after two that are not.
        media: Clips of four frames with 80% of the tokens hidden, or images with 50%.
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
    if batch_size < 2:
        raise ConfigError("batch_size is 1; a hard negative needs a second pair in the batch")
    print(json.dumps(measure(case, media)))
