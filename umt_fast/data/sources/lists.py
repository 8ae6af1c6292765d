"""Lists of clips: the official CSV (path, label), frame-folder lists (path, frames, label), and our JSON-lines manifest."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import Clip, require_list
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.entries import is_sqlite

__all__ = ["Clip", "DataError", "check_labels", "read_list"]

_COUNT = re.compile(r"\s*[0-9]{1,18}\s*")


def read_list(path: str | Path, data: DataConfig) -> Clips:
    """The clips of a list, manifest or prepared folder, in its order; paths start at data.root or at the list's folder.

    Raises DataError: no such file, an empty list, a malformed line (its number and text are named).
    """
    path = Path(path)
    if path.is_dir():
        from umt_fast.data.sources.prepared import read_folder  # builds on this module

        if data.root:
            raise DataError(
                f"{path} is a folder, whose clips `prepare` packed into it, and {data.root} would not be read; leave out "
                "--root (train: --data.root)"
            )
        return read_folder(path)
    require_list(path, "list", f"a file with one video per line (path{data.separator}label)")
    if data.root and not Path(data.root).is_dir():
        raise DataError(f"{data.root} is not a folder; give one as --root (train: --data.root), or leave it out")
    root = Path(data.root) if data.root else path.resolve().parent
    if path.suffix == ".tar" or is_sqlite(path):
        raise _captions(path)
    # Not splitlines(), which also ends lines at characters that a path may hold.
    lines = _text(path).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} is empty; it needs one video per line (path{data.separator}label)")
    begins = numbered[0][1].lstrip()[0]
    if path.suffix == ".json" and begins == "[":
        raise _captions(path)
    parse = _parse_manifest_line if begins == "{" else _parse_line
    try:
        return Clips.of(parse(path, number, line, root, data.separator) for number, line in numbered)
    except OverflowError as error:
        raise DataError(f"{path} holds a number beyond 64 bits; labels and counts must fit into them") from error


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(
            f"{path} is not UTF-8 text; give a list or a manifest, not a video (`iconv -f UTF-16 -t UTF-8` converts lists that "
            'were saved as "Unicode")'
        )
    return text


def _captions(path: Path) -> DataError:
    return DataError(
        f"{path} holds captions, and a list of one path and label per line is needed here; captions are for training in "
        f"stage 2 (--videos {path}), for `prepare`, and for `eval` of a stage-2 checkpoint"
    )


def check_labels(
    clips: Clips, num_classes: int, source: str, remedy: str = "correct the list or set num_classes"
) -> None:
    """Raises DataError where a label is no class."""
    outside = sorted(label for label in clips.values("label") if not 0 <= label < num_classes)
    if outside:
        rows = clips.count("label", outside)
        raise DataError(
            f"{source}: the labels of {rows} of its {len(clips)} clips lie outside 0 to {num_classes - 1}, the lowest is "
            f"{outside[0]}; {remedy}"
        )


def _resolve(root: Path, name: str) -> str:
    return name if Path(name).is_absolute() else str(root / name)


def _parse_manifest_line(path: Path, number: int, line: str, root: Path, separator: str) -> Clip:
    try:
        entry = json.loads(line)
        kinds = {field.name: str if field.default is MISSING else type(field.default) for field in fields(Clip)}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError("it has no path")
        if set(entry) - set(kinds):
            raise ValueError(f"unknown fields {sorted(set(entry) - set(kinds))}")
        for name, value in entry.items():
            if not isinstance(value, (int, float) if kinds[name] is float else kinds[name]):
                raise ValueError(f"{name} is {value!r}; it must be of type {kinds[name].__name__}")
        return Clip(**(entry | {"path": _resolve(root, entry["path"])}))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not a manifest entry ({error}): {line[:200]}") from error


def _parse_line(path: Path, number: int, line: str, root: Path, separator: str) -> Clip:
    # From the right, so that a path may contain the separator; a path is taken as it is written, blanks and all.
    parts = line.rstrip().rsplit(separator, 2)
    if len(parts) < 2:
        raise DataError(
            f"{path}, line {number}: no separator {separator!r} in {line[:200]!r}; "
            "expected path and label; for another separator set --separator (train: --data.separator)"
        )
    name, label, frames = separator.join(parts[:-1]), parts[-1].strip(), 0
    # Three fields mean path, frame count, label; a path that merely contains the separator has no bare number there.
    if len(parts) == 3 and _COUNT.fullmatch(parts[1]):
        name, frames = parts[0], int(parts[1])
    try:
        label_number = int(label)
    except ValueError as error:
        raise DataError(
            f"{path}, line {number}: the label {label[:50]!r} is not a whole number in {line[:200]!r}"
        ) from error
    if not name.strip():
        raise DataError(f"{path}, line {number}: no path in {line[:200]!r}")
    resolved = _resolve(root, name)
    return Clip(path=resolved, label=label_number, num_frames=frames, frame_folder=frames > 0)
