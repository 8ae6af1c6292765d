"""`bench stage2`: times a whole stage-2 step on random captioned clips or images and prints one JSON line.

The fast implementation is the Trainer's own step; the plain one is `reference/stage2.py`.
A step is teacher, mask, tower, text, the four losses, backward and optimizer. Clips and token ids are on the device when the
clock starts, as each trainer delivers them. For the fast implementation they are uint8 and padded to the batch's longest; for
the plain one, normalized fp32 and padded to the longest allowed. The official step also tokenizes, which is left out here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Literal

import torch
from torch import Tensor

import kernels
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
from umt_fast.bench.parts import (
    BLOCK_TRAFFIC,
    Cost,
    backward_cost,
    bytes_of,
    optimizer_cost,
    student_costs,
    teacher_borders,
    teacher_costs,
)
from umt_fast.bench.trained import Border, steps_of
from umt_fast.config import AlignConfig, ConfigError, RunConfig, Stage2Config, TextConfig
from umt_fast.models.flops import text_parts
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


# Elements a text position, in widths, that cross-attention moves: query 2, attention 2, projection, residual and norm 3.
CROSS_TRAFFIC = 7


def costs(config: Stage2Config, media: Media, trained: int) -> dict[str, Cost]:
    """The cost of each part of a step of run.batch_size clips or images with captions as long as allowed; trained: number of
    trained values."""
    vit, mask = config.student, config.mask_of(image=media == "image")
    if media == "image":
        vit = dataclasses.replace(vit, num_frames=vit.tubelet_size)
    tower, texts = student_costs(config, vit, mask), text_costs(config, media)
    batch, length = config.run.batch_size, config.max_length
    passing = [tower["blocks"], tower["heads"], *texts.values()]
    return {
        **teacher_costs(config, vit, mask),
        # int64 ids and labels, and what is drawn for each word.
        "hidden words": Cost(0, batch * length * (3 * 8 + 3 * 4)),
        "tower patches": tower["patches"],
        "tower blocks": tower["blocks"],
        "tower heads": tower["heads"],
        **texts,
        "alignment": tower["loss"],
        "backward": backward_cost(tower["patches"], passing, tower["loss"]),
        "optimizer": optimizer_cost(trained),
    }


def text_costs(config: Stage2Config, media: Media) -> dict[str, Cost]:
    """The parts with text, forward: 2 B texts, B of them masked, and 4 B pairs, of which 3 B are judged and B are filled."""
    text, batch, size = config.text, config.run.batch_size, bytes_of(config)
    shapes = VideoTextPretraining.text_shapes(config, image=media == "image")
    flops = {name: batch * value for name, value in text_parts(text, **shapes).items()}
    w, c, layers = text.width, config.student.width, text.depth - text.fusion_layer
    rows, seen, asked = batch * config.max_length, batch * shapes["visible"], batch * shapes["asked"]
    clips = 4 * seen * w  # keys and values of each clip, and once more as a wrong one
    whole = BLOCK_TRAFFIC + CROSS_TRAFFIC
    # The last layer: one text whole; of three groups all keys and values, and class tokens alone.
    last = rows * whole * w + 3 * rows * 5 * w + 14 * w * w + clips
    fusion = (layers - 1) * (4 * rows * whole * w + 14 * w * w + clips) + last
    similarity = config.embed_dim * (c + w) + seen * c
    return {
        "text, plain and masked": Cost(
            flops["text"],
            2 * rows * (4 + size) * w + text.fusion_layer * size * (2 * rows * BLOCK_TRAFFIC + 12 * w) * w,
        ),
        "similarity, negatives": Cost(flops["similarity"], size * similarity + 8 * batch * batch),
        "keys of clips": Cost(flops["keys"], layers * size * (seen * c + 2 * c * w + 2 * seen * w)),
        "fusion": Cost(flops["fusion"], size * fusion),
        "matching, words": Cost(
            flops["heads"], size * (3 * asked * w + w * w + text.vocab_size * w + 2 * asked * text.vocab_size)
        ),
    }


def borders_of(objective: VideoTextPretraining) -> list[Border]:
    """The ends of the parts that `costs` names, up to the losses."""
    tower, text = objective.model.vision_encoder, objective.model.text_encoder
    return [
        *teacher_borders(objective.teacher),
        Border(objective, "prepare", False, "hidden words"),
        Border(tower.encoder.blocks[0], "forward", True, "tower patches"),
        Border(tower.encoder, "forward", False, "tower blocks"),
        Border(tower, "embed", False, "tower heads"),
        Border(text, "encode", False, "text, plain and masked"),
        Border(text, "clip_keys", True, "similarity, negatives"),
        Border(text, "clip_keys", False, "keys of clips"),
        Border(text, "fuse_for_losses", False, "fusion"),
        Border(kernels, "align_loss", True, "matching, words"),
        Border(objective, "forward", False, "alignment"),
    ]


def profile_of(config: Stage2Config, media: Media, device: torch.device, steps: int) -> dict[str, object]:
    """The parts of `steps` steps beside their bounds; see profile.py."""
    batch = {"video": _random_media(config, media, device), **random_captions(config, device)}
    make = functools.partial(VideoTextPretraining, mask_id=MASK_ID, special=SPECIAL)
    return profiles.profile(config, make, batch, borders_of, functools.partial(costs, config, media), device, steps)


def _random_media(config: Stage2Config, media: Media, device: torch.device) -> Tensor:
    frames = config.student.num_frames if media == "video" else config.student.tubelet_size
    return random_video(config.run.batch_size, frames, config.student.image_size, device)


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
    video = _random_media(config, media, case.device)
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
    profile: bool = False,
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
        profile: Time the parts beside their bounds instead, as a table on stderr and a JSON line (fast implementation only).
    """
    if profile and implementation == "plain":
        raise ConfigError("profile is for the fast implementation; the plain one is the official eager step")
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
    )
    if batch_size < 2:
        raise ConfigError("batch_size is 1; a hard negative needs a second pair in the batch")
    if not profile:
        print(json.dumps(measure(case, media)))
        return
    found = profile_of(stage2_config(model, batch_size, case.computed_in), media, case.device, steps)
    print(profiles.table(found), file=sys.stderr)
    print(json.dumps(case.profiled("stage2") | {"media": media, "teacher_precision": "native"} | found))
