"""`eval classify`: the accuracy of a classifier, by one view of each clip or by the official test views.

The official test takes views of a clip at several times (segments) and places (crops), and averages their probabilities. All
views of a clip come from one decode. Ranks share the clips, and each clip counts once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from umt_fast.config import AugmentConfig, DataConfig, require
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.labeled import LabeledReader
from umt_fast.data.sources.lists import check_labels, read_list
from umt_fast.engine.distributed import Ranks
from umt_fast.files import write_json
from umt_fast.models.classifier import Classifier
from umt_fast.models.description import vit_config
from umt_fast.models.weights import WeightsError, WeightsFile, fit_classifier
from umt_fast.tasks.base import EvalOptions, register_evaluation
from umt_fast.tasks.views import Judged, ViewScores, per_class_accuracy, top_shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptions(EvalOptions):
    """How a classifier is judged."""

    batch_size: int = 16
    """Views per rank and step."""
    segments: int = 1
    """Views of a clip in time: 4 on Kinetics and Moments in Time, 2 on Something-Something V2."""
    crops: int = 1
    """Views of each segment in space, along the long side: officially 3. With one segment the one view is the official
    validation view, the center of the clip."""
    frames: Literal["auto", "kinetics", "ssv2", "dense"] = "auto"
    """Which frames a view has; auto: as the model was trained, `kinetics` where its file does not say."""
    sampling_rate: int = 4
    """Frame stride of `dense`, where the file does not say it."""
    separator: str = ","
    """Field separator of the list."""
    frame_pattern: str = "img_{:05d}.jpg"
    """File name of frame i (from 1) in a list of frame folders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segments", "crops", "sampling_rate"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")

    def data(self) -> DataConfig:
        return dataclasses.replace(super().data(), separator=self.separator, frame_pattern=self.frame_pattern)

    def augment(self, described: dict[str, Any]) -> AugmentConfig:
        """The frame rule for a described model. Raises ConfigError: an option that it does not read."""
        frames = described.get("frames", "kinetics") if self.frames == "auto" else self.frames
        if frames != "dense":
            rate = type(self)().sampling_rate
            require(
                self.sampling_rate == rate,
                f"sampling_rate is {self.sampling_rate}, but frames {frames} have no stride; leave it out",
            )
        return AugmentConfig(frames=frames, sampling_rate=described.get("sampling_rate", self.sampling_rate))


@torch.no_grad()
def judged(
    logits: Callable[[Tensor], Tensor], loader: ClipLoader, views: int, most: int, device: torch.device
) -> Judged:
    """Mean probabilities of all clips of all ranks, the same on each.

    Args:
        logits: uint8 video (B, T, S, S, 3) -> (B, classes).
        loader: gives all views of a clip in one batch, with their numbers as `view` where there are several.
        most: views that are computed at once.

    Raises WeightsError: logits that are not finite. DataError: a clip that cannot be read; none is left out.
    """
    scores = ViewScores(views)
    for batch in loader:
        view = batch.get("view", torch.zeros_like(batch["index"]))
        video = batch["video"]
        found = torch.cat([logits(part.to(device)).cpu() for part in video.split(most)])
        if not found.isfinite().all():
            raise WeightsError("the classifier's logits are not finite: the run that made this checkpoint diverged")
        scores.add(batch["index"], view, found)
    return scores.judged()


class Classify:
    """Top-1, top-5 and the mean accuracy of the classes on a list of labeled clips, by one view or many."""

    name, tasks, Options = "classify", ("classification",), ClassifyOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: ClassifyOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """`top1`, `top5`, `mean_class` (over classes with clips), `clips`, `views`. With scores a JSON file of the five best
        classes of every clip and the accuracy of every class."""
        clips = read_list(list_path, data)
        remedy = "this classifier knows no others: give a list of its classes"
        check_labels(clips, described["num_classes"], str(list_path), remedy)
        vit = vit_config(described)
        views = options.segments * options.crops
        reader = functools.partial(
            LabeledReader, augment=options.augment(described), segments=options.segments, crops=options.crops
        )
        loader = ClipLoader(
            clips,
            data,
            num_frames=vit.num_frames,
            image_size=vit.image_size,
            batch_size=max(1, options.batch_size // views),
            train=False,
            rank=ranks.rank,
            world_size=ranks.world_size,
            reader=reader,
        )
        classifier = Classifier(vit, described["num_classes"])
        fit_classifier(classifier, file.state, str(source))
        classifier.to(ranks.device).eval()

        def logits(video: Tensor) -> Tensor:
            with torch.autocast(video.device.type, torch.bfloat16, enabled=described["dtype"] == "bf16"):
                return classifier(video).float()

        found = judged(logits, loader, views, options.batch_size, ranks.device)
        label = torch.tensor([loader.clips[number].label for number in found.index.tolist()])
        classes = per_class_accuracy(found.scores, label)
        if options.scores is not None and ranks.first:
            write_json(options.scores, _scores(found, label, classes, loader))
        return {
            "top1": top_shares(found.scores, label, 1),
            "top5": top_shares(found.scores, label, 5),
            "mean_class": classes.nanmean().item(),
            "clips": len(label),
            "views": views,
        }


def _scores(found: Judged, label: Tensor, classes: Tensor, loader: ClipLoader) -> dict[str, Any]:
    shares, best = found.scores.topk(min(5, found.scores.shape[1]))
    rows = zip(found.index.tolist(), label.tolist(), best.tolist(), shares.tolist(), strict=True)
    return {
        "clips": [
            {
                "clip": loader.name_of(number),
                "label": own,
                "found": [[name, round(share, 5)] for name, share in zip(names, values, strict=True)],
            }
            for number, own, names, values in rows
        ],
        "accuracy_of_class": {str(number): value for number, value in enumerate(classes.tolist()) if value == value},
    }


register_evaluation(Classify())
