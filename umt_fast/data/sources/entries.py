"""Entries of caption lists, one after another: the official .json and SQLite layouts, and tar files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import Clip, require_list
from umt_fast.data.sources.json_lists import json_list, shortened
from umt_fast.data.sources.tars import read_tars

_LAYOUT = '{"video" or "image": name, "caption": text}'


class Entry(NamedTuple):
    place: str
    """What messages call it."""
    clips: list[Clip]
    captions: list[str]
    """As they are written. Each describes each of the clips."""


def is_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite file, as caption lists may be."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(15) == b"SQLite format 3"


def read_entries(source: str | Path, root: str = "", workers: int = 4) -> Iterator[Entry]:
    """The entries of a caption list.

    Args:
        source: a .json list of {"video" or "image": name or list of names, "caption": text or list of texts}, an SQLite
            file with a table `annos` (id, filename, caption), or tar files: a name or a pattern, see data.tars.
        root: folder put before relative names; empty: the list's own folder. Not for tar files.
        workers: processes that index tar files.

    Raises:
        DataError: no such file, not such a list, an entry without a name or caption or with one of another type.
    """
    if str(source).endswith(".tar"):
        if root:
            raise DataError(f"{source}={root}: tar files hold their pictures and clips; leave the folder out")
        for clip, caption in read_tars(str(source), workers):
            yield Entry(clip.name, [clip], [caption])
        return
    path = Path(source)
    require_list(path, "caption list", "a .json list, an SQLite file with a table `annos`, or a pattern of tar files")
    base = str(Path(root) if root else path.resolve().parent)
    for place, names, captions in _json_rows(path) if path.suffix == ".json" else _sqlite_rows(path):
        yield Entry(place, [Clip(path=f"{base}/{name}" if name[0] != "/" else name) for name in names], captions)


def _json_rows(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for number, entry in enumerate(json_list(path, _LAYOUT)):
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: it is {shortened(entry)}; expected {_LAYOUT}")
        key = "image" if entry.get("video") is None else "video"
        yield place, _texts(place, entry, key), _texts(place, entry, "caption")


def _texts(place: str, entry: dict[str, Any], key: str) -> list[str]:
    if entry.get(key) is None:
        missing = '"caption"' if key == "caption" else '"video" or "image"'
        raise DataError(f"{place} has no {missing}: {shortened(entry)}; expected {_LAYOUT}")
    value = entry[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{place}: "{key}" is {shortened(value)}; it must be a text or a list of texts')
    if key != "caption" and not (texts and all(texts)):
        raise DataError(f'{place}: "{key}" is {shortened(value)}; it must name a file')
    return texts


def _sqlite_rows(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as base:
            rows = base.execute("SELECT id, filename, caption FROM annos ORDER BY id")
            for number, name, caption in rows:
                place = f"{path}, row with id {number}"
                if not isinstance(name, str) or not name:
                    raise DataError(f"{place}: filename is {name!r}; it must name a file")
                if not isinstance(caption, str):
                    raise DataError(f"{place}: caption is {caption!r}; it must be a text")
                yield place, [name], [caption]
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is neither .json nor an SQLite file with a table `annos` ({error})") from error
