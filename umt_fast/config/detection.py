"""Action detection on key frames, as on AVA: clips around seconds of movies, boxes of people, independent classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from umt_fast.config.core import check_numbers, require
from umt_fast.config.models import VitConfig
from umt_fast.config.run import DataConfig, OptimConfig, RunConfig


def _numbers(pattern: str) -> bool:
    """Whether a pattern names each frame's file."""
    try:
        return pattern.format(1, movie="m") != pattern.format(2, movie="m")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False


@dataclass(kw_only=True, slots=True)
class KeyFrameConfig:
    """Where the movies lie, which frames around a key frame are seen, and how they are cut. Defaults are the official ones."""

    movies: Literal["seconds", "frames", "whole"] = "seconds"
    """Below data.root: `seconds`: MOVIE/SECOND.mp4, a file for every second, as the official code reads AVA; `frames`: a folder
    MOVIE of extracted frames; `whole`: a file MOVIE.mp4 (mkv, webm, avi, mov) each."""
    frame_pattern: str = "{movie}_{:06d}.jpg"
    """With `frames`: the name of a frame's file, its number (from 1) in braces, and {movie} where the movie's name goes."""
    frame_rate: float = 30.0
    """With `frames`: frames a second."""
    first_second: int = 900
    """With `frames` and `whole`: the second that the first frame shows. AVA's 15 minutes begin at 900."""
    sparse: bool = True
    """The official scripts' --sparse: 300 frames around the key frame are read, else only num_frames * stride."""
    frames: Literal["released", "described", "still"] = "released"
    """Which frames of those. `released`: as the released code does, sparse takes num_frames frames, `stride` apart, from their
    middle, and not sparse the middles of equal parts; `described`: as its description says, the other way around; `still`: the
    key frame alone, num_frames times, for what a single picture tells."""
    stride: int = 8
    """Frames from one frame to the next."""
    short_side: int = 256
    """Pixels that a picture's short side is resized to; training crops squares of student.image_size out of it."""
    hue: int = 10
    """Largest random shift of 180 steps in training; saturation and brightness: of 255 steps."""
    saturation: int = 26
    brightness: int = 26
    mirror: float = 0.5
    """Probability that a training clip is mirrored."""
    max_boxes: int = 100
    """Boxes of a clip in training; of more a random choice is taken. Every clip of a batch has so many rows, most of them
    padding, so that shapes never change."""

    def __post_init__(self) -> None:
        check_numbers(self, "clips")
        require(
            _numbers(self.frame_pattern),
            f"clips.frame_pattern is {self.frame_pattern!r}; it must hold a frame's number in braces, as in "
            "{movie}_{:06d}.jpg",
        )
        require(self.frame_rate > 0, f"clips.frame_rate is {self.frame_rate}; it must be positive")
        for name in ("stride", "short_side", "max_boxes"):
            require(getattr(self, name) >= 1, f"clips.{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in (("hue", 179), ("saturation", 255), ("brightness", 255)):
            value = getattr(self, name)
            require(0 <= value <= most, f"clips.{name} is {value}; it must lie in [0, {most}]")
        require(0 <= self.mirror <= 1, f"clips.mirror is {self.mirror}; a probability lies in [0, 1]")


@dataclass(kw_only=True, slots=True)
class JudgingConfig:
    """What detections are judged by, beside the ground truth."""

    boxes: str = ""
    """A person detector's boxes: .csv (movie,second,x1,y1,x2,y2,class,score), or .json (image_id, bbox, score)."""
    annotations: str = ""
    """With .json boxes: the annotation file (.json) whose images they name."""
    label_map: str = ""
    """Classes that are judged (.pbtxt); empty: the 60 of AVA's 80 that its benchmark judges, else all."""
    excluded: str = ""
    """CSV file of key frames `movie,second` that are not judged; empty: none."""
    min_box_score: float = 0.8
    """Boxes of a lower score are not classified."""

    def __post_init__(self) -> None:
        check_numbers(self, "judging")
        json = self.boxes.endswith(".json")
        require(
            not json or bool(self.annotations),
            f"judging.boxes {self.boxes} names images by number; give the file that lists them as judging.annotations",
        )
        require(
            json or not self.annotations,
            f"judging.annotations is {self.annotations}, but no .json boxes name its images; leave it out",
        )


@dataclass(kw_only=True, slots=True)
class DetectionConfig:
    """Classes of people in boxes. data.train is AVA's ground truth (.csv), or annotations with pixel boxes (.json), and
    data.root the folder of its movies."""

    run: RunConfig = field(default_factory=lambda: RunConfig(epochs=30, warmup_epochs=5, batch_size=8))
    data: DataConfig = field(default_factory=DataConfig)
    clips: KeyFrameConfig = field(default_factory=KeyFrameConfig)
    student: VitConfig = field(default_factory=lambda: VitConfig(drop_path=0.2))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2.5e-4, min_lr=1e-6, warmup_lr=1e-6, betas=(0.9, 0.999), layer_decay=0.75
        )
    )
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    """How the model is judged between epochs on data.validation, AVA's ground truth of unseen movies below data.root."""
    num_classes: int = 80
    """AVA's; 60 of them are judged."""
    excluded: str = ""
    """CSV file of key frames `movie,second` that are not trained on; empty: none."""
    init: str = ""
    """Weights to start from (stage-1, stage-2, classifier or detector file); empty: from scratch."""
    head_scale: float = 0.001
    """Factor on the head's initial weights (normal, .02)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.num_classes >= 1, f"num_classes is {self.num_classes}; it must be at least 1")
        require(self.head_scale >= 0, f"head_scale is {self.head_scale}; it must not be negative")
        side, short = self.student.image_size, self.clips.short_side
        require(
            side <= short,
            f"student.image_size is {side}, and pictures are resized to clips.short_side {short}; a crop must fit into them",
        )
