"""Key frames from AVA's own CSV files: ground truth, detected boxes, excluded key frames. Coordinates lie in [0, 1].

    ground truth    movie,second,x1,y1,x2,y2,class[,person]     lines of one box and person are one box with several classes
    detected boxes  movie,second,x1,y1,x2,y2,class,score        the class may be empty and is not read
    excluded        movie,second

A ground truth is written by people: a line that is not as above is an error, and so are coordinates outside of [0, 1] and boxes
whose sides are exchanged. Detected boxes are cut to the picture, and those that vanish are left out, as the official reader
does with both. A line that ends after the second names a key frame without boxes and adds nothing.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from umt_fast.data.decode.boxes import Size
from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import require_list
from umt_fast.data.sources.detections import AVA_CLASSES, MIN_SCORE, KeyFrames, Row

log = logging.getLogger("umt_fast.data")

_TRUTH = "`movie,second,x1,y1,x2,y2,class[,person]` with coordinates in [0, 1]"
_DETECTED = "`movie,second,x1,y1,x2,y2,class,score`"
Frame = tuple[str, int]


def training_frames(
    truth: str | Path,
    sizes: Mapping[str, Size],
    num_classes: int = AVA_CLASSES,
    excluded: Collection[Frame] = frozenset(),
) -> KeyFrames:
    """The key frames of a ground truth that have a box, by movie and second.

    Args:
        truth: the CSV file.
        sizes: width and height in pixels of each movie (see data.decode.movies).
        excluded: key frames that are left out.

    Raises DataError: a line that is not as above, its number named; a movie without a size; or nothing left.
    """
    path = Path(truth)
    found: dict[Frame, dict[tuple, list[int]]] = {}
    for number, row in _rows(path, _TRUTH):
        where = f"{path}, line {number}"
        try:
            movie, second, corners = row[0], int(row[1]), tuple(float(value) for value in row[2:6])
            label, person = int(row[6]), row[7:]
            if len(person) > 1 or not all(0 <= value <= 1 for value in corners):
                raise ValueError
        except (ValueError, IndexError) as error:
            raise _not_as(where, row, _TRUTH) from error
        if corners[2] < corners[0] or corners[3] < corners[1]:
            raise DataError(
                f"{where}: the box {','.join(row[2:6])} ends before it begins; x1 <= x2 and y1 <= y2 must hold"
            )
        if not 1 <= label <= num_classes:
            raise DataError(f"{where}: class {label}; classes run from 1 to {num_classes}")
        _known(where, movie, sizes)
        if (movie, second) not in excluded:
            found.setdefault((movie, second), {}).setdefault((*corners, *person), []).append(label)
    if not found:
        raise DataError(f"{path} holds no box; give AVA's ground truth of training")
    rows = []
    for (movie, second), people in sorted(found.items()):
        boxes = [_pixels(corners, sizes[movie]) for corners in people]
        rows.append(Row(movie, second, boxes, list(people.values()), []))
    return KeyFrames(rows, sizes, num_classes, labeled=True)


def test_frames(
    detected: str | Path,
    sizes: Mapping[str, Size],
    movies: Collection[str],
    min_score: float = MIN_SCORE,
    num_classes: int = AVA_CLASSES,
    excluded: Collection[Frame] = frozenset(),
) -> KeyFrames:
    """The key frames of a file of detected boxes that have one of min_score or more, by movie and second.

    Args:
        detected: the CSV file. Lines of one box are one box.
        sizes: width and height in pixels of each movie.
        movies: others are left out, so that one file serves several ground truths; a line counts them.
        excluded: key frames that are left out.

    Raises DataError: a line that is not as above, its number named; a movie without a size; or nothing left.
    """
    path = Path(detected)
    found: dict[Frame, dict[tuple, float]] = {}
    best, other = -math.inf, set()
    for number, row in _rows(path, _DETECTED):
        where = f"{path}, line {number}"
        try:
            movie, second, corners, score = row[0], int(row[1]), tuple(map(float, row[2:6])), float(row[7])
            if len(row) != 8 or not all(map(math.isfinite, (*corners, score))):
                raise ValueError
        except (ValueError, IndexError) as error:
            raise _not_as(where, row, _DETECTED) from error
        if movie not in movies:
            other.add(movie)
            continue
        _known(where, movie, sizes)
        best = max(best, score)
        if score >= min_score and (movie, second) not in excluded:
            found.setdefault((movie, second), {}).setdefault(corners, score)
    if other:
        log.info("%s: boxes of %d movies are not used, the ground truth does not name them", path, len(other))
    if not found:
        most = "it has no box of its movies" if best == -math.inf else f"the best score is {best}"
        raise DataError(
            f"{path}: no box of score {min_score} or more for the ground truth ({most}); give the boxes of this ground truth, "
            "or a lower least score"
        )
    rows = []
    for (movie, second), boxes in sorted(found.items()):
        corners = [_pixels(box, sizes[movie]) for box in boxes]
        rows.append(Row(movie, second, corners, [], list(boxes.values())))
    return KeyFrames(rows, sizes, num_classes, labeled=False)


# Not a test, though pytest would take its name for one.
test_frames.__test__ = False  # type: ignore[attr-defined]


def movies_of(truth: str | Path) -> list[str]:
    """The movies that a ground truth names, sorted, those without boxes too. Raises DataError: it names none."""
    path = Path(truth)
    movies = sorted({row[0] for _, row in _lines(path, _TRUTH)})
    if not movies:
        raise DataError(f"{path} names no movie; give lines of {_TRUTH}")
    return movies


def count_frames(truth: str | Path) -> int:
    """Key frames with a box, without looking at their movies."""
    return len({tuple(row[:2]) for _, row in _rows(Path(truth), _TRUTH)})


def read_excluded(path: str | Path) -> set[Frame]:
    """Key frames that are not judged, one `movie,second` a line. Raises DataError: another line, its number named."""
    rows = list(_lines(Path(path), "`movie,second`"))
    for number, row in rows:
        if len(row) != 2 or not row[1].strip().isdecimal():
            raise _not_as(f"{path}, line {number}", row, "`movie,second`")
    return {(row[0], int(row[1])) for _, row in rows}


def _lines(path: Path, wanted: str) -> Iterable[tuple[int, list[str]]]:
    require_list(path, "CSV file", f"one with lines of {wanted}")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row:
                    yield number, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({error}); give lines of {wanted}") from error


def _rows(path: Path, wanted: str) -> Iterable[tuple[int, list[str]]]:
    """Lines with their numbers, without those that name a key frame alone."""
    return ((number, row) for number, row in _lines(path, wanted) if not (len(row) >= 2 and not any(row[2:])))


def _not_as(where: str, row: Sequence[str], wanted: str) -> DataError:
    return DataError(f"{where}: {','.join(row)[:200]!r} is not {wanted}")


def _known(where: str, movie: str, sizes: Mapping[str, Size]) -> None:
    if movie not in sizes:
        raise DataError(
            f"{where}: the size of movie {movie!r} is not known; it is missing below --root (train: --data.root) or is laid "
            "out otherwise than --movies (train: --clips.movies) says, or it cannot be read"
        )


def _pixels(corners: Sequence[float], size: Size) -> tuple[float, ...]:
    """Left, top, width, height in pixels of x1, y1, x2, y2 in shares; what stands behind those is not read."""
    x1, y1, x2, y2 = corners[:4]
    return x1 * size[0], y1 * size[1], (x2 - x1) * size[0], (y2 - y1) * size[1]
