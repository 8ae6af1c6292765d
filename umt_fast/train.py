"""One training run from one configuration: the clips, the objective and the loop are put together here."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from umt_fast.config import (
    ConfigError,
    DataConfig,
    FinetuneConfig,
    Stage1Config,
    Stage2Config,
    check_used,
    from_dict,
    to_dict,
)
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.clips import ClipLoader, open_loader
from umt_fast.data.loaders.joint import AlternatingLoader, PackedLoader
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.captions import read_corpora
from umt_fast.data.sources.lists import Clip, check_labels, read_list
from umt_fast.engine.checkpoint import checkpoints, own_folder
from umt_fast.engine.distributed import current_ranks, distributed_run
from umt_fast.engine.numerics import numerics
from umt_fast.engine.precision import pick_device, room_for, usable_dtype
from umt_fast.engine.sharded_checkpoint import REST
from umt_fast.engine.trainer import Trainer
from umt_fast.models.attention import require_attention
from umt_fast.models.classifier import pretraining_grid
from umt_fast.models.description import describe, found_in, vit_config
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.models.weights import read_weights
from umt_fast.tasks import tuning
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.tasks.supervised import Supervised
from umt_fast.tasks.video_text import VideoTextPretraining

log = logging.getLogger("umt_fast")

AnyConfig = Stage1Config | Stage2Config | FinetuneConfig


def build_objective(config: AnyConfig) -> torch.nn.Module:
    """The objective of a configuration, its weights loaded."""
    if isinstance(config, Stage1Config):
        return UnmaskedAlignment(config)
    if isinstance(config, FinetuneConfig):
        return Supervised(config)
    if isinstance(config, Stage2Config):
        tokenizer = load_tokenizer(config.tokenizer)
        if len(tokenizer) > config.text.vocab_size:
            raise ConfigError(
                f"text.vocab_size is {config.text.vocab_size}, but the tokenizer {config.tokenizer} has {len(tokenizer)} words"
            )
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        return VideoTextPretraining(config, mask_id=tokenizer.mask_token_id, special=special)
    raise ConfigError(f"no objective for {type(config).__name__}")


def build_loader(
    config: AnyConfig, rank: int, world_size: int, device: torch.device
) -> ClipLoader | AlternatingLoader | PackedLoader:
    """The training clips of a configuration; for stage 2 captioned clips and images, in turn or packed."""

    config.data.require_used()

    def clips_of(clips: Sequence[Clip], num_frames: int, data: DataConfig = config.data) -> ClipLoader:
        return open_loader(
            clips, data, device=device, num_frames=num_frames, image_size=config.student.image_size,
            batch_size=config.run.batch_size, rank=rank, world_size=world_size, seed=config.run.seed,
        )  # fmt: skip

    if not isinstance(config, Stage2Config):
        if not config.data.train:
            raise ConfigError("data.train is empty; give a list of videos: --data.train list.csv")
        clips = read_list(config.data.train, config.data)
        if isinstance(config, FinetuneConfig):
            check_labels(clips, config.num_classes, config.data.train)
        return clips_of(clips, config.student.num_frames)
    if not config.videos and not config.images:
        raise ConfigError("videos and images are both empty; give caption lists: --videos list.json=folder")
    packed = config.co_training == "packed"
    if packed and not (config.videos and config.images):
        missing = "images" if config.videos else "videos"
        raise ConfigError(f"co_training 'packed' needs clips and images, but {missing} is empty; use 'alternating'")
    tokenizer = load_tokenizer(config.tokenizer)
    # With run.tune the winner is not known yet, and the candidates were timed with this shape.
    fixed = config.run.compile or config.run.cuda_graph or config.run.tune != "off"
    parts = []
    for entries, frames in ((config.videos, config.student.num_frames), (config.images, config.student.tubelet_size)):
        if entries:
            corpus = read_corpora(entries, workers=config.data.workers)
            tokens = Tokens(
                corpus.captions, tokenizer, max_length=config.max_length, sep=config.sep_token, fixed=fixed,
                teacher=config.losses.text_projection > 0,
            )  # fmt: skip
            # Single pictures cost a CPU little, and are no videos to DALI.
            data = config.data if entries is config.videos else dataclasses.replace(config.data, reader="cpu")
            sample = corpus.sample if config.same_sample == "media" else torch.arange(len(corpus.sample))
            parts.append(CaptionLoader(clips_of(corpus.clips, frames, data), tokens, sample))
    return PackedLoader(*parts) if packed else AlternatingLoader(parts, config.run.seed)


def trained_grid(checkpoint: Path) -> tuple[int, ...] | None:
    """The grid that the position table of a file was made for; None where the file does not describe its model."""
    try:
        if checkpoint.is_dir():
            rest = torch.load(checkpoint / REST, map_location="cpu", weights_only=True)
        else:
            rest = read_weights(checkpoint).rest
        described = found_in(rest, checkpoint)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None  # who loads the weights says what is wrong with them
    if described is None:
        return None
    vit = vit_config(described)
    return vit.position_grid or (
        pretraining_grid(vit.patch_size) if described["task"] == "classification" else vit.grid
    )


def with_position_grid(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with student.position_grid set; one line says so where the table is resized.

    As given; else that of the run which continues; else that which `init` was trained at; else the official one.
    """
    vit, run = config.student, config.run
    if vit.position_grid:
        return config
    sources = [path for _, path in reversed(checkpoints(Path(run.out)))] if run.resume else []
    sources += [Path(config.init)] if config.init else []
    found = ((grid, str(path)) for path in sources if (grid := trained_grid(path)))
    grid, source = next(found, (pretraining_grid(vit.patch_size), "the official pre-training"))
    if tuple(grid) != vit.grid and current_ranks(run).first:
        log.info(
            "the position table is made for the %s tokens of %s and resized to %s; --student.position_grid sets another",
            " x ".join(map(str, grid)), source, " x ".join(map(str, vit.grid)),
        )  # fmt: skip
    return dataclasses.replace(config, student=dataclasses.replace(vit, position_grid=tuple(grid)))


def train(config: AnyConfig) -> Path:
    """Trains as configured and returns the run folder.

    The folder then holds checkpoint-*.pt, metrics.jsonl and, if wanted, TensorBoard events. A run whose folder already
    holds checkpoints continues from the newest one unless run.resume is false.
    """
    # A copy, checked again: fields may have been set since it was made.
    config = from_dict(type(config), to_dict(config))
    device = pick_device(config.run.device)
    config.run.dtype = usable_dtype(config.run.dtype, device)
    if isinstance(config, FinetuneConfig):
        config = with_position_grid(config)
    elif isinstance(config, Stage1Config) or config.runs_teacher:
        require_precision(config.teacher, device)
    # Seeded by the run alone: every rank starts from the same weights.
    torch.manual_seed(config.run.seed)
    return fit_objective(config, lambda: build_objective(config))


def fit_objective(config: AnyConfig, objective: torch.nn.Module | Callable[[], torch.nn.Module]) -> Path:
    """Trains an objective, or one built once the list has been read, with a configuration's data, schedule and folder.

    run.tune writes its choice into `config` before the objective is built. Raises ConfigError where one is given built.
    """
    if config.run.tune != "off" and isinstance(objective, torch.nn.Module):
        raise ConfigError(f"run.tune is {config.run.tune!r}, and this objective is built already; set --run.tune off")
    check_used(config, current_ranks(config.run).world_size)
    with (
        numerics(config.run), distributed_run(config.run) as ranks, own_folder(Path(config.run.out), first=ranks.first)
    ):  # fmt: skip
        loader = build_loader(config, ranks.rank, ranks.world_size, ranks.device)
        tuning.settle(config, ranks)
        # A packed step has as many images as clips besides.
        kinds = len(loader.parts) if isinstance(loader, PackedLoader) else 1
        towers = {name: getattr(config, name) for name in ("student", "teacher", "text") if hasattr(config, name)}
        sizes = ", ".join(f"{name}.width {tower.width} and depth {tower.depth}" for name, tower in towers.items())
        with room_for(f"the model ({sizes})"):
            require_attention(config, ranks.device)
            objective = objective if isinstance(objective, torch.nn.Module) else objective()
            trainer = Trainer(
                config.run,
                config.optim,
                objective,
                loader,
                num_sample=config.data.num_sample * kinds,
                layer_of=getattr(objective, "layer_id", None),
                num_layers=config.student.depth + 1,
                config_record=to_dict(config),
                model_config=describe(config),
            )
        trainer.train()
    return Path(config.run.out)
