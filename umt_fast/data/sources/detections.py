"""Key frames with boxes of people: AVA's annotations for training, detected boxes for testing.

Two JSON files are read; AVA's own CSV files are read by ava_csv. Annotations: `images` with id, movie, timestamp, width and
height, and `annotations` with image_id, bbox (left, top, width, height in pixels) and action_ids. Detected boxes: a list of
image_id, bbox, score.

The rules are the official ones. Key frames come in the order of their ids. Training leaves out key frames without an
annotation, testing those without a detected box of the least score. Boxes are cut to the picture, and those that vanish are
left out; a key frame that loses all of its boxes stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.decode import boxes as moves
from umt_fast.data.decode.boxes import Size
from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import require_list

log = logging.getLogger("umt_fast.data")

AVA_CLASSES = 80
MIN_SCORE = 0.8
"""Detected boxes of a lower score are not classified."""


class KeyFrame(NamedTuple):
    """One clip. size: width and height that boxes are given in. boxes: fp32 (N, 4), left, top, right, bottom, in the picture.
    labels: bool (N, classes) in training, scores: fp32 (N,) in testing; the other one is None."""

    movie: str
    second: int
    size: Size
    boxes: Tensor
    labels: Tensor | None
    scores: Tensor | None


class Row(NamedTuple):
    """One key frame as it was read; boxes are left, top, width, height."""

    movie: str
    second: int
    boxes: list[Sequence[float]]
    labels: list[list[int]]
    scores: list[float]


class KeyFrames(Sequence[KeyFrame]):
    """All key frames, held as a few arrays, so that worker processes share their memory."""

    def __init__(self, rows: Sequence[Row], sizes: Mapping[str, Size], num_classes: int, *, labeled: bool) -> None:
        self.movies = sorted({row.movie for row in rows})
        self.num_classes, self.labeled = num_classes, labeled
        numbers = {movie: number for number, movie in enumerate(self.movies)}
        self._sizes = np.array([sizes[movie] for movie in self.movies], np.int32).reshape(-1, 2)
        self._movie = np.array([numbers[row.movie] for row in rows], np.int32)
        self._second = np.array([row.second for row in rows], np.int32)
        self._start = np.cumsum([0, *(len(row.boxes) for row in rows)])
        self._boxes = np.array([box for row in rows for box in row.boxes], np.float32).reshape(-1, 4)
        self._scores = np.array([score for row in rows for score in row.scores], np.float32)
        self._labels = np.zeros((len(self._boxes) if labeled else 0, num_classes), bool)
        if labeled:
            for box, labels in enumerate(labels for row in rows for labels in row.labels):
                self._labels[box, np.array(labels, np.int64) - 1] = True

    def identity(self) -> str:
        """64 bits, in hexadecimal, of all key frames with their boxes and labels in their order."""
        digest = hashlib.blake2b("\0".join(self.movies).encode(), digest_size=8)
        for column in (self._sizes, self._movie, self._second, self._start, self._boxes, self._scores, self._labels):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def places(self) -> list[tuple[str, int]]:
        """Movie and second of every key frame, without its boxes."""
        pairs = zip(self._movie.tolist(), self._second.tolist(), strict=True)
        return [(self.movies[movie], second) for movie, second in pairs]

    def count_boxes(self) -> int:
        """Boxes of all key frames, those too that lie outside of their pictures."""
        return len(self._boxes)

    def name_of(self, index: int) -> str:
        """What messages call a key frame."""
        return f"{self.movies[self._movie[index]]}, second {self._second[index]}"

    def __len__(self) -> int:
        return len(self._second)

    def __getitem__(self, index: int) -> KeyFrame:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"key frame {index} of {len(self)}")
        movie, rows = self._movie[index], slice(self._start[index], self._start[index + 1])
        width, height = (int(side) for side in self._sizes[movie])
        boxes = moves.clipped(moves.from_xywh(torch.from_numpy(self._boxes[rows])), (width, height))
        keep = moves.not_empty(boxes)
        # Indexing by a mask copies: what a transform does to these does not reach the list.
        labels = torch.from_numpy(self._labels[rows])[keep] if self.labeled else None
        scores = None if self.labeled else torch.from_numpy(self._scores[rows])[keep]
        return KeyFrame(self.movies[movie], int(self._second[index]), (width, height), boxes[keep], labels, scores)


def training_frames(annotations: str | Path, num_classes: int = AVA_CLASSES) -> KeyFrames:
    """The key frames of an annotation file that have an annotation.

    Raises DataError: a file or entry that is not as above, a class outside [1, num_classes], or nothing left.
    """
    path = Path(annotations)
    document = _annotation_file(path)
    images, sizes = _images(path, document)
    found: dict[Any, Row] = {}
    unknown = 0
    for number, entry in enumerate(_list_of(path, document, "annotations")):
        where = f"{path}: annotations[{number}]"
        (image,) = _fields(where, entry, "image_id")
        box = _box(where, entry)
        labels = _labels(where, entry, num_classes)
        if image not in images:
            unknown += 1
            continue
        row = found.setdefault(image, Row(*images[image], [], [], []))
        row.boxes.append(box)
        row.labels.append(labels)
    if unknown:
        log.warning("%s: %d annotations are of images that it does not list, and are not used", path, unknown)
    if not found:
        raise DataError(
            f"{path}: none of its {len(images)} images has an annotation; give an annotation file of training"
        )
    return KeyFrames([found[image] for image in _ordered(path, found)], sizes, num_classes, labeled=True)


def test_frames(
    annotations: str | Path, detected: str | Path, min_score: float = MIN_SCORE, num_classes: int = AVA_CLASSES
) -> KeyFrames:
    """The key frames of an annotation file with their detected boxes of min_score or more; those without one are left out.

    Raises DataError: a file or entry that is not as above, or nothing left.
    """
    path, detected = Path(annotations), Path(detected)
    images, sizes = _images(path, _annotation_file(path))
    require_list(detected, "file of detected boxes", "a JSON list of image_id, bbox and score")
    found: dict[Any, Row] = {}
    best = -math.inf
    for number, entry in enumerate(_list_of(detected, _json(detected), "")):
        where = f"{detected}: [{number}]"
        image, score = _fields(where, entry, "image_id", "score")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise DataError(f"{where}: score is {score!r}; it must be a number")
        box = _box(where, entry)
        if image not in images:
            continue  # one file of boxes serves several annotation files
        best = max(best, score)
        if score >= min_score:
            row = found.setdefault(image, Row(*images[image], [], [], []))
            row.boxes.append(box)
            row.scores.append(score)
    if not found:
        most = "it has no box of those" if best == -math.inf else f"the best score is {best}"
        raise DataError(
            f"{detected}: no box of score {min_score} or more for the {len(images)} images of {path} ({most}); give the boxes "
            "of this annotation file, or a lower least score"
        )
    return KeyFrames([found[image] for image in _ordered(path, found)], sizes, num_classes, labeled=False)


# Not a test, though pytest would take its name for one.
test_frames.__test__ = False  # type: ignore[attr-defined]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path} is no JSON file: {error}") from error


def _annotation_file(path: Path) -> dict[str, Any]:
    require_list(path, "annotation file", "a JSON file with `images` and `annotations`")
    document = _json(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} is a JSON {type(document).__name__}; an annotation file is an object with `images`")
    return document


def _list_of(path: Path, document: Any, name: str) -> list[Any]:
    """A list of a document, or the document itself where name is empty."""
    value = document.get(name) if name else document
    if not isinstance(value, list):
        what = f"`{name}` is {type(value).__name__}" if name else f"the file is a JSON {type(value).__name__}"
        raise DataError(f"{path}: {what}; it must be a list")
    return value


def _fields(where: str, entry: Any, *names: str) -> list[Any]:
    missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise DataError(f"{where} has no {' and no '.join(missing)}: {str(entry)[:200]}")
    return [entry[name] for name in names]


def _images(path: Path, document: dict[str, Any]) -> tuple[dict[Any, tuple[str, int]], dict[str, Size]]:
    """Movie and second of each image by its id, and the size of each movie: that of the first of its images."""
    images: dict[Any, tuple[str, int]] = {}
    sizes: dict[str, Size] = {}
    other = 0
    for number, entry in enumerate(_list_of(path, document, "images")):
        where = f"{path}: images[{number}]"
        image, movie, second, *size = _fields(where, entry, "id", "movie", "timestamp", "width", "height")
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise DataError(f"{where}: width and height are {size[0]!r} and {size[1]!r}; they must be whole pixels")
        if not isinstance(movie, str) or not isinstance(second, int):
            raise DataError(f"{where}: movie {movie!r} and timestamp {second!r} must be a name and a whole second")
        if not isinstance(image, (int, str)):
            raise DataError(f"{where}: id is {image!r}; it must be a number or a text")
        images[image] = movie, second
        other += sizes.setdefault(movie, tuple(size)) != tuple(size)
    if other:
        log.warning("%s: %d images have another size than their movie's first one, whose size is taken", path, other)
    if not images:
        raise DataError(f"{path} lists no images")
    return images, sizes


def _ordered(path: Path, images: Iterable[Any]) -> list[Any]:
    try:
        return sorted(images)
    except TypeError as error:
        raise DataError(f"{path}: some image ids are numbers and some are texts; they must be of one kind") from error


def _box(where: str, entry: Any) -> list[float]:
    (box,) = _fields(where, entry, "bbox")
    numbers = isinstance(box, list) and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
    if not numbers or len(box) != 4:
        raise DataError(f"{where}: bbox is {str(box)[:100]}; it must be left, top, width and height in pixels")
    return box


def _labels(where: str, entry: Any, num_classes: int) -> list[int]:
    (labels,) = _fields(where, entry, "action_ids")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(f"{where}: action_ids is {str(labels)[:100]}; it must be a list of class numbers")
    wrong = [label for label in labels if not 1 <= label <= num_classes]
    if wrong:
        raise DataError(f"{where}: action_ids holds {wrong[0]}; classes run from 1 to {num_classes}")
    return labels
