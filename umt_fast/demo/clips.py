"""What the page shows of a clip: a preview that every browser plays, and the frames of its parts.

Only the first MAX_SECONDS of a clip are shown and looked at: a page of results must not decode hours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from umt_fast.data.decode.video import VideoError, decode_frames, iterate_frames, rotation_of
from umt_fast.extras import packages_of

MAX_SECONDS = 60.0
RATE = 8
"""Pictures of a preview per second."""
HEIGHT = 240
"""Pixels; smaller clips keep their size."""


def preview(path: Path) -> bytes:
    """A clip, or a folder of pictures at RATE a second, as WebM. Raises VideoError: it is not there or cannot be read."""
    with packages_of("video"):
        import av

    if not path.exists():
        raise VideoError(f"{path}: no such file")
    out = io.BytesIO()
    try:
        with av.open(out, "w", format="webm") as container:
            stream = None
            for number, picture in enumerate(_pictures(path)):
                if stream is None:
                    stream = container.add_stream("libvpx", rate=RATE)
                    stream.options = {"deadline": "realtime", "cpu-used": "8"}
                    stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], "yuv420p"
                    stream.bit_rate = 600_000
                if picture.shape[:2] != (stream.height, stream.width):
                    raise VideoError(f"{path}: frames change size")
                frame = av.VideoFrame.from_ndarray(picture)
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                container.mux(stream.encode(frame))
            if stream is None:
                raise VideoError(f"{path}: no picture")
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error
    return out.getvalue()


def parts(path: Path, count: int, num_frames: int) -> list[np.ndarray]:
    """num_frames frames of each of `count` equal parts of a clip, evenly spread, uint8 (T, H, W, 3). Raises VideoError."""
    middles = (np.arange(count * num_frames) + 0.5) / (count * num_frames)
    if path.is_dir():
        pictures = list(_pictures(path))
        frames = np.stack([pictures[int(middle * len(pictures))] for middle in middles])
    else:
        frames = decode_frames(path, lambda total: (middles * total).astype(np.int64), max_seconds=MAX_SECONDS)
    return list(frames.reshape(count, num_frames, *frames.shape[1:]))


def _pictures(path: Path) -> Iterator[np.ndarray]:
    """Pictures RATE a second, of even sides and at most HEIGHT, uint8 (H, W, 3), rotation applied."""
    if path.is_dir():
        yield from _folder(path)
        return
    start, due = None, 0
    for frame in iterate_frames(path):
        time = frame.time if frame.time is not None else due / RATE
        start = time if start is None else start
        if time - start >= MAX_SECONDS:
            return
        # A slow clip repeats a picture, so that the preview's clock stays the clip's.
        shown = None
        while due / RATE <= time - start + 1e-6:
            if shown is None:
                width, height = _size(frame.width, frame.height)
                shown = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                shown = np.ascontiguousarray(np.rot90(shown, rotation_of(frame) // 90))
            yield shown
            due += 1


def _folder(path: Path) -> Iterator[np.ndarray]:
    with packages_of("video"):
        from PIL import Image

    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise VideoError(f"{path}: a folder without pictures")
    for file in files[: int(MAX_SECONDS * RATE)]:
        try:
            with Image.open(file) as picture:
                yield np.asarray(picture.convert("RGB").resize(_size(*picture.size)))
        except OSError as error:
            raise VideoError(f"{file}: not a readable picture") from error


def _size(width: int, height: int) -> tuple[int, int]:
    """Even sides, which the codec wants, at most HEIGHT high."""
    scale = min(1.0, HEIGHT / height)
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
