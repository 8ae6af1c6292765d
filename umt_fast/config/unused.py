"""Options that a run would not read: refused when it begins, because only then all of them are known.

A recipe page may set what a later command-line option makes useless, so configurations themselves do not check this. An
option at its default is never refused.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from umt_fast.config.core import require
from umt_fast.config.stages import FinetuneConfig, Stage1Config, Stage2Config


def check_used(config: Stage1Config | Stage2Config | FinetuneConfig, world_size: int) -> None:
    """Raises ConfigError for an option set away from its default that a run on world_size ranks would not read.

    And for a contrastive loss whose joint batch is a single pair.
    """
    defaults = type(config)()

    def unread(names: str, why: str, *harmless: Any) -> None:
        """Refuses options, named as on the command line; harmless: values that ask for nothing."""
        for name in names.split():
            value, default = (attrgetter(name)(each) for each in (config, defaults))
            require(value == default or value in harmless, f"{name} is {value!r}, but {why}; leave it at {default!r}")

    run = config.run
    if world_size == 1:
        unread("run.parallel run.compress", "there is one rank: start several with torchrun")
    if run.tune == "off":
        unread("run.tune_axes run.tune_deadline", "run.tune is off")
    if run.warmup_epochs == 0:
        unread("optim.warmup_lr", "run.warmup_epochs is 0, so that no step has that rate", 0.0)
    if config.data.workers == 0 and config.data.reader != "dali":
        unread("data.prefetch", "data.workers is 0, and the training process reads nothing ahead")
    if config.student.depth == 1:
        unread("student.drop_path", "rates grow from 0 at the first block, and student.depth is 1", 0.0)
    if not isinstance(config, FinetuneConfig):
        if config.teacher.depth == 1:
            unread("teacher.precision", "the last block is always exact, and teacher.depth is 1")
        unread("optim.layer_decay", "only fine-tuning has a rate for each layer", 1.0)
    elif config.freeze:
        unread("optim.layer_decay", "freeze leaves only the head to be trained", 1.0)
        unread("student.checkpoint_blocks", "freeze needs no backward pass through the blocks", 0)
    if isinstance(config, Stage2Config):
        _check_stage2(config, unread, world_size)


def _check_stage2(config: Stage2Config, unread: Callable[..., None], world_size: int) -> None:
    """The same for what only stage 2 has, and what only it does not read."""
    losses = config.losses
    unread("data.train", "stage 2 reads caption lists: give them with --videos and --images")
    unread("data.root", "caption lists carry their folders: give LIST=FOLDER")
    unread("data.separator data.frame_pattern", "caption lists have neither columns nor frame folders")
    if not losses.mlm:
        unread("mask_words", "losses.mlm is 0, so that no word is asked for")
    if config.videos and not config.images and config.student.num_frames > config.student.tubelet_size:
        unread("image_mask.kind", "images is empty", config.mask.kind)
        unread("image_mask.ratio", "images is empty")
    if config.images and not config.videos:
        unread("mask.kind", "videos is empty, and images have image_mask", config.image_mask.kind)
        unread("mask.ratio", "videos is empty, and images have image_mask", config.image_mask.ratio)
    elif config.student.num_frames == config.student.tubelet_size:
        unread("mask.kind", "clips of one token frame are masked as images are, by image_mask", config.image_mask.kind)
        unread(
            "mask.ratio", "clips of one token frame are masked as images are, by image_mask", config.image_mask.ratio
        )
    require(
        not losses.vtc or config.run.batch_size * world_size >= 2,
        f"run.batch_size is {config.run.batch_size} on {world_size} rank, and losses.vtc compares pairs with each other; "
        "raise it, or set losses.vtc to 0",
    )
