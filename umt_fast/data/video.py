"""Exact frames of video files and frame folders through PyAV.

Frame i is the i-th picture a plain sequential decode shows, whatever the header says. Pictures that are not asked for
are decoded, since others depend on them, but never converted to RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

Chooser = Callable[[int], np.ndarray]


class VideoError(Exception):
    """A clip that cannot be read; the message is one line: file and reason."""


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def open_video(path: str | Path) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    try:
        container = av.open(str(path))
    except (FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: {_reason(error)}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path}: no video stream")
    stream = container.streams.video[0]
    # Parallelism is over clips; frame threads would also hold extra pictures back.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def _rotated(picture: np.ndarray, degrees: int) -> np.ndarray:
    """Turns a picture as its metadata asks; PyAV counts degrees counter-clockwise."""
    return np.rot90(picture, degrees // 90) if degrees % 360 else picture


def rotation_of(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) * 90 % 360


def count_packets(path: str | Path) -> int:
    """The number of pictures the container holds, read without decoding; damage may make fewer decodable."""
    container, stream = open_video(path)
    try:
        with container:
            return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    except FFmpegError as error:
        raise VideoError(f"{path}: {_reason(error)}") from error


def iterate_frames(path: str | Path) -> Iterator[av.VideoFrame]:
    """Yields the decoded frames (av.VideoFrame) in presentation order until the end or the first damage.

    Raises VideoError when nothing at all can be decoded.
    """
    container, stream = open_video(path)
    seen = 0
    with container:
        try:
            for frame in container.decode(stream):
                seen += 1
                yield frame
        except FFmpegError as error:
            if not seen:
                raise VideoError(f"{path}: {_reason(error)}") from error
    if not seen:
        raise VideoError(f"{path}: no frame can be decoded")


def _pick(path: str | Path, wanted: np.ndarray) -> tuple[dict[int, np.ndarray], int]:
    """RGB pictures by frame number, and how many frames were seen before stopping."""
    needed, last = set(wanted.tolist()), int(wanted.max())
    pictures: dict[int, np.ndarray] = {}
    number = -1
    for number, frame in enumerate(iterate_frames(path)):
        if number in needed:
            pictures[number] = _rotated(frame.to_ndarray(format="rgb24"), rotation_of(frame))
        if number == last:
            break
    return pictures, number + 1


def decode_frames(path: str | Path, choose: Chooser, num_frames: int | None = None) -> np.ndarray:
    """Chosen frames of a video, uint8 (T, H, W, 3), rotation applied.

    Args:
        path: any file PyAV reads.
        choose: frame count -> T frame numbers; must give the same answer when asked again with the same count. When
            fewer frames decode than were announced it is asked again with the true count.
        num_frames: the decodable count, if known; else the packets are counted first.

    Raises:
        VideoError: the file cannot be read, or its pictures change size.
    """
    count = count_packets(path) if num_frames is None else num_frames
    if count < 1:
        # A container may not tell; then the count is what a decode gives.
        count = sum(1 for _ in iterate_frames(path))
    chosen = choose(count)
    pictures, seen = _pick(path, chosen)
    if seen <= chosen.max():
        chosen = choose(seen)
        pictures, seen = _pick(path, chosen)
        if seen <= chosen.max():
            raise VideoError(f"{path}: decodes to a different number of frames each time")
    sizes = {pictures[number].shape for number in chosen.tolist()}
    if len(sizes) > 1:
        raise VideoError(f"{path}: frames change size: {sorted(sizes)}")
    return np.stack([pictures[number] for number in chosen.tolist()])


def read_frame_folder(folder: str | Path, choose: Chooser, num_frames: int, pattern: str) -> np.ndarray:
    """Chosen frames of a folder of pictures numbered from 1, uint8 (T, H, W, 3)."""
    pictures = []
    for number in choose(num_frames).tolist():
        path = Path(folder) / pattern.format(number + 1)
        try:
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise VideoError(f"{path}: {_reason(error)}") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError(f"{folder}: frames change size")
    return np.stack(pictures)
