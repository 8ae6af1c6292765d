"""A tiny AVA for tests: six movies in which two people stand apart, and a person's color is its class."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np

from tests.videos import write_video
from umt_fast.config import DataConfig, DetectionConfig, KeyFrameConfig, OptimConfig, RunConfig, VitConfig

COLORS = {1: (220, 30, 30), 2: (30, 30, 220), 3: (30, 200, 30)}
NAMES = {1: "red", 2: "blue", 3: "green"}
WIDTH, HEIGHT, RATE, MOVIES = 96, 64, 4, 6
Layout = Literal["seconds", "frames", "whole"]


def encode(path: Path, pictures: list[np.ndarray], rate: int = RATE) -> None:
    """A video of pictures uint8 (H, W, 3), nearly without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, pictures, rate=rate, crf="5")


def write_pictures(root: Path, movie: str, pictures: list[np.ndarray], layout: Layout) -> None:
    """Seconds 901 and 902 of a movie, RATE pictures each."""
    if layout == "whole":
        encode(root / f"{movie}.mkv", pictures)
    elif layout == "seconds":
        for number, second in enumerate((901, 902)):
            encode(root / movie / f"{second}.mp4", pictures[number * RATE : (number + 1) * RATE])
    else:
        from PIL import Image

        (root / movie).mkdir(parents=True)
        for number, picture in enumerate(pictures, 1):
            Image.fromarray(picture).save(root / movie / f"{movie}_{number:06d}.jpg", quality=95)


def write_world(root: Path, layout: Layout = "seconds") -> None:
    """Movies, truth.csv, boxes.csv (detected boxes), and classes.pbtxt. The key frame of each movie is second 902."""
    truth, boxes = [], []
    for number in range(MOVIES):
        movie, classes = f"movie{number}", (1 + number % 3, 1 + (number + 1 + number // 3) % 3)
        picture = np.full((HEIGHT, WIDTH, 3), 110, np.uint8)
        for place, label in enumerate(classes):
            left, top = 6 + 48 * place, 8 + 2 * number
            picture[top : top + 36, left : left + 36] = COLORS[label]
            corners = [left / WIDTH, top / HEIGHT, (left + 36) / WIDTH, (top + 36) / HEIGHT]
            shares = [f"{value:.4f}" for value in corners]
            truth.append([movie, "0902", *shares, label, place])
            boxes.append([movie, "0902", *shares, "", 0.95])
        boxes.append([movie, "0902", "0.100", "0.100", "0.300", "0.300", "", 0.4])  # below the usual least score
        write_pictures(root, movie, [picture] * (2 * RATE), layout)
    for name, rows in (("truth.csv", truth), ("boxes.csv", boxes)):
        with open(root / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    items = (f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in NAMES.items())
    (root / "classes.pbtxt").write_text("".join(items))


def configured(root: Path, out: Path, layout: Layout = "seconds") -> DetectionConfig:
    """A detector of seconds for that world."""
    vit = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=2, drop_path=0.0)
    extracted = {"frame_rate": float(RATE)} if layout == "frames" else {}
    cut = {} if layout == "seconds" else {"first_second": 901}
    return DetectionConfig(
        run=RunConfig(
            out=str(out),
            batch_size=3,
            epochs=40,
            warmup_epochs=1,
            dtype="fp32",
            device="cpu",
            log_every=1,
            keep=1,
            tensorboard=False,
        ),
        data=DataConfig(train=str(root / "truth.csv"), workers=0),
        clips=KeyFrameConfig(
            movies=layout, sparse=False, frames="described", stride=2, short_side=48, max_boxes=4, **extracted, **cut
        ),
        student=vit,
        optim=OptimConfig(lr=4e-3, min_lr=1e-5, warmup_lr=1e-5, lr_batch=0, betas=(0.9, 0.999)),
        num_classes=3,
        head_scale=1.0,
    )
