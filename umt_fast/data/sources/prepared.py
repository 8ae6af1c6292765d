"""Prepared clips: a few candidate frames of each as JPEGs, packed in shard files, read instead of the videos.

A folder of them holds, for each part i of n (`prepare --shard i/n`):

- `part-i-of-n.json`: the settings, and once finished the counts.
- `part-i-of-n-00000.clips`, ...: records one after another. A record is three little-endian uint32 (stored frames, frames
  of the source, 0), then per stored frame three more (its number in the source, bytes, CRC-32), then the JPEGs.
- `part-i-of-n-00000.jsonl`, ...: a line per record: its clip's number in the list, path and label, and its offset, size,
  num_frames (stored) and checksum (BLAKE2b-128).
- `part-i-of-n.bad.jsonl`: the clips that could not be read, with reasons.

Parts made on several machines need only be put into one folder.
"""

from __future__ import annotations

import io
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.decode.sampling import intervals
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.columns import Clips, ClipsBuilder
from umt_fast.extras import packages_of

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("umt_fast.data")

StoredChooser = Callable[[int, int], np.ndarray]
"""(stored frames, frames of the source) -> T numbers of stored frames."""

_HEAD = 12
_ENTRY = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a prepared clip holds."""

    segments: int = 8
    per_segment: int = 3
    """Candidate frames of each of the `segments` equal segments; a clip with no more frames than that is kept whole."""
    short_side: int = 256
    """Larger frames are shrunk to this short side, in pixels; smaller ones stay."""
    quality: int = 90
    """Of the JPEGs, as Pillow counts, 4:2:0."""
    seed: int = 0
    sampling: str = "sparse"
    """The data.sampling that candidates are for, `sparse` or `intervals`."""
    max_seconds: float = 0.0
    """Candidates of the first so many seconds of a clip; 0: of all of it. As data.max_seconds."""

    def __post_init__(self) -> None:
        if self.sampling not in ("sparse", "intervals"):
            raise DataError(
                f"prepare: sampling is {self.sampling!r}; it must be sparse or intervals (dense: train on the files)"
            )
        if not 0 <= self.max_seconds < float("inf"):
            raise DataError(f"prepare: max_seconds is {self.max_seconds}; it must be finite and not negative")
        for name in ("segments", "per_segment", "short_side"):
            if getattr(self, name) < 1:
                raise DataError(f"prepare: {name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise DataError(f"prepare: quality is {self.quality}; it must lie in 1 to 100")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"prepare: seed is {self.seed}; it must lie in [0, 2^63)")


def candidates(num_frames: int, settings: Settings, rng: np.random.Generator) -> np.ndarray:
    """Frame numbers to keep, ascending: in each official segment (for `intervals`: in what an interval may give) one random
    frame of each of `per_segment` equal stretches.

    Training then draws one of `per_segment` candidates per segment. Over preparations and draws together every frame of a
    segment is as likely as with the file (up to stretches that differ by one frame); for one preparation a clip has
    per_segment ** segments selections instead of length ** segments. A clip of at most segments * per_segment frames is
    kept whole and sampled as from its file; for `intervals` a few more, since an interval never gives its last frame.
    """
    if settings.sampling == "intervals":
        first, last = intervals(num_frames, settings.segments)
        if len(first) < settings.segments or (last - first < settings.per_segment).any():
            return np.arange(num_frames)
        edges = first[:, None] + np.arange(settings.per_segment + 1) * (last - first)[:, None] // settings.per_segment
        return rng.integers(edges[:, :-1], edges[:, 1:]).ravel()
    if num_frames <= settings.segments * settings.per_segment:
        return np.arange(num_frames)
    length = num_frames // settings.segments
    edges = np.arange(settings.per_segment + 1) * length // settings.per_segment
    offsets = rng.integers(edges[:-1], edges[1:], size=(settings.segments, settings.per_segment))
    return (np.arange(settings.segments)[:, None] * length + offsets).ravel()


def pack(frames: np.ndarray, numbers: np.ndarray, source_frames: int, settings: Settings) -> bytes:
    """The record of some frames, uint8 (K, H, W, 3), that are the given numbers of their source."""
    with packages_of("video"):
        from PIL import Image

    height, width = frames.shape[1:3]
    scale = settings.short_side / min(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = []
    for frame in frames:
        picture = Image.fromarray(frame)
        picture = picture.resize(size, Image.Resampling.BICUBIC) if scale < 1 else picture
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=settings.quality, subsampling="4:2:0")
        pictures.append(buffer.getvalue())
    head = [len(pictures), source_frames, 0]
    for number, picture in zip(numbers.tolist(), pictures, strict=True):
        head += [number, len(picture), zlib.crc32(picture)]
    return np.array(head, "<u4").tobytes() + b"".join(pictures)


def read_record(clip: Clip) -> bytes:
    """A prepared clip's record. Raises VideoError where the shard is missing or too short."""
    try:
        with open(clip.shard, "rb", buffering=0) as file:
            file.seek(clip.offset)
            record = file.read(clip.size)
    except OSError as error:
        raise VideoError(f"{clip.path}: {clip.shard}: {error.strerror}") from error
    if len(record) < clip.size:
        raise VideoError(f"{clip.path}: {clip.shard} ends inside it; run `prepare` with --verify")
    return record


def jpegs_of(clip: Clip, choose: StoredChooser) -> dict[int, bytes]:
    """The chosen stored frames by number, still encoded, each checked. Raises VideoError."""
    record = read_record(clip)
    count = int.from_bytes(record[:4], "little")
    first = _HEAD + _ENTRY * count
    if count < 1 or first > len(record):
        raise VideoError(f"{clip.path}: damaged in {clip.shard}; run `prepare` with --verify")
    table = np.frombuffer(record, "<u4", 3 * count, _HEAD).reshape(count, 3).astype(np.int64)
    ends = first + np.cumsum(table[:, 1])
    found = {}
    for number in choose(count, int.from_bytes(record[4:8], "little")).tolist():
        jpeg = record[ends[number] - table[number, 1] : ends[number]]
        if zlib.crc32(jpeg) != table[number, 2]:
            raise VideoError(f"{clip.path}: damaged in {clip.shard}; run `prepare` with --verify")
        found[number] = jpeg
    return found


def read_prepared(clip: Clip, choose: StoredChooser) -> list[Image.Image]:
    """The T chosen stored frames, decoded, as RGB. Raises VideoError."""
    with packages_of("video"):
        from PIL import Image

    chosen: list[int] = []

    def remember(stored: int, source: int) -> np.ndarray:
        chosen[:] = choose(stored, source).tolist()
        return np.array(chosen)

    pictures = {}
    for number, jpeg in jpegs_of(clip, remember).items():
        try:
            pictures[number] = Image.open(io.BytesIO(jpeg)).convert("RGB")
        except OSError as error:
            raise VideoError(f"{clip.path}: {clip.shard}: {error}") from error
    return [pictures[number] for number in chosen]


def part_of(folder: Path, number: int, parts: int) -> Path:
    """The settings file of a part."""
    return folder / f"part-{number}-of-{parts}.json"


def read_part(path: Path) -> dict[str, Any]:
    """The content of a settings file. Raises DataError: not one."""
    try:
        content = json.loads(path.read_text())
        return content | {"settings": Settings(**content["settings"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} was not written by `prepare` ({error})") from error


def index_lines(part: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(shard, line) of every clip that a part holds. Raises DataError where a line is damaged."""
    for index in sorted(part.parent.glob(f"{part.stem}-*.jsonl")):
        for number, text in enumerate(index.read_text(errors="replace").splitlines(), 1):
            try:
                line = json.loads(text)
                if "reason" not in line:  # older versions listed bad clips here
                    _clip(index, line), line["number"], line["checksum"]  # a missing field is damage
                    yield index.with_suffix(".clips"), line
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{index}, line {number}: damaged; delete this file and its .clips and run `prepare` again with the same "
                    "options, it makes their clips anew"
                ) from error


def _finished_parts(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"no folder of prepared clips at {folder}; make one with `prepare LIST --out {folder}`")
    found = sorted(folder.glob("part-*-of-*.json"))
    if not found:
        raise DataError(
            f"the folder {folder} holds no prepared clips (part-*-of-*.json); give a list of clips, or a folder that "
            "`prepare LIST --out FOLDER` has written"
        )
    contents = [read_part(path) for path in found]
    if len({(content["settings"], content["parts"], content["list"]) for content in contents}) > 1:
        raise DataError(f"the parts in {folder} were made with different settings, lists or numbers of parts")
    parts = contents[0]["parts"]
    missing = [
        str(number)
        for number in range(parts)
        if part_of(folder, number, parts) not in found or not read_part(part_of(folder, number, parts))["finished"]
    ]
    if missing:
        raise DataError(
            f"{folder}: part {', '.join(missing)} of {parts} is not finished; run `prepare --shard i/{parts}`"
        )
    return found


def read_folder(folder: Path) -> Clips:
    """The clips of a prepared folder in their list's order, the bad ones left out. Raises DataError."""
    good = []
    for part in _finished_parts(folder):
        own = [(line["number"], _clip(shard, line)) for shard, line in index_lines(part)]
        written = read_part(part)["finished"]["good"]
        if len(own) != written:
            raise DataError(
                f"{part.stem} in {folder} lists {len(own)} of its {written} clips: an index (.jsonl) is missing or cut; run "
                "`prepare` again with the same options, it makes what is missing"
            )
        good += own
    if not good:
        raise DataError(f"{folder} holds no good clip; reasons are in its *.bad.jsonl")
    return Clips.of(clip for _, clip in sorted(good, key=lambda entry: entry[0]))


def _clip(shard: Path, line: dict[str, Any]) -> Clip:
    return Clip(
        path=line["path"],
        label=line["label"],
        num_frames=line["num_frames"],
        shard=str(shard),
        offset=line["offset"],
        size=line["size"],
    )


def locate(clips: Clips, folders: Sequence[str]) -> Clips:
    """The same clips, those that some prepared folder holds (by their absolute path) to be read from there."""
    where = {clip.path: clip for folder in folders for clip in read_folder(Path(folder))}
    if not where:
        return clips
    found = 0
    located = ClipsBuilder()
    for clip in clips:
        there = where.get(os.path.abspath(clip.path))
        found += there is not None
        if there is not None:
            clip = replace(
                clip,
                num_frames=there.num_frames,
                shard=there.shard,
                offset=there.offset,
                size=there.size,
                frame_folder=False,
            )
        located.add(clip)
    log.info("%d of %d clips are read from data.prepared, the others from their files", found, len(clips))
    return located.done()


def check_use(clips: Clips, data: DataConfig, num_frames: int, train: bool) -> None:
    """Raises DataError where prepared clips do not hold what a run would draw from their files."""
    for folder in {os.path.dirname(shard) for shard in clips.values("shard") if shard}:
        parts = sorted(Path(folder).glob("part-*-of-*.json"))
        if not parts:
            raise DataError(f"{folder} has shards but no part-*-of-*.json beside them; copy the whole folder")
        settings = read_part(parts[0])["settings"]
        stored = settings.segments * settings.per_segment
        if data.sampling == "dense":
            raise DataError(
                f"{folder} holds candidates for {settings.sampling} sampling, and data.sampling is dense; leave the folder "
                f"out to train on the files, or take data.sampling {settings.sampling}"
            )
        # One frame, as of images, is drawn alike by all rules.
        for name in ("sampling", "max_seconds") if num_frames > 1 else ():
            held, asked = getattr(settings, name), getattr(data, name)
            if held != asked:
                raise DataError(
                    f"{folder} holds candidates for data.{name} {held}, and data.{name} is {asked}; `prepare` with "
                    f"--{name} {asked}, or take --data.{name} {held}"
                )
        if train and stored % num_frames:
            raise DataError(
                f"{folder} holds {settings.segments} segments x {settings.per_segment} frames of a clip, which "
                f"{num_frames} frames do not divide; prepare with --segments {num_frames}"
            )
