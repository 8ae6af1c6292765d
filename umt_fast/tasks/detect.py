"""`eval detect`: frame mAP of a detector on key frames, with a person detector's boxes."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from umt_fast.config import DataConfig, JudgingConfig, KeyFrameConfig, by_option, require
from umt_fast.data.sources.detections import MIN_SCORE
from umt_fast.engine.distributed import Ranks
from umt_fast.models.description import vit_config
from umt_fast.models.weights import WeightsFile, fit_detector
from umt_fast.tasks.base import EvalOptions, register_evaluation
from umt_fast.tasks.detection import Detection
from umt_fast.tasks.judge import Judge

log = logging.getLogger("umt_fast")


@dataclass(frozen=True, kw_only=True)
class DetectOptions(EvalOptions):
    """How a detector is judged."""

    boxes: str = ""
    """A person detector's boxes: .csv (movie,second,x1,y1,x2,y2,class,score), or .json (image_id, bbox, score)."""
    annotations: str = ""
    """With .json boxes: the annotation file (.json) whose images they name."""
    label_map: str = ""
    """Classes that are judged (.pbtxt); empty: the 60 of AVA's 80 that its benchmark judges, else all."""
    excluded: str = ""
    """CSV file of key frames `movie,second` that are not judged."""
    min_box_score: float = MIN_SCORE
    """Boxes of a lower score are not classified."""
    movies: Literal["trained", "seconds", "frames", "whole"] = "trained"
    """Below --root: `seconds`, MOVIE/SECOND.mp4; `frames`, folders MOVIE of extracted frames; `whole`, a file MOVIE.mp4 each;
    `trained`, as the checkpoint's run read them (seconds, where the file does not say)."""
    frame_pattern: str = ""
    """With --movies frames: a frame's file, its number (from 1) in braces, and {movie} where the movie's name goes. Empty: as
    trained, or {movie}_{:06d}.jpg."""
    frame_rate: float = 0.0
    """With --movies frames: frames a second; 0: as trained, or 30."""
    first_second: int | None = None
    """With --movies frames and whole: the second that the first frame shows. None: as trained, or 900."""
    scores: Path | None = None
    """CSV file for all detections in AVA's format: movie,second,x1,y1,x2,y2,class,score."""

    def clips(self, described: dict[str, Any], record: dict[str, Any]) -> KeyFrameConfig:
        """How the described detector sees clips of these movies.

        record: the settings of its run, where the file has them; what is not given is as there, and said in the log.
        Raises ConfigError: an option that such movies do not have.
        """
        run = record.get("clips") or {}
        trained = {name: run[name] for name in _MOVIES if name in run}
        official = {name: getattr(KeyFrameConfig(), name) for name in _MOVIES}
        unset = {name: type(self).__dataclass_fields__[name].default for name in _MOVIES}
        given = {name: getattr(self, name) for name in _MOVIES if getattr(self, name) != unset[name]}
        if given.get("movies", trained.get("movies")) != trained.get("movies"):
            trained = {}  # of movies that were laid out otherwise
        values = official | trained | given
        for name, layouts in _READ_WITH.items():
            require(
                name not in given or values["movies"] in layouts,
                f"--{name} is {given.get(name)!r}, and movies are read as {values['movies']!r}, which do not ask for it; leave "
                f"it out, or give --movies {' or '.join(layouts)}",
            )
        taken = {name: value for name, value in trained.items() if name not in given and value != official[name]}
        if taken:
            said = " ".join(f"--{name} {value}" for name, value in taken.items())
            log.info("movies are read as in training: %s", said)
        return by_option("clips", lambda: KeyFrameConfig(**described["clips"], **values))

    def judging(self) -> JudgingConfig:
        """What its detections are judged by."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(JudgingConfig)}
        return by_option("judging", lambda: JudgingConfig(**values))


_MOVIES = ("movies", "frame_pattern", "frame_rate", "first_second")
_READ_WITH = {"frame_pattern": ("frames",), "frame_rate": ("frames",), "first_second": ("frames", "whole")}


class Detect:
    """Frame mAP at IoU 0.5 of boxes with actions; LIST is AVA's ground truth (.csv)."""

    name, tasks, Options = "detect", ("detection",), DetectOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: DetectOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """Figures as Judge gives them; options.scores receives all detections."""
        seconds = options.max_seconds
        require(seconds == 0, f"max_seconds is {seconds}, and key frames are seconds of movies; leave it out")
        vit, count = vit_config(described), described["num_classes"]
        record = file.rest.get("config")
        clips = options.clips(described, record if isinstance(record, dict) else {})
        judge = Judge(list_path, options.judging(), clips, vit, data, count)
        objective = Detection(vit, num_classes=count, bf16=described["dtype"] == "bf16")
        fit_detector(objective.detector, file.state, str(source))
        objective.to(ranks.device).eval()
        return judge.figures(objective.scores, batch_size=options.batch_size, ranks=ranks, result=options.scores)


register_evaluation(Detect())
