"""Exact frames of video files and frame folders through PyAV.

Frame i is the i-th picture a plain sequential decode shows, whatever the header says. Pictures that are not asked for
are never converted to RGB; those that no wanted picture needs are not even decoded where the packets prove which these
are (`selective`), so damage inside them goes unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from umt_fast.data.decode import cuts, selective
from umt_fast.data.decode.sampling import within_seconds
from umt_fast.extras import packages_of

if TYPE_CHECKING:
    import av  # at the point of use: prepared clips and frame folders are read without it

# Packets of a larger file are read twice rather than held.
_HELD_BYTES = 64 << 20

Chooser = Callable[[int], np.ndarray]


class VideoError(Exception):
    """A clip that cannot be read; the message is one line: file and reason."""


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def open_video(path: str | Path) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    """A file and, of its video streams, the one that FFmpeg's own tools show. Raises VideoError."""
    with packages_of("video"):
        import av

    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: {_reason(error)}") from error
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise VideoError(f"{path}: no video stream")
    # Parallelism is over clips; frame threads would also hold extra pictures back.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def _rotated(picture: np.ndarray, degrees: int) -> np.ndarray:
    """Turns a picture as its metadata asks; PyAV counts degrees counter-clockwise."""
    return np.rot90(picture, degrees // 90) if degrees % 360 else picture


def rotation_of(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) * 90 % 360


def rate_of(stream: av.VideoStream) -> float:
    """Frames per second, by the container; 0: it does not tell."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def limited(path: str | Path, choose: Chooser, rate: float, max_seconds: float) -> Chooser:
    """`choose` on the first `max_seconds` of a video alone; 0: on all of it. It raises VideoError where the rate is 0."""

    def choose_within(count: int) -> np.ndarray:
        if count > 1 and rate <= 0:
            raise VideoError(f"{path}: the file tells no frame rate, which data.max_seconds {max_seconds} needs")
        return choose(within_seconds(count, rate, max_seconds) if count > 1 else count)

    return choose_within if max_seconds else choose


def iterate_frames(path: str | Path, damaged: Callable[[int], None] = lambda seen: None) -> Iterator[av.VideoFrame]:
    """Yields the decoded frames (av.VideoFrame) in presentation order until the end or the first damage.

    damaged: called with the number of frames that were decoded, where damage ends the video.
    Raises VideoError when nothing at all can be decoded.
    """
    with packages_of("video"):
        from av.error import FFmpegError

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
            damaged(seen)
    if not seen:
        raise VideoError(f"{path}: no frame can be decoded")


class Pictures:
    """RGB pictures of decoded frames, uint8 (H, W, 3), by one scaler: making one for each frame costs more than its work."""

    def __init__(self) -> None:
        with packages_of("video"):
            import av
            from av.video.reformatter import VideoReformatter
        self._scaler = VideoReformatter()
        # Since av 17 a scaler starts threads unless told not to.
        self._options = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}

    def of(self, frame: av.VideoFrame) -> np.ndarray:
        picture = self._scaler.reformat(frame, format="rgb24", **self._options)
        return _rotated(picture.to_ndarray(), rotation_of(frame))


def _pick(path: str | Path, wanted: np.ndarray, announced: int) -> tuple[dict[int, np.ndarray], int]:
    """RGB pictures by frame number, and how many frames were seen before stopping."""
    needed, last = set(wanted.tolist()), int(wanted.max())
    pictures: dict[int, np.ndarray] = {}
    made, number = Pictures(), -1
    for number, frame in enumerate(iterate_frames(path, lambda seen: cuts.note(path, seen, announced))):
        if number in needed:
            pictures[number] = made.of(frame)
        if number == last:
            break
    return pictures, number + 1


@dataclass(frozen=True, slots=True)
class Index:
    """What a demux tells of a video without decoding it."""

    count: int
    """Pictures the container holds; damage may make fewer decodable."""
    announced: int
    """Pictures its head promises: more than it holds where the file is cut off."""
    packets: list[selective.Packet] | None
    """The packets, if they prove which of them is which picture; else a sequential decode must count."""


def _index(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[Index, list[av.Packet] | None]:
    """Also the packets themselves, unless they are too large to hold."""
    from av.error import FFmpegError

    length_size = selective.length_size_of(stream)
    described: list[selective.Packet] = []
    held: list[av.Packet] = []
    count = size = dropped = 0
    end = 0.0
    proven = length_size > 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            count += not packet.is_discard
            dropped += packet.is_discard
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if not proven:
                continue
            entry = selective.describe(packet, length_size)
            proven = entry is not None and not packet.is_discard and not packet.is_corrupt
            if proven:
                described.append(entry)
                size += packet.size
                if size <= _HELD_BYTES:
                    held.append(packet)
    except FFmpegError as error:
        raise VideoError(f"{path}: {_reason(error)}") from error
    proven = proven and selective.regular(described, stream.codec_context.reorder_depth)
    announced = max(count, _announced(container, stream, count, dropped, end))
    return Index(count, announced, described if proven else None), held if proven and size <= _HELD_BYTES else None


def _announced(
    container: av.container.InputContainer, stream: av.VideoStream, count: int, dropped: int, end: float
) -> int:
    """Pictures that a container's head promises, by its own count and its length together: a file that was trimmed without
    encoding has a count too large, one with longer sound a length.

    count, dropped: packets of pictures that are shown, and that are not. end: seconds at which the last one ends.
    """
    rate, length = rate_of(stream), container.duration or 0
    missing = (length + (container.start_time or 0)) / 1e6 - end
    if rate <= 0 or missing * rate < 2:
        return count
    if stream.frames:
        return stream.frames - dropped
    # Without a count of frames: the last one may be shown for long.
    return count + round(missing * rate) if missing > 0.5 and len(container.streams) == 1 else count


def announced_frames(path: str | Path) -> tuple[int, int]:
    """Pictures that a file's head promises, and those it holds, without decoding it. Raises VideoError."""
    container, stream = open_video(path)
    with container:
        index, _ = _index(path, container, stream)
    return index.announced, index.count


@dataclass(frozen=True, slots=True)
class Outline:
    """A video without its pictures."""

    count: int
    width: int
    """As decoded, before rotation; so is height."""
    height: int
    rotation: int
    """Degrees counter-clockwise."""
    codec: str
    rate: float
    """Frames per second; 0: not known."""


def outline(path: str | Path) -> Outline:
    """Counts the pictures and decodes the first. Raises VideoError: it cannot, or the file holds none."""
    container, stream = open_video(path)
    with container:
        count, codec = _index(path, container, stream)[0].count, stream.codec_context.codec.canonical_name
        rate = rate_of(stream)
    first = next(iterate_frames(path))
    return Outline(count, first.width, first.height, rotation_of(first), codec, rate)


def _pick_selectively(
    path: str | Path,
    stream: av.VideoStream,
    packets: list[selective.Packet],
    held: list[av.Packet] | None,
    wanted: np.ndarray,
) -> dict[int, np.ndarray] | None:
    """RGB pictures by frame number, or None if the stream is not what its packets promised."""
    from av.error import FFmpegError

    stamps = sorted(packet.pts for packet in packets)
    number_of = {stamps[number]: number for number in wanted.tolist()}
    groups, made = selective.groups_to_feed(packets, set(number_of)), Pictures()
    try:
        if held is None:
            again, stream = open_video(path)
            with again:
                frames = selective.decode(stream.codec_context, again.demux(stream), packets, groups)
                return {number_of[frame.pts]: made.of(frame) for frame in frames if frame.pts in number_of}
        frames = selective.decode(stream.codec_context, held, packets, groups)
        return {number_of[frame.pts]: made.of(frame) for frame in frames if frame.pts in number_of}
    except (FFmpegError, selective.Irregular):
        return None


def decode_frames(
    path: str | Path, choose: Chooser, num_frames: int | None = None, max_seconds: float = 0.0
) -> np.ndarray:
    """What decode_pictures gives as one array, uint8 (T, H, W, 3)."""
    return np.stack(decode_pictures(path, choose, num_frames, max_seconds))


def decode_pictures(
    path: str | Path, choose: Chooser, num_frames: int | None = None, max_seconds: float = 0.0
) -> list[np.ndarray]:
    """The T chosen frames of a video, each uint8 (H, W, 3), rotation applied.

    Args:
        path: any file PyAV reads.
        choose: frame count -> T frame numbers; must give the same answer when asked again with the same count. When
            fewer frames decode than were announced it is asked again with the true count.
        num_frames: the decodable count, if known; else the packets are counted.
        max_seconds: `choose` gets the count of the first so many seconds, by the container's frame rate; 0: of the whole.

    Raises:
        VideoError: the file cannot be read, its pictures change size, or it has no rate and max_seconds asks for one.
    """
    container, stream = open_video(path)
    with container:
        choose = limited(path, choose, rate_of(stream), max_seconds)
        index, held = _index(path, container, stream)
        count = num_frames or index.count
        if index.packets is not None and count == index.count:
            chosen = choose(count)
            pictures = _pick_selectively(path, stream, index.packets, held, chosen)
            if pictures is not None:
                if index.announced > index.count:
                    cuts.note(path, index.count, index.announced)
                return _in_order(path, pictures, chosen)
    if count < 1:
        # A container may not tell; then the count is what a decode gives.
        count = sum(1 for _ in iterate_frames(path))
    chosen, announced = choose(count), max(index.announced, count)
    pictures, seen = _pick(path, chosen, announced)
    if seen <= chosen.max():
        if index.announced > index.count:
            cuts.note(path, seen, announced)
        chosen = choose(seen)
        pictures, seen = _pick(path, chosen, announced)
        if seen <= chosen.max():
            raise VideoError(f"{path}: decodes to a different number of frames each time")
    return _in_order(path, pictures, chosen)


def _in_order(path: str | Path, pictures: dict[int, np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
    sizes = {pictures[number].shape for number in chosen.tolist()}
    if len(sizes) > 1:
        raise VideoError(f"{path}: frames change size: {sorted(sizes)}")
    return [pictures[number] for number in chosen.tolist()]


def read_frame_folder(folder: str | Path, choose: Chooser, num_frames: int, pattern: str) -> np.ndarray:
    """Chosen frames of a folder of pictures numbered from 1, uint8 (T, H, W, 3)."""
    with packages_of("video"):
        from PIL import Image

    pictures = []
    for number in choose(num_frames).tolist():
        path = Path(folder) / pattern.format(number + 1)
        try:
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise VideoError(f"{path}: {_reason(error)}") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError(f"{folder}: frames change size")
    return np.stack(pictures)
