"""Frame mAP of AVA: mean average precision of boxes with actions at IoU 0.5, on key frames.

The rules are those of the official AVA evaluation. A detection of a class looks at the true box of its class and frame that it
overlaps most. It is right if their IoU is 0.5 or more and no detection with a higher score took that box. A class's average
precision is the area under its precision curve, made monotone. The mean is over classes with true boxes; one that nothing
was detected of counts 0. Files are those of the AVA download: boxes `movie,second,x1,y1,x2,y2,class[,score]` with
coordinates in [0, 1], a label map (.pbtxt), and a list of excluded key frames `movie,second`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from umt_fast.data.errors import DataError
from umt_fast.data.sources.ava_csv import Frame, read_excluded
from umt_fast.data.sources.clip import require_list

IOU = 0.5

__all__ = ["Boxes", "Frame", "FrameMap", "frame_map", "read_boxes", "read_excluded", "read_label_map"]


class Boxes(NamedTuple):
    """Rows of boxes with a class each. frames: of each row. boxes: float64 (M, 4), x1, y1, x2, y2. classes: int64 (M,).
    scores: float64 (M,), 1 where a file has none."""

    frames: list[Frame]
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[tuple[Frame, Sequence[float], int, float]]) -> Boxes:
        """From (frame, box, class, score) one by one."""
        rows = list(rows)
        return cls(
            [row[0] for row in rows],
            np.array([row[1] for row in rows], np.float64).reshape(-1, 4),
            np.array([row[2] for row in rows], np.int64),
            np.array([row[3] for row in rows], np.float64),
        )

    def kept(self, keep: np.ndarray) -> Boxes:
        """The rows where keep (M,) is true."""
        frames = [frame for frame, one in zip(self.frames, keep.tolist(), strict=True) if one]
        return Boxes(frames, self.boxes[keep], self.classes[keep], self.scores[keep])


class FrameMap(NamedTuple):
    """mean: over classes with true boxes, NaN where no class has any. per_class: by name; NaN for one without true boxes."""

    mean: float
    per_class: dict[str, float]


def read_boxes(path: str | Path) -> Boxes:
    """A CSV file of true or detected boxes.

    Raises DataError: a line of another shape; its number is named. AVA's own files give key frames without any box as lines
    that end after the second: such a line adds nothing.
    """
    return Boxes.of(_rows(Path(path)))


def _rows(path: Path) -> Iterable[tuple[Frame, Sequence[float], int, float]]:
    require_list(path, "CSV file", "one with lines of `movie,second,x1,y1,x2,y2,class[,score]`")
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (len(row) >= 2 and not any(row[2:])):
                continue
            try:
                movie, second, *corners = row[:6]
                score = float(row[7]) if len(row) == 8 else 1.0
                box = [float(value) for value in corners]
                if len(row) not in (7, 8) or not np.isfinite([*box, score]).all():
                    raise ValueError
                yield (movie, int(second)), box, int(row[6]), score
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{path}, line {number}: {','.join(row)[:200]!r} is not `movie,second,x1,y1,x2,y2,class[,score]`"
                ) from error


def read_label_map(path: str | Path) -> dict[int, str]:
    """Class numbers and names of a .pbtxt label map, in its order (`id` and `label_id` mean the same)."""
    require_list(Path(path), "label map", "a .pbtxt file as AVA's download has them")
    names: dict[int, str] = {}
    for item in re.findall(r"item\s*\{(.*?)\}", Path(path).read_text(encoding="utf-8"), re.DOTALL):
        name, number = re.search(r'\bname:\s*"(.*?)"', item), re.search(r"\b(?:label_)?id:\s*(\d+)", item)
        if name is None or number is None:
            raise DataError(f"{path}: an item has no name or no id: {' '.join(item.split())[:200]!r}")
        names[int(number[1])] = name[1]
    if not names:
        raise DataError(f"{path} holds no items; give a label map as AVA's .pbtxt files are")
    return names


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) with boxes (M, 4)."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (ours, theirs))
    total = np.add.outer(*areas) - shared
    return np.divide(shared, total, out=np.zeros_like(shared), where=total > 0)


def _right(detected: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """bool (N,): which detections (N, 4), best score first, are right, given the true boxes (M, 4) of class and frame."""
    right = np.zeros(len(detected), bool)
    if not len(truth):
        return right
    table, taken = overlaps(detected, truth), np.zeros(len(truth), bool)
    for row, best in enumerate(table.argmax(1)):
        if table[row, best] >= IOU and not taken[best]:
            right[row] = taken[best] = True
    return right


def average_precision(scores: np.ndarray, right: np.ndarray, count: int) -> float:
    """Area under the monotone precision curve.

    Args:
        scores, right: of all detections of a class, (N,) each.
        count: its true boxes. 0 gives NaN.
    """
    if not count:
        return float("nan")
    hits = np.cumsum(right[_best_first(scores)])
    precision = hits / np.arange(1, len(hits) + 1)
    # The best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    gained = np.diff(hits / count, prepend=0.0)
    return float((gained * precision).sum())


def _best_first(scores: np.ndarray) -> np.ndarray:
    """Order of falling scores. Equal scores come as the official evaluation has them, which a stable sort would not give."""
    return np.argsort(scores)[::-1]


def frame_map(truth: Boxes, detected: Boxes, names: dict[int, str], excluded: set[Frame] = frozenset()) -> FrameMap:
    """Judges detections.

    Args:
        truth, detected: rows of other classes than those of `names`, and of excluded frames, are left out; so are
            detections without width or height.
        names: class numbers and their names.
        excluded: frames that are not judged.
    """

    def judged(rows: Boxes) -> Boxes:
        keep = np.isin(rows.classes, list(names)) & np.array([frame not in excluded for frame in rows.frames], bool)
        return rows.kept(keep)

    truth, detected = judged(truth), judged(detected)
    # Frames in the order of the detections: between equal scores it decides.
    frames = list(dict.fromkeys(detected.frames))
    detected = detected.kept((detected.boxes[:, :2] < detected.boxes[:, 2:]).all(1))
    per_class = {}
    for number, name in names.items():
        true_rows, rows = _by_frame(truth, number), _by_frame(detected, number)
        scores, right = [np.empty(0)], [np.empty(0, bool)]
        for frame in filter(rows.__contains__, frames):
            here = rows[frame]
            best = here[_best_first(detected.scores[here])]
            scores.append(detected.scores[best])
            right.append(_right(detected.boxes[best], truth.boxes[true_rows.get(frame, [])]))
        count = sum(map(len, true_rows.values()))
        per_class[name] = average_precision(np.concatenate(scores), np.concatenate(right), count)
    values = [value for value in per_class.values() if not np.isnan(value)]
    return FrameMap(float(np.mean(values)) if values else float("nan"), per_class)


def _by_frame(rows: Boxes, number: int) -> dict[Frame, np.ndarray]:
    found: dict[Frame, list[int]] = {}
    for row in np.flatnonzero(rows.classes == number).tolist():
        found.setdefault(rows.frames[row], []).append(row)
    return {frame: np.array(members) for frame, members in found.items()}
