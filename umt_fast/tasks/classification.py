"""Supervised classification of clips: fine-tuning and linear probes, and the accuracy of what they made."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import pickle
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, FinetuneConfig, require
from umt_fast.config.unused import Refuse
from umt_fast.data.decode.erasing import erased, noise_of
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.labeled import LabeledReader
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.sources.lists import check_labels, read_list
from umt_fast.engine.checkpoint import checkpoints
from umt_fast.engine.distributed import Ranks, current_ranks, gather
from umt_fast.engine.sharded_checkpoint import REST
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.classifier import Classifier, pretraining_grid
from umt_fast.models.description import base_description, found_in, vit_config
from umt_fast.models.weights import WeightsError, is_saved_folder, load_encoder, read_weights
from umt_fast.models.weights.finetune import deepspeed_file, start_classifier
from umt_fast.tasks.base import register
from umt_fast.tasks.clips import clip_loader, counted_clips, random_clips, random_integers, training_list
from umt_fast.tasks.mixing import MixingLoader, draw, mixed, soft_targets

log = logging.getLogger("umt_fast")


class Supervised(nn.Module):
    """batch with labels -> loss and top-1 accuracy."""

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = Classifier(config.student, config.num_classes, config.head_scale)
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("pixel_mean", 255 * mean, persistent=False)
        self.register_buffer("pixel_std", 255 * std, persistent=False)
        if config.init:
            start_from(self.classifier, config)
        if config.freeze:
            for name, parameter in self.classifier.named_parameters():
                parameter.requires_grad_(name.startswith(("fc_norm.", "head.")))
        use_attention(self, config.run.attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official classifier layout."""
        return self.classifier

    def layer_id(self, name: str) -> int:
        """0 for the patch embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.config.student.depth + 1

    def logits(self, video: Tensor) -> Tensor:
        """(B, num_classes) fp32."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.config.run.dtype == "bf16"):
            return self.classifier(video).float()

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network."""
        return self.classifier.pieces()

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """One step's loss.

        Args:
            batch: `video` as in pre-training; `label`, int64 (B,) classes or floating (B, num_classes) probabilities, which
                are taken as they are, without label_smoothing. Where there are `erase_box` int64 (B, boxes, 4) boxes are
                filled; where there are `mix_share` and `mix_box`, a Mix, clips are mixed, and their targets are soft.

        Returns:
            fp32 scalars: `loss`, and `top1`, the share of clips whose best class is the one that is most of their target.
        """
        video, label = batch["video"], batch["label"]
        if "erase_box" in batch or "mix_share" in batch:
            video = self._normalized(video)
        if "erase_box" in batch:
            video = erased(video, batch["erase_box"], noise_of(video, self.config.augment.erasing_mode))
        if "mix_share" in batch:
            video = mixed(video, batch["mix_share"], batch["mix_box"])
            label = soft_targets(label, self.config.num_classes, batch["mix_share"], self.config.label_smoothing)
        logits = self.logits(video)
        if label.is_floating_point():
            loss, label = F.cross_entropy(logits, label), label.argmax(1)
        else:
            loss = F.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "top1": (logits.detach().argmax(1) == label).float().mean()}

    def _normalized(self, video: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> fp32 (B, 3, T, H, W), normalized; floating videos are that already."""
        if video.is_floating_point():
            return video
        planes = video.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        return (planes - self.pixel_mean) / self.pixel_std

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip, forward and backward (forward alone through frozen blocks)."""
        return flops.tower_flops(self.config.student, self.classifier.grid.size, frozen=self.config.freeze)


def start_from(classifier: Classifier, config: FinetuneConfig) -> None:
    """Fills a classifier from config.init, as init_as says. Raises WeightsError."""
    if config.init_as == "encoder":
        load_encoder(classifier, deepspeed_file(config.init))
    else:
        new_head = config.init_as == "new_head"
        started = start_classifier(classifier, config.init, delete_head=new_head, label_map=config.label_map)
        if not new_head and "head.weight" in started.fresh:
            raise WeightsError(
                f"init_as is 'classifier', but {config.init} has no head: it is no classifier's. Give one, or --init_as "
                "encoder to start from its tower"
            )


def trained_grid(checkpoint: Path) -> tuple[int, ...] | None:
    """The grid that the position table of a file was made for; None where the file does not describe its model."""
    try:
        if checkpoint.is_dir() and not is_saved_folder(checkpoint):
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
            " x ".join(map(str, grid)),
            source,
            " x ".join(map(str, vit.grid)),
        )
    return dataclasses.replace(config, student=dataclasses.replace(vit, position_grid=tuple(grid)))


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor],
    list_path: str,
    data: DataConfig,
    *,
    num_frames: int,
    image_size: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    found: list[dict[str, Any]] | None = None,
    reader: Callable[..., ClipReader] = ClipReader,
) -> Iterator[tuple[str, float]]:
    """Yields (`top1`, share), (`top5`, share), (`clips`, count) of all ranks together: one centered view of each clip.

    logits: uint8 video (B, T, S, S, 3) -> (B, classes). A clip that cannot be read raises, it is not left out.
    found: receives the five best classes of each clip with their probabilities, in the list's order.
    reader: takes the view, one of each clip; see ClipLoader.

    Raises WeightsError: logits that are not finite.
    """
    loader = ClipLoader(
        read_list(list_path, data),
        data,
        num_frames=num_frames,
        image_size=image_size,
        batch_size=batch_size,
        train=False,
        rank=rank,
        world_size=world_size,
        reader=reader,
    )
    hits = torch.zeros(2, device=device)
    count, rows = 0, []
    batches = iter(loader)
    # A rank with fewer clips computes nothing for the rest: parts of a sharded model are gathered by all together.
    for _ in range(max(gather(len(loader)))):
        batch = next(batches, None)
        if batch is None:
            logits(torch.zeros(1, num_frames, image_size, image_size, 3, dtype=torch.uint8, device=device))
            continue
        label = batch["label"].to(device)
        scores = logits(batch["video"].to(device))
        if not scores.isfinite().all():
            raise WeightsError("the classifier's logits are not finite: the run that made this checkpoint diverged")
        best = scores.topk(min(5, scores.shape[1])).indices
        ranked = best == label[:, None]
        hits += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum()])
        count += len(label)
        if found is not None:
            shares = scores.softmax(1).gather(1, best)
            rows += zip(batch["index"].tolist(), label.tolist(), best.tolist(), shares.tolist(), strict=True)
    top1, top5, count = (sum(column) for column in zip(*gather([*hits.tolist(), count]), strict=True))
    top1, top5 = top1 / count, top5 / count
    if found is not None:
        for number, label, classes, shares in sorted(chain.from_iterable(gather(rows))):
            best = [[name, round(share, 5)] for name, share in zip(classes, shares, strict=True)]
            found.append({"clip": loader.name_of(number), "label": label, "found": best})
    yield "top1", top1
    yield "top5", top5
    yield "clips", count


class LabeledValidation:
    """Top-1 and top-5 on data.validation between epochs, the official validation view of each clip."""

    best = "top1"

    def __init__(self, config: FinetuneConfig, ranks: Ranks) -> None:
        """Raises DataError: a list that cannot be read, or labels that the model has not."""
        self.config, self.ranks = config, ranks
        clips = read_list(config.data.validation, config.data)
        check_labels(clips, config.num_classes, config.data.validation)

    def figures(self, objective: Supervised) -> dict[str, float]:
        config, ranks = self.config, self.ranks
        found = accuracy(
            objective.logits,
            config.data.validation,
            config.data,
            num_frames=config.student.num_frames,
            image_size=config.student.image_size,
            batch_size=config.run.batch_size,
            device=ranks.device,
            rank=ranks.rank,
            world_size=ranks.world_size,
            reader=functools.partial(LabeledReader, augment=config.augment),
        )
        return {name: value for name, value in found if name != "clips"}


class Classification:
    """Fine-tuning of a classifier, or of its head alone."""

    name = "classification"
    Config = FinetuneConfig

    def settled(self, config: FinetuneConfig) -> FinetuneConfig:
        return with_position_grid(config)

    def refuse_unread(self, config: FinetuneConfig, refuse: Refuse, world_size: int) -> None:
        augment, mix = config.augment, config.mix
        for name in dataclasses.fields(augment):
            # Validation takes its frames by the same rule.
            judged = name.name in ("frames", "sampling_rate") and config.data.validation
            if name.name != "protocol" and not augment.published and not judged:
                refuse(f"augment.{name.name}", "augment.protocol is 'data'")
        if augment.frames != "dense":
            refuse("augment.sampling_rate", f"augment.frames {augment.frames!r} has no stride")
        if augment.published:
            refuse(
                "data.sampling data.augment data.reader", "augment.protocol 'published' has frames and crops of its own"
            )
            if not augment.rand_augment:
                refuse("augment.interpolation", "augment.rand_augment is empty")
            if not augment.erasing:
                refuse("augment.erasing_mode augment.erasing_count", "augment.erasing is 0")
        if not mix.on:
            refuse("mix.mixup_alpha mix.cutmix_alpha mix.cutmix_minmax", "mix.probability is 0")
            refuse("mix.probability mix.per", "mix.mixup_alpha and mix.cutmix_alpha are 0", 0.0)
        if not (mix.mixup_alpha and (mix.cutmix_alpha or mix.cutmix_minmax)):
            refuse("mix.switch", "not both of Mixup and CutMix are on")
        if mix.cutmix_minmax:
            refuse("mix.cutmix_alpha", "mix.cutmix_minmax takes its place")
        if not config.init:
            require(
                config.init_as == "encoder",
                f"init_as is {config.init_as!r}, but init is empty: give --init WEIGHTS (a launcher: INIT), or "
                "--init_as encoder to start from nothing",
            )
        if config.init_as != "classifier":
            refuse("label_map", f"init_as {config.init_as!r} takes no head")
        if config.freeze:
            refuse("optim.layer_decay", "freeze leaves only the head to be trained", 1.0)
            refuse("student.checkpoint_blocks", "freeze needs no backward pass through the blocks", 0)

    def objective(self, config: FinetuneConfig) -> Supervised:
        return Supervised(config)

    def untrained(self, config: FinetuneConfig) -> Supervised:
        config = copy.deepcopy(config)
        config.init = ""
        return Supervised(config)

    def loader(self, config: FinetuneConfig, ranks: Ranks) -> ClipLoader | MixingLoader:
        clips = training_list(config)
        check_labels(clips, config.num_classes, config.data.train)
        options = (
            {"reader": functools.partial(LabeledReader, augment=config.augment)} if config.augment.published else {}
        )
        loader = clip_loader(config, clips, config.student.num_frames, ranks, **options)
        if not config.mix.on:
            return loader
        size, seed = config.student.image_size, config.run.seed
        return MixingLoader(loader, config.mix, size=size, seed=seed, rank=ranks.rank)

    def validation(self, config: FinetuneConfig, ranks: Ranks) -> LabeledValidation | None:
        return LabeledValidation(config, ranks) if config.data.validation else None

    def random_batches(self, config: FinetuneConfig) -> list[dict[str, Tensor]]:
        batch = random_clips(config, config.student.num_frames)
        count, size = len(batch["index"]), config.student.image_size
        batch["label"] = random_integers(config.num_classes, count)
        if config.augment.published and config.augment.erasing:
            batch["erase_box"] = random_integers(size // 2, count, config.augment.erasing_count, 4, least=1)
        if config.mix.on:
            share, box = draw(config.mix, count, size, size, np.random.default_rng(0))
            batch |= {"mix_share": torch.from_numpy(share), "mix_box": torch.from_numpy(box)}
        return [batch]

    def without_noise(self, config: FinetuneConfig) -> FinetuneConfig:
        student = dataclasses.replace(config.student, drop_path=0.0)
        return dataclasses.replace(config, student=student, augment=dataclasses.replace(config.augment, erasing=0.0))

    def clips_of_epoch(self, config: FinetuneConfig) -> tuple[int, str] | None:
        return counted_clips(config)

    def visible_tokens(self, config: FinetuneConfig) -> int:
        return flops.visible_of(config.student, None)

    def describe(self, config: FinetuneConfig) -> dict[str, Any]:
        frames = {"frames": config.augment.frames}
        if config.augment.frames == "dense":
            frames["sampling_rate"] = config.augment.sampling_rate
        return base_description(self.name, config) | {"num_classes": config.num_classes} | frames


register(Classification())
