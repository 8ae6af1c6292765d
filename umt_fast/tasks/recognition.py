"""`eval recognize`: zero-shot action recognition, classes told from their names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import ConfigError, DataConfig, require
from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import clean_caption
from umt_fast.data.sources.lists import check_labels, read_list
from umt_fast.engine.distributed import Ranks
from umt_fast.files import write_json
from umt_fast.models.weights import WeightsFile
from umt_fast.tasks.base import register_evaluation
from umt_fast.tasks.classification import accuracy
from umt_fast.tasks.matching import TASKS_WITH_TEXT, Matcher, TextOptions, load_matcher, whole_frames
from umt_fast.tasks.retrieval import computing


@dataclass(frozen=True, kw_only=True)
class RecognizeOptions(TextOptions):
    """How zero-shot recognition is judged."""

    classes: Path | None = None
    """File with the name of class i in line i, from 0."""
    templates: tuple[str, ...] = ("{}",)
    """Texts with {} where the name goes. With several a class is the mean of their embeddings."""
    separator: str = ","
    """Field separator of the list."""
    frame_pattern: str = "img_{:05d}.jpg"
    """File name of frame i (from 1) in a list of frame folders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.templates) > 0, "templates is empty; give at least one text with {} in it")
        for template in self.templates:
            require("{}" in template, f"the template {template!r} has no {{}}, where the name of a class goes")

    def data(self) -> DataConfig:
        return replace(super().data(), separator=self.separator, frame_pattern=self.frame_pattern)


def read_classes(path: Path) -> list[str]:
    """The names of classes, a line each. Raises DataError: no file, fewer than two, an empty line, a name twice."""
    if not path.is_file():
        raise DataError(f"no file of class names at {path}; give one with a name a line")
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8; convert it") from error
    if path.suffix == ".json" or (names and names[0].lstrip()[:1] in ("[", "{")):
        raise DataError(f"{path} is JSON; write the names of classes as text, a line each")
    if len(names) < 2:
        raise DataError(f"{path} names {len(names)} classes; it takes at least two, a line each")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        cleaned = clean_caption(name).strip()
        if not cleaned:
            raise DataError(f"{path}, line {number}: {name!r} is no name; line i names class i - 1")
        if cleaned in seen:
            raise DataError(
                f"{path}, line {number}: {name!r} is the name in line {seen[cleaned]} too, as texts are cleaned"
            )
        seen[cleaned] = number
    return names


@torch.no_grad()
def class_embeddings(matcher: Matcher, names: Sequence[str], templates: Sequence[str], device: torch.device) -> Tensor:
    """(K, E) unit vectors: of each class the mean of its texts' embeddings, one for each template."""
    texts = [clean_caption(template.replace("{}", name)) for template in templates for name in names]
    tokens, parts = matcher.tokens(texts), []
    for rows in torch.arange(len(texts)).split(256):
        ids, mask = (part.to(device) for part in tokens[rows])
        with computing(device, matcher.dtype):
            parts.append(matcher.model.project_text(matcher.model.text_encoder.encode(ids, mask)))
    return F.normalize(torch.cat(parts).view(len(templates), len(names), -1).mean(0), dim=-1)


class Recognize:
    """Zero-shot recognition: top-1 and top-5 on labeled clips, by the similarity of a clip with the names of classes."""

    name, tasks, Options = "recognize", TASKS_WITH_TEXT, RecognizeOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: RecognizeOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """`top1`, `top5` (shares), `clips`, `classes`; with scores the five best classes of every clip by name."""
        if options.classes is None:
            raise ConfigError("classes is not given; give the file of their names: --classes names.txt")
        names = read_classes(options.classes)
        remedy = f"{options.classes} names no others"
        check_labels(read_list(list_path, data), len(names), str(list_path), remedy)
        matcher = load_matcher(file, described, source, options, ranks)
        model, tower = matcher.model, matcher.model.vision_encoder
        classes = class_embeddings(matcher, names, options.templates, ranks.device)

        def logits(video: Tensor) -> Tensor:
            with computing(ranks.device, matcher.dtype):
                tokens, _ = tower.embed(video)
                clip = model.project_vision(tower.pool(tokens, tower.encoder.grid.frames))
            return clip @ classes.t() / model.temperature

        found: list[dict[str, Any]] | None = None if options.scores is None else []
        figures = dict(
            accuracy(
                logits,
                str(list_path),
                whole_frames(data),
                num_frames=matcher.vit.num_frames,
                image_size=matcher.vit.image_size,
                batch_size=options.batch_size,
                device=ranks.device,
                rank=ranks.rank,
                world_size=ranks.world_size,
                found=found,
            )
        )
        if found is not None and ranks.first:
            for clip in found:
                clip["found"] = [[names[number], share] for number, share in clip["found"]]
                clip["name"] = names[clip["label"]]
            write_json(options.scores, {"clips": found})
        return figures | {"classes": len(names)}


register_evaluation(Recognize())
