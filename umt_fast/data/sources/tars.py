"""Captioned pictures and clips in tar files (webdataset's layout), read in any order by their place in the file.

Members of one base name belong together: `00042.jpg` and its caption `00042.txt`, or `00042.json` with a "caption". Each tar
is gone through once; where its members begin is kept beside it in `NAME.tar.index.json`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import Clip
from umt_fast.files import WriteError, write_json
from umt_fast.workers import worker_pool

log = logging.getLogger("umt_fast.data")

_MEDIA = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".mp4", ".webm", ".mkv", ".mov", ".avi"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_VERSION = 1
_NO_BLOCK = bytes(tarfile.BLOCKSIZE)


def expand(pattern: str) -> list[str]:
    """`cc12m/{00000..01242}.tar` as the names it stands for; each pair of braces counts up, keeping leading zeros.

    Raises DataError: a range that counts down.
    """
    found = _RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first):
        raise DataError(f"{pattern}: the range {found[0]} counts down; write {{{last}..{first}}}")
    tails = expand(pattern[found.end() :])
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + number + tail for number in numbers for tail in tails]


def read_tars(pattern: str, workers: int) -> Iterator[tuple[Clip, str]]:
    """The clips (or pictures) and captions of the tars of a pattern, in the order of the names, then of the members.

    Tars without an index get one first, `workers` at a time.

    Raises:
        DataError: tars that are missing or damaged; all are counted, the first is named with its reason.
    """
    tars = expand(pattern)
    _make_indices(tars, workers)
    left_out = 0
    for tar in tars:
        index = _stored(tar) or _index(tar)
        left_out += index["left_out"]
        for member, offset, size, caption in index["samples"]:
            yield Clip(path=tar, member=member, offset=offset, size=size), caption
    if left_out:
        log.warning("%s: left out %d samples that lack a picture, a clip or a caption", pattern, left_out)


@contextlib.contextmanager
def extracted(clip: Clip) -> Iterator[str]:
    """A path under which a tar's member opens like a file of its own; it lies in memory. Raises VideoError."""
    handle = os.memfd_create("clip")
    path = f"/proc/self/fd/{handle}"
    try:
        with open(clip.path, "rb") as tar, open(handle, "wb", closefd=False) as copy:
            if copy.write(os.pread(tar.fileno(), clip.size, clip.offset)) < clip.size:
                raise VideoError(f"{clip.name}: the tar file ends before it does")
        yield path
    except OSError as error:
        raise VideoError(f"{clip.name}: {error.strerror}") from error
    except VideoError as error:
        raise VideoError(str(error).replace(path, clip.name)) from error
    finally:
        os.close(handle)


def _index_path(tar: str) -> Path:
    return Path(tar + ".index.json")


def _stored(tar: str) -> dict[str, Any] | None:
    """The index beside a tar, if it was made of the file as it is now."""
    try:
        index = json.loads(_index_path(tar).read_text())
        state = os.stat(tar)
    except (OSError, ValueError):
        return None
    made_of = (index.get("version"), index.get("tar_bytes"), index.get("tar_mtime_ns"))
    return index if made_of == (_VERSION, state.st_size, state.st_mtime_ns) else None


def _index(tar: str) -> dict[str, Any]:
    """Goes through a tar: {"samples": [[member, offset, size, caption], ...], "left_out": count} and what it was made of.

    Raises tarfile.TarError or OSError for a tar that is not whole.
    """
    state = os.stat(tar)
    if not stat.S_ISREG(state.st_mode):
        raise tarfile.ReadError("it is no regular file")
    media: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, str | None] = {}
    with tarfile.open(tar, "r:") as file:
        for member in file:
            folder, name = os.path.split(member.name)
            base, dot, suffix = name.partition(".")
            key, suffix = os.path.join(folder, base), (dot + suffix).lower()
            if not member.isreg():
                continue
            if suffix in _MEDIA:
                media.setdefault(key, (member.name, member.offset_data, member.size))
            elif suffix == ".txt" or (suffix == ".json" and key not in captions):
                captions[key] = _caption(file.extractfile(member).read(), suffix)
        # tarfile takes a broken header for the end.
        file.fileobj.seek(file.offset)
        if file.fileobj.read(tarfile.BLOCKSIZE) != _NO_BLOCK:
            raise tarfile.ReadError(f"cut short or broken at byte {file.offset}")
    samples = [[*place, captions[key]] for key, place in media.items() if captions.get(key) is not None]
    return {
        "version": _VERSION,
        "tar_bytes": state.st_size,
        "tar_mtime_ns": state.st_mtime_ns,
        "left_out": len(media.keys() | captions.keys()) - len(samples),
        "samples": samples,
    }


def _caption(content: bytes, suffix: str) -> str | None:
    if suffix == ".txt":
        return content.decode("utf-8", "replace")
    try:
        caption = json.loads(content)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return caption if isinstance(caption, str) else None


def _make_index(tar: str) -> tuple[str, str]:
    """Leaves the index of a tar beside it; what is wrong with the tar, and why the index could not be written."""
    if _stored(tar):  # another rank was faster
        return "", ""
    try:
        index = _index(tar)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return f"{tar}: {getattr(error, 'strerror', None) or error}", ""
    try:
        write_json(_index_path(tar), index, shared=True)
    except WriteError as error:
        return "", str(error)
    return "", ""


def _make_indices(tars: list[str], workers: int) -> None:
    todo = [tar for tar in tars if not _stored(tar)]
    if not todo:
        return
    log.info("indexing %d of %d tar files", len(todo), len(tars))
    # Ranks begin at different places and so do each other's work.
    start = os.getpid() % len(todo)
    todo = todo[start:] + todo[:start]
    if workers < 2 or len(todo) < 2:
        done = [_make_index(tar) for tar in todo]
    else:
        try:
            with worker_pool(min(workers, len(todo)), __name__) as pool:
                done = list(pool.map(_make_index, todo))
        except BrokenProcessPool as error:
            raise DataError("an indexing process was killed; run the same command again, it continues") from error
    damaged = sorted(reason for reason, _ in done if reason)
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(tars)} tar files cannot be used; {damaged[0]}. "
            "Fetch them again, or leave them out of the pattern"
        )
    unwritten = sorted(reason for _, reason in done if reason)
    if unwritten:
        log.warning(
            "%d indices of tar files could not be written (%s): they are made anew at every start",
            len(unwritten),
            unwritten[0],
        )
