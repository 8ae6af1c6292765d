"""`eval probe`: how much of the classes of clips is in the features of a frozen tower."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from umt_fast.config import DataConfig, require
from umt_fast.data.errors import DataError
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.lists import check_labels, read_list
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.files import write_json
from umt_fast.models.weights import WeightsFile
from umt_fast.pretrained import build
from umt_fast.probing.features import Room, features_of, labels_of, shape_of
from umt_fast.probing.kinds import KINDS, Found, Sweep
from umt_fast.tasks.base import EvalOptions, register_evaluation

log = logging.getLogger("umt_fast")

MAX_CLASSES = 100_000
"""More are a mistake in a list, as a column of frame counts in the place of labels."""

# Options of single kinds.
_OWN = sorted({name for kind in KINDS.values() for name in kind.reads})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions(EvalOptions):
    """How features are judged."""

    train: Path | None = None
    """List of the labeled clips that probes learn from."""
    kind: Literal["linear", "attentive", "knn"] = "linear"
    """`linear` and `attentive` train heads on pooled features and on all tokens, `knn` asks the nearest training clips."""
    num_classes: int = 0
    """Classes of the lists; 0: as many as the labels of the train list reach."""
    rates: tuple[float, ...] = ()
    """Learning rates of heads. Every rate is tried with every weight decay, all at once; empty: 1e-4 to 1e-2 (linear), 1e-4 to
    1e-3 (attentive)."""
    weight_decays: tuple[float, ...] = ()
    """Weight decays of heads (AdamW); empty: 0, 0.01 and 0.1 (linear), 0.01 and 0.1 (attentive)."""
    epochs: int = 20
    """Passes over the training clips' features."""
    head_batch_size: int = 128
    """Clips of one step of the heads."""
    seed: int = 0
    """Of the held-out tenth of the train list, which chooses among heads, of their weights and of the clips' order."""
    neighbors: int = 20
    """Training clips that vote."""
    temperature: float = 0.07
    """Of the votes."""
    memory_gib: float = 16.0
    """Bound of the features that each rank keeps in memory. More go to --cache."""
    cache: Path | None = None
    """Folder for features beyond the bound, in a file that is gone afterwards."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What the tower computes in; auto: a classifier as it was trained, others in fp32."""
    separator: str = ","
    """Field separator of the lists."""
    frame_pattern: str = "img_{:05d}.jpg"
    """File name of frame i (from 1) in a list of frame folders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "head_batch_size", "neighbors"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_classes", "seed"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("temperature", "memory_gib"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        for rate in self.rates:
            require(math.isfinite(rate) and rate > 0, f"a rate is {rate}; it must be a finite number above 0")
        for decay in self.weight_decays:
            require(math.isfinite(decay) and decay >= 0, f"a weight decay is {decay}; it must be finite, 0 or above")
        require(
            self.num_classes <= MAX_CLASSES,
            f"num_classes is {self.num_classes}; a probe knows at most {MAX_CLASSES} classes",
        )
        require(self.num_classes != 1, "num_classes is 1; with one class there is nothing to tell apart")
        for entry in dataclasses.fields(self):
            if entry.name in _OWN and entry.name not in KINDS[self.kind].reads:
                value = getattr(self, entry.name)
                require(
                    value == entry.default,
                    f"{entry.name} is {value}, which a probe of kind {self.kind!r} does not read; leave it out",
                )

    def data(self) -> DataConfig:
        return dataclasses.replace(super().data(), separator=self.separator, frame_pattern=self.frame_pattern)


class Probe:
    """Top-1 and top-5 of a probe of the frozen video tower: features and labels of --train are all it learns from.

    Of each clip there is one view, as `embed` cuts it. Every rank trains the same heads; the first one's figures count.
    """

    name, Options = "probe", ProbeOptions
    tasks = ("pretraining", "video_text", "classification", "retrieval", "question_answering", "detection")

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: ProbeOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """`kind`, `top1`, `top5`, `clips`, `classes`, `train_clips`, `unreadable` (of the train list), `clips_in_both` lists;
        of trained heads also what is known of the chosen one and how many `heads` there were. With scores a JSON file of all
        heads and of the five best classes of every clip.

        Raises DataError: a clip of the test list that cannot be read; of the train list these are left out and counted.
        """
        require(options.train is not None, "train is not given; give the list that probes learn from: --train LIST")
        known, unseen = read_list(options.train, data), read_list(list_path, data)
        classes = _classes(known, unseen, options, list_path)
        both = _clips_in_both(known, unseen, options.train, list_path)
        kind = KINDS[options.kind]
        dtype = None if options.dtype == "auto" else options.dtype
        model = build(described, file.state, str(source), device=ranks.device, dtype=dtype)
        room = Room(ranks, options.memory_gib, options.cache)
        room.check(len(known) + len(unseen), shape_of(model, kind.feature), kind.feature)
        common = {"feature": kind.feature, "batch_size": options.batch_size}
        # The test list first: it is short, and a clip of it that cannot be read ends the command.
        tested = features_of(model, unseen, data, ranks, room, **common, name="test", max_bad_share=0.0)
        learned = features_of(model, known, data, ranks, room, **common, name="train", max_bad_share=1.0)
        sweep = Sweep(
            rates=options.rates or kind.rates,
            weight_decays=options.weight_decays or kind.weight_decays,
            epochs=options.epochs,
            head_batch_size=options.head_batch_size,
            neighbors=options.neighbors,
            temperature=options.temperature,
            classes=classes,
            attention_heads=model.vit.num_heads,
            seed=options.seed,
            device=ranks.device,
        )
        found = kind.judge(learned, tested.rows, sweep)
        top1, top5 = _shares(found.best, tested.label)
        if options.scores is not None and ranks.first:
            write_json(options.scores, _scores(found, tested.label, unseen, top1, top5))
        figures = {
            "kind": options.kind,
            "top1": top1[found.chosen],
            "top5": top5[found.chosen],
            "clips": len(unseen),
            "classes": classes,
            "train_clips": len(learned.index),
            "unreadable": len(known) - len(learned.index),
            "clips_in_both": both,
        }
        return gather(figures | found.figures)[0]


def _classes(known: Clips, unseen: Clips, options: ProbeOptions, list_path: Path) -> int:
    """How many classes there are. Raises DataError: fewer than two in the train list, or labels that are none of them."""
    labels = labels_of(known)
    if len(labels.unique()) < 2:
        raise DataError(f"{options.train} has clips of one class alone, {labels[0].item()}; a probe needs two at least")
    most = labels.max().item()
    if most >= MAX_CLASSES:
        raise DataError(
            f"{options.train} has labels up to {most}; a probe knows at most {MAX_CLASSES} classes, numbered from 0"
        )
    classes = options.num_classes or max(2, most + 1)
    check_labels(known, classes, str(options.train), "correct the list or raise num_classes")
    remedy = f"{options.train} has no others: correct the list, or set num_classes"
    check_labels(unseen, classes, str(list_path), remedy)
    return classes


def _clips_in_both(known: Clips, unseen: Clips, train: Path, test: Path) -> int:
    names = {clip.name for clip in known}
    both = sum(clip.name in names for clip in unseen)
    if both:
        log.warning(
            "%d of the %d clips of %s are in %s too: the figures say in part how well these are remembered",
            both,
            len(unseen),
            test,
            train,
        )
    return both


def _shares(best: Tensor, label: Tensor) -> tuple[list[float], list[float]]:
    """Top-1 and top-5 of each head, from best classes (H, V, k) and labels (V,)."""
    hits = best == label[:, None]
    return hits[..., 0].double().mean(1).tolist(), hits.any(2).double().mean(1).tolist()


def _scores(found: Found, label: Tensor, clips: Clips, top1: list[float], top5: list[float]) -> dict[str, Any]:
    best, shares = found.best[found.chosen].tolist(), found.shares[found.chosen].tolist()
    rows = zip((clip.name for clip in clips), label.tolist(), best, shares, strict=True)
    table = [row | {"top1": top1[head], "top5": top5[head]} for head, row in enumerate(found.table)]
    return {
        "heads": table,
        "clips": [
            {
                "clip": name,
                "label": own,
                "found": [[number, round(share, 5)] for number, share in zip(numbers, values, strict=True)],
            }
            for name, own, numbers, values in rows
        ],
    }


register_evaluation(Probe())
