"""Trains the sample world's teacher: a small CLIP (open_clip's model and loss) on single frames and still captions."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, OptimConfig, TeacherConfig
from umt_fast.data.decode import transforms
from umt_fast.data.decode.video import decode_frames
from umt_fast.engine.schedule import warmup_cosine
from umt_fast.extras import packages_of
from umt_fast.models.weights import save_state
from umt_fast.sample_world.world import Scene

if TYPE_CHECKING:
    import open_clip

log = logging.getLogger("umt_fast")


def build_clip(teacher: TeacherConfig) -> open_clip.CLIP:
    """open_clip's CLIP with the teacher's visual sizes and a two-layer text tower."""
    with packages_of("train"):
        import open_clip
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=teacher.depth,
        width=teacher.width,
        head_width=teacher.width // teacher.num_heads,
        patch_size=teacher.patch_size,
        image_size=teacher.image_size,
    )
    text = CLIPTextCfg(context_length=16, vocab_size=49408, width=64, heads=2, layers=2)
    clip = open_clip.CLIP(embed_dim=teacher.output_dim, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    # A dozen words need no learned embeddings, and updating all 49408 would cost more than the rest of a step.
    clip.token_embedding.requires_grad_(False)
    return clip


def pixels(frames: np.ndarray) -> Tensor:
    """uint8 (B, S, S, 3) -> normalized (B, 3, S, S); ImageNet statistics, which is what UMT feeds CLIP."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((torch.from_numpy(frames) / 255 - mean) / std).permute(0, 3, 1, 2)


def frames_by_caption(folder: Path, split: str, scenes: list[Scene], per_clip: int) -> dict[str, np.ndarray]:
    """Decoded frames of a split, some evenly spaced ones of each clip, grouped by what they show."""
    groups: dict[str, list[np.ndarray]] = {}
    for number, scene in enumerate(scenes):
        frames = decode_frames(
            folder / split / f"{number:05d}.mp4", lambda count: np.arange(per_clip) * count // per_clip
        )
        groups.setdefault(scene.still_caption, []).append(frames)
    return {caption: np.concatenate(frames) for caption, frames in groups.items()}


def train_clip(
    clip: open_clip.CLIP, groups: dict[str, np.ndarray], *, image_size: int, steps: int, batch_size: int, seed: int
) -> float:
    """Trains on batches whose captions all differ (equal ones would be false negatives); returns the last mean loss."""
    with packages_of("train"):
        import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    captions = sorted(groups)
    tokens = tokenizer(captions)
    rng = np.random.default_rng(seed)
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(
        [p for p in clip.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05, fused=True
    )
    rate = warmup_cosine(
        OptimConfig(lr=1e-3, min_lr=1e-5, lr_batch=0),
        global_batch=1,
        steps_per_epoch=1,
        epochs=steps,
        warmup_epochs=steps // 10,
    )
    losses, started = [], time.perf_counter()
    for step in range(steps):
        chosen = rng.choice(len(captions), min(batch_size, len(captions)), replace=False)
        pictures = []
        for number in chosen:
            frames = groups[captions[number]]
            frame = frames[rng.integers(len(frames))][None]
            crop = transforms.multi_scale_crop(frame.shape[2], frame.shape[1], image_size, True, rng)
            pictures.append(transforms.apply(frame, crop, image_size)[0])
        image = clip.encode_image(pixels(np.stack(pictures)), normalize=True)
        text = clip.encode_text(tokens[chosen], normalize=True)
        loss = loss_of(image, text, clip.logit_scale.exp())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            speed = (step + 1) * len(chosen) / (time.perf_counter() - started)
            log.info("teacher  step %d/%d  loss %.3f  %.0f images/s", step + 1, steps, loss.item(), speed)
    return torch.stack(losses[-20:]).mean().item()


@torch.no_grad()
def zero_shot_accuracy(clip: open_clip.CLIP, groups: dict[str, np.ndarray]) -> float:
    """Share of frames whose nearest caption, of all captions of the world, is their own."""
    with packages_of("train"):
        import open_clip

    captions = sorted(groups)
    text = clip.encode_text(open_clip.SimpleTokenizer(context_length=16)(captions), normalize=True)
    hits = total = 0
    for number, caption in enumerate(captions):
        image = clip.encode_image(pixels(groups[caption]), normalize=True)
        hits += ((image @ text.T).argmax(1) == number).sum().item()
        total += len(image)
    return hits / total


def save_visual(clip: open_clip.CLIP, path: Path) -> None:
    """Writes the visual tower in the official flat layout."""
    save_state(clip.visual.state_dict(), path)
