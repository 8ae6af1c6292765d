"""`prepare`: decodes every clip of a list once and packs candidate frames into shards (`prepared` has the format).

Shards are written in the list's order whatever the number of processes. While one grows, its files end in `.writing`; a run
that was killed goes on after the last whole record, and ends with the same bytes as one that was not. Bad clips are tried again
by every run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.decode import cuts
from umt_fast.data.decode.video import VideoError, decode_frames, read_frame_folder
from umt_fast.data.errors import DataError
from umt_fast.data.sources.entries import is_sqlite
from umt_fast.data.sources.lists import Clip, read_list
from umt_fast.data.sources.prepared import Settings, candidates, index_lines, pack, part_of, read_part
from umt_fast.files import LockedError, checksum, lock, put, write_json, write_text
from umt_fast.workers import worker_pool

log = logging.getLogger("umt_fast.data")

# Seconds between two progress lines.
_PROGRESS = 30.0


def clips_of(list_path: str | Path, data: DataConfig) -> tuple[list[Clip], str]:
    """The clips of any list training reads (labels, manifest or captions), each file once; in words what that leaves out."""
    path = Path(list_path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; prepare needs a list of clips")
    if path.suffix == ".json" or is_sqlite(path):
        from umt_fast.data.sources.captions import read_captions  # brings torch

        clips = read_captions(path, data.root).clips
    else:
        clips = read_list(path, data)
    first: dict[str, Clip] = {}
    others: dict[str, int] = {}
    for clip in clips:
        if clip.member:
            raise DataError(f"{path} names tar files; prepare packs files of their own, tar files are read as they are")
        name = os.path.abspath(clip.path)
        if first.setdefault(name, clip).label != clip.label:
            others.setdefault(name, clip.label)
    said = f"{len(clips)} rows name {len(first)} files, each is packed once" if len(clips) > len(first) else ""
    if others:
        name, label = next(iter(others.items()))
        said += (
            f"; of {len(others)} files with several labels the first is kept (the first: {name}, {first[name].label} and not "
            f"{label}); to train on all rows keep {path} as data.train and give the folder as data.prepared"
        )
    return list(first.values()), said


def record_of(number: int, clip: Clip, settings: Settings, frame_pattern: str) -> tuple[bytes, int]:
    """A clip's record and how many frames it stores. Raises VideoError."""
    asked: list[tuple[int, np.ndarray]] = []

    def choose(count: int) -> np.ndarray:
        asked.append((count, candidates(count, settings, np.random.default_rng((settings.seed, number)))))
        return asked[-1][1]

    if clip.frame_folder:
        if settings.max_seconds:
            raise VideoError(f"{clip.path}: a folder of pictures has no frame rate, which --max_seconds needs")
        frames = read_frame_folder(clip.path, choose, clip.num_frames, frame_pattern)
    elif not Path(clip.path).exists():
        raise VideoError(f"{clip.path}: no such file")
    else:
        frames = decode_frames(clip.path, choose, clip.num_frames or None, settings.max_seconds)
    count, numbers = asked[-1]
    return pack(frames, numbers, count, settings), len(numbers)


def _one(number: int, clip: Clip, settings: Settings, frame_pattern: str) -> tuple[dict[str, Any], bytes]:
    line = {"number": number, "path": os.path.abspath(clip.path), "label": clip.label}
    try:
        with cuts.noted() as found:
            record, stored = record_of(number, clip, settings, frame_pattern)
    except VideoError as error:
        return line | {"reason": str(error)}, b""
    except Exception as error:  # one odd file must not end a preparation of a million
        return line | {"reason": f"{clip.path}: {type(error).__name__}: {error}"}, b""
    line |= {"num_frames": stored, "size": len(record), "checksum": checksum(record)}
    return line | ({"cut": found[-1]} if found else {}), record


def _results(
    work: list[tuple[int, Clip]], settings: Settings, frame_pattern: str, workers: int
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """What `_one` gives for each clip, in order; only a few clips are under way at a time."""
    if not workers:
        yield from (_one(number, clip, settings, frame_pattern) for number, clip in work)
        return
    with worker_pool(workers, __name__) as pool:
        under_way: deque[Future] = deque()
        try:
            for number, clip in work:
                under_way.append(pool.submit(_one, number, clip, settings, frame_pattern))
                if len(under_way) > 4 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a preparing process was killed; run the same command again, it continues") from error


class _Shard:
    """The shard being written; opened again it continues after its last whole record."""

    def __init__(self, index: Path) -> None:
        self.index, self.clips = index, index.with_suffix(".clips")
        self.numbers: set[int] = set()
        data_path, index_path = (path.with_name(path.name + ".writing") for path in (self.clips, self.index))
        if index_path.exists() and not data_path.exists() and self.clips.exists():
            # Killed between the two renames that end a shard.
            put(self.clips, data_path)
        self.data = open(data_path, "a+b")
        self.journal = open(index_path, "a+b")
        self._recover()

    def _recover(self) -> None:
        self.journal.seek(0)
        self.data.seek(0)
        kept = self.size = 0
        for text in self.journal.readlines():
            try:
                line = json.loads(text)
                whole = text.endswith(b"\n")
            except ValueError:
                break
            if whole and "reason" not in line:
                whole = line["offset"] == self.size and checksum(self.data.read(line["size"])) == line["checksum"]
                self.numbers |= {line["number"]} if whole else set()
            if not whole:
                break
            kept += len(text)
            self.size += line.get("size", 0)
        self.journal.truncate(kept)
        self.data.truncate(self.size)

    def add(self, line: dict[str, Any], record: bytes) -> None:
        line = line | {"offset": self.size}
        self.data.write(record)
        self.data.flush()
        self.size += len(record)
        self.journal.write((json.dumps(line) + "\n").encode())
        self.journal.flush()
        self.numbers.add(line["number"])

    def close(self) -> None:
        """Makes it final: the records first, then the index that names them. A shard without a clip leaves nothing."""
        for file, path in ((self.data, self.clips), (self.journal, self.index)):
            file.close()
            if self.numbers:
                put(Path(file.name), path)
            else:
                os.unlink(file.name)


def _begin(part: Path, content: dict[str, Any]) -> None:
    """Writes the settings of a part, not finished; one begun before must have had the same."""
    if part.exists():
        known = read_part(part)
        for key in ("list", "clips", "settings"):
            if known[key] != content[key]:
                raise DataError(
                    f"{part.parent} was begun with another list or other settings ({key}: {known[key]}); "
                    "repeat them or give another --out"
                )
    write_json(part, content | {"settings": asdict(content["settings"])}, indent=1)


def prepare(
    list_path: str | Path,
    out: str | Path,
    *,
    settings: Settings | None = None,
    part: tuple[int, int] = (0, 1),
    shard_bytes: int = 1 << 30,
    workers: int = 4,
    data: DataConfig | None = None,
) -> dict[str, int]:
    """Prepares one part of a list, or goes on with it.

    Args:
        list_path: a list with labels, a manifest or a caption list.
        out: folder for all parts.
        part: (i, n): every n-th clip from the i-th on.
        shard_bytes: a shard is closed once it is this large.
        workers: decoding processes; 0 decodes in this one.
        data: separator, root and frame pattern of the list.

    Returns:
        {"good": ..., "bad": ..., "resumed": ..., "bytes": ...} of this part.

    Raises:
        DataError: an unusable list, a folder of other settings, no good clip, a decoding process that was killed.
    """
    data, settings, out = data or DataConfig(), settings or Settings(), Path(out)
    if shard_bytes < 1:
        raise DataError(f"--shard_mib makes shards of {shard_bytes} bytes; give at least 1 MiB")
    if not 0 <= part[0] < part[1]:
        raise DataError(f"--shard is {part[0]}/{part[1]}; give i/n with i from 0 to n - 1")
    clips, repeats = clips_of(list_path, data)
    if part[0] >= len(clips):
        raise DataError(f"--shard {part[0]}/{part[1]} has no clip: {list_path} holds {len(clips)}; use fewer parts")
    out.mkdir(parents=True, exist_ok=True)
    home = part_of(out, *part)
    names = "\n".join(f"{clip.path}\t{clip.label}" for clip in clips)
    content = {
        "list": checksum(names.encode()),
        "clips": len(clips),
        "parts": part[1],
        "settings": settings,
        "finished": None,
    }
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(home.with_suffix(".lock")))
        except LockedError as error:
            raise DataError(f"another process is preparing {home.stem} in {out}") from error
        _begin(home, content)
        resumed, bad = _write_part(home, clips, part, settings, data.frame_pattern, shard_bytes, workers)
        sizes = [line["size"] for _, line in index_lines(home)]
        counts = {"good": len(sizes), "bad": len(bad), "bytes": sum(sizes)}
        write_text(home.with_suffix(".bad.jsonl"), (json.dumps(line) + "\n" for line in bad))
        write_json(home, content | {"settings": asdict(settings), "finished": counts}, indent=1)
    kinds = Counter(line["reason"].removeprefix(line["path"]).lstrip(": ") for line in bad)
    for reason, count in kinds.most_common(5):
        log.info("prepare: %d bad: %s", count, reason)
    log.info(
        "prepare: %d good clips, %d bad ones, %.1f MB in %s", counts["good"], counts["bad"], counts["bytes"] / 1e6, out
    )
    if repeats:
        log.info("prepare: %s", repeats)
    if not counts["good"]:
        raise DataError(f"none of the {counts['bad']} clips can be read; reasons in {home.with_suffix('.bad.jsonl')}")
    return counts | {"resumed": resumed}


def _write_part(
    home: Path,
    clips: list[Clip],
    part: tuple[int, int],
    settings: Settings,
    frame_pattern: str,
    shard_bytes: int,
    workers: int,
) -> tuple[int, list[dict[str, Any]]]:
    """Writes what a part still lacks; how many clips were there before, and the bad ones with their reasons."""
    used = [int(index.stem.rsplit("-", 1)[1]) for index in home.parent.glob(f"{home.stem}-*.jsonl")]
    shards = (_Shard(home.with_name(f"{home.stem}-{n:05d}.jsonl")) for n in itertools.count(max(used, default=-1) + 1))
    shard = next(shards)
    done = {line["number"] for _, line in index_lines(home)} | shard.numbers
    work = [(number, clips[number]) for number in range(part[0], len(clips), part[1]) if number not in done]
    if done:
        log.info("prepare: %d clips were prepared before", len(done))
    said, bad, cut = time.monotonic(), [], 0
    for count, (line, record) in enumerate(_results(work, settings, frame_pattern, workers), 1):
        if "reason" in line:
            log.warning("bad clip: %s", line["reason"])
            bad.append(line)
        else:
            reason = line.pop("cut", "")
            if reason:
                log.warning("cut clip: %s", reason)
                cut += 1
            if shard.size >= shard_bytes:
                shard.close()
                shard = next(shards)
            shard.add(line, record)
        if time.monotonic() - said > _PROGRESS:
            said = time.monotonic()
            log.info("prepare: %d of %d clips", count + len(done), len(work) + len(done))
    shard.close()
    if cut:
        log.warning("prepare: %d clips are cut in the middle; candidates are of the frames that decode", cut)
    return len(done), bad


def verify(folder: str | Path) -> int:
    """Reads every record of a folder against its checksum; the number of good ones. Raises DataError at damaged ones."""
    damaged: Counter[str] = Counter()
    good = 0
    for part in sorted(Path(folder).glob("part-*-of-*.json")):
        for shard, line in index_lines(part):
            try:
                with open(shard, "rb") as file:
                    file.seek(line["offset"])
                    whole = checksum(file.read(line["size"])) == line["checksum"]
            except OSError:
                whole = False
            good += whole
            damaged[shard.name] += not whole
    broken = [f"{name} ({count} clips)" for name, count in sorted(damaged.items()) if count]
    if broken:
        raise DataError(
            f"{folder}: damaged: {', '.join(broken)}; delete each with its .jsonl and run prepare again, "
            "it makes their clips anew"
        )
    log.info("prepare: %d clips verified", good)
    return good
