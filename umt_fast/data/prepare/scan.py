"""`scan`: decodes every clip of a list once and writes a manifest, so that training knows true frame counts and no bad file.

The manifest is one JSON line per good clip in the list's order. Bad files go to `<manifest>.bad.jsonl` with reasons.
While it runs, results are appended to `<manifest>.partial`; a scan started again goes on from there.

A manifest holds the checksum of every clip. Training does not look at it, which would read each file as a whole; `verify`
does, for instance after files were copied to another machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from umt_fast.config import DataConfig
from umt_fast.data.decode import cuts
from umt_fast.data.decode.video import VideoError, announced_frames, iterate_frames, open_video, rate_of, rotation_of
from umt_fast.data.errors import DataError
from umt_fast.data.sources.lists import Clip, read_list
from umt_fast.extras import packages_of
from umt_fast.files import checksum, write_text
from umt_fast.workers import worker_pool

log = logging.getLogger("umt_fast.data")

# Clips between two progress lines.
_PROGRESS = 1000


def _files(clip: Clip, frame_pattern: str) -> list[Path]:
    if not clip.frame_folder:
        return [Path(clip.path)]
    return [Path(clip.path) / frame_pattern.format(number) for number in range(1, clip.num_frames + 1)]


def probe(clip: Clip, frame_pattern: str) -> Clip:
    """The clip with everything a full decode tells; notes one that is cut. Raises VideoError if nothing can be decoded."""
    if clip.frame_folder:
        return _probe_folder(clip, frame_pattern)
    if not Path(clip.path).exists():
        raise VideoError(f"{clip.path}: no such file")
    container, stream = open_video(clip.path)
    with container:
        rate = rate_of(stream)
        codec = stream.codec_context.name
    frames = keys = 0
    sizes = set()
    rotation, damage = 0, []
    for frame in iterate_frames(clip.path, damage.append):
        rotation = rotation_of(frame) if frames == 0 else rotation
        frames += 1
        keys += frame.key_frame
        sizes.add((frame.width, frame.height))
    if len(sizes) > 1:
        raise VideoError(f"{clip.path}: frames change size: {sorted(sizes)}")
    ((width, height),) = sizes
    announced, held = announced_frames(clip.path)
    if frames < announced and (damage or held < announced):
        cuts.note(clip.path, frames, announced)
    return replace(
        clip,
        num_frames=frames,
        rate=round(rate, 3),
        width=width,
        height=height,
        rotation=rotation,
        codec=codec,
        key_frame_spacing=round(frames / max(1, keys), 2),
        checksum=checksum([clip.path]),
    )


def _probe_folder(clip: Clip, frame_pattern: str) -> Clip:
    with packages_of("video"):
        from PIL import Image

    sizes = set()
    files = _files(clip, frame_pattern)
    for path in files:
        try:
            with Image.open(path) as picture:
                picture.load()
                sizes.add(picture.size)
        except OSError as error:
            raise VideoError(f"{path}: {error}") from error
    if len(sizes) > 1:
        raise VideoError(f"{clip.path}: frames change size: {sorted(sizes)}")
    ((width, height),) = sizes
    return replace(clip, width=width, height=height, codec="pictures", key_frame_spacing=1.0, checksum=checksum(files))


class _Probed(NamedTuple):
    """What was found of a clip: its manifest entry or why there is none; cut: what a cut one is called, else empty."""

    entry: dict | None
    reason: str = ""
    cut: str = ""


def _probe_one(work: tuple[int, Clip, str]) -> tuple[int, _Probed]:
    number, clip, frame_pattern = work
    try:
        with cuts.noted() as found:
            entry = asdict(probe(clip, frame_pattern))
        return number, _Probed(entry, cut=found[0] if found else "")
    except VideoError as error:
        return number, _Probed(None, str(error))
    except Exception as error:  # one odd file must not end a scan of a million
        return number, _Probed(None, f"{clip.path}: {type(error).__name__}: {error}")


def _journal(path: Path, clips: list[Clip]) -> dict[int, _Probed]:
    """Good clips of an interrupted scan that still belong to this list; bad ones are tried again."""
    done: dict[int, _Probed] = {}
    if not path.exists():
        return done
    for line in path.read_text().splitlines():
        try:
            number, name, *probed = json.loads(line)
            found = _Probed(*probed)
        except (ValueError, TypeError):  # the line being written when the scan was killed
            continue
        if number < len(clips) and clips[number].path == name and not found.reason:
            done[number] = found
    return done


def scan(list_path: str | Path, out: str | Path, *, workers: int = 4, data: DataConfig | None = None) -> dict[str, int]:
    """Scans a list into a manifest.

    Args:
        list_path: a list or an older manifest.
        out: manifest to write. Paths in it are absolute.
        workers: processes; 0 decodes in this one.
        data: separator, root and frame pattern of the list.

    Returns:
        {"good": ..., "bad": ..., "cut": ..., "resumed": ...} clip counts; good ones that are cut in the middle are named in
        the log, and stand in the manifest with the frames that decode.

    Raises:
        DataError: an unusable list, no good clip at all, or a decoding process that was killed.
    """
    data, out = data or DataConfig(), Path(out)
    clips = read_list(list_path, data)
    if any(clip.shard for clip in clips):
        raise DataError(f"{list_path} holds prepared clips; check them with `prepare` and --verify")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror} ({error.filename}); give another --out") from error
    partial = out.with_name(out.name + ".partial")
    done = _journal(partial, clips)
    resumed = len(done)
    if resumed:
        log.info("scan: %d of %d clips were scanned before", resumed, len(clips))
    work = [(number, clip, data.frame_pattern) for number, clip in enumerate(clips) if number not in done]
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(open(partial, "a"))
        pool = stack.enter_context(worker_pool(workers, __name__)) if workers else None
        results = pool.map(_probe_one, work, chunksize=4) if pool else map(_probe_one, work)
        journal.write("\n" if resumed else "")  # ends a line cut short by a kill
        try:
            for count, (number, found) in enumerate(results, resumed + 1):
                done[number] = found
                journal.write(json.dumps([number, clips[number].path, *found]) + "\n")
                journal.flush()
                if found.reason:
                    log.warning("bad clip: %s", found.reason)
                elif found.cut:
                    log.warning("cut clip: %s", found.cut)
                if count % _PROGRESS == 0:
                    log.info("scan: %d of %d clips", count, len(clips))
        except BrokenProcessPool as error:
            raise DataError("a scanning process was killed; run the same command again, it continues") from error
    good = [Clip(**found.entry).to_json() for _, found in sorted(done.items()) if found.entry is not None]
    bad = [
        json.dumps({"path": clips[number].path, "reason": found.reason})
        for number, found in sorted(done.items())
        if found.entry is None
    ]
    cut = sum(bool(found.cut) for found in done.values())
    write_text(out.with_name(out.name + ".bad.jsonl"), (f"{line}\n" for line in bad))
    if not good:
        raise DataError(f"none of the {len(clips)} clips of {list_path} can be read; reasons in {out}.bad.jsonl")
    write_text(out, (f"{line}\n" for line in good))
    partial.unlink()
    log.info("scan: %d good clips in %s, %d bad ones in %s.bad.jsonl", len(good), out, len(bad), out)
    if cut:
        log.warning(
            "scan: %d of the good clips are cut in the middle and are trained on as far as they decode; fetch them again, or "
            "leave them out",
            cut,
        )
    return {"good": len(good), "bad": len(bad), "cut": cut, "resumed": resumed}


def _differs(work: tuple[Clip, str]) -> str:
    """Why the files of a clip are not those that were scanned; empty: they are."""
    clip, frame_pattern = work
    try:
        return (
            "" if checksum(_files(clip, frame_pattern)) == clip.checksum else f"{clip.path}: other bytes than scanned"
        )
    except OSError as error:
        return f"{error.filename or clip.path}: {error.strerror}"


def verify(manifest: str | Path, *, workers: int = 4, data: DataConfig | None = None) -> int:
    """Reads every file of a manifest against its checksum; how many clips are good. Each other one is logged.

    Args:
        manifest: written by `scan`.
        workers: reading processes; 0 reads in this one.
        data: root and frame pattern.

    Raises:
        DataError: files that are missing or not as they were scanned (counted), no manifest, or entries without a checksum.
    """
    data = data or DataConfig()
    clips = read_list(manifest, data)
    if any(clip.shard for clip in clips):
        raise DataError(f"{manifest} holds prepared clips; check them with `prepare` and --verify")
    bare = sum(not clip.checksum for clip in clips)
    if bare:
        raise DataError(
            f"{manifest} has no checksum for {bare} of {len(clips)} clips; write a manifest of it: `scan {manifest} --out FILE`"
        )
    work = [(clip, data.frame_pattern) for clip in clips]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(worker_pool(workers, __name__)) if workers else None
        try:
            found = [
                reason for reason in (pool.map(_differs, work, chunksize=16) if pool else map(_differs, work)) if reason
            ]
        except BrokenProcessPool as error:
            raise DataError("a reading process was killed; run the same command again") from error
    for reason in found:
        log.warning("bad clip: %s", reason)
    if found:
        raise DataError(
            f"{len(found)} of the {len(clips)} clips of {manifest} are not as they were scanned, the first: {found[0]}; fetch "
            "them again, or `scan` the list again"
        )
    log.info("scan: %d clips verified", len(clips))
    return len(clips)
