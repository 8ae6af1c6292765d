"""The DALI reader: files are decoded, cropped, resized and mirrored on the GPU (NVDEC, nvJPEG) and never leave it.

Stage 2's bicubic crops are cut by DALI and resized there by torch: DALI's cubic filter is another one (Keys' with -1/2).

It gives what `ClipLoader` gives: the same order, frame numbers, crops, replacements for bad clips and state, since all of
these are drawn by the same code; pixels are equal up to the rounding of decoder, color conversion and resize. Worker
processes only read bytes, count pictures and draw numbers. Two graphs: whole videos (`decoders.video` picks the frames), and
pictures (prepared clips and frame folders: `decoders.image`, a sample per frame).

Without a GPU DALI decodes VP8, VP9 and MJPEG only: the tests run both graphs so. GPU decoding itself was never run by the
authors of this file: no machine with one was at hand.

Where it differs from the CPU reader: a damaged video of which fewer frames decode than its container (or manifest) tells is a
bad clip here, while the CPU reader draws from the frames that do; `scan` the list first and both are the same.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor
from torch.utils.data import Dataset

from umt_fast.config import DataConfig
from umt_fast.data.decode.transforms import Crop, bicubic
from umt_fast.data.decode.video import Chooser, Outline, VideoError, limited, outline
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader, _Read
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.sources.lists import Clip
from umt_fast.data.sources.prepared import jpegs_of
from umt_fast.extras import packages_of

with packages_of("video"):
    from PIL import Image

log = logging.getLogger("umt_fast.data")

_CPU_CODECS = ("vp8", "vp9", "mjpeg")


@dataclass(slots=True)
class Request:
    """What DALI needs for one place of a batch."""

    place: tuple[int, int]
    index: int
    label: int
    encoded: list[np.ndarray]
    """Bytes of one video, or of T pictures."""
    frames: np.ndarray
    """int32 (T,); not used for pictures."""
    windows: list[tuple[int, int, int, int]]
    """Per crop: top, left, height, width in the picture as stored."""
    flips: list[tuple[int, int]]
    """Per crop: mirrored left to right, upside down."""
    turns: int
    """Quarter turns counter-clockwise that the finished crops still need."""
    bad: dict[int, str] = field(default_factory=dict)


def stored_window(crop: Crop, width: int, height: int, turns: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """(top, left, height, width) and (left-right, upside-down) mirroring before the turn that equal `crop` after it.

    width and height are those of the stored picture; the crop is one of that picture turned counter-clockwise.
    """
    if turns == 0:
        window = (crop.top, crop.left, crop.height, crop.width)
    elif turns == 1:
        window = (crop.left, width - crop.top - crop.height, crop.width, crop.height)
    elif turns == 2:
        window = (height - crop.top - crop.height, width - crop.left - crop.width, crop.height, crop.width)
    else:
        window = (height - crop.left - crop.width, crop.top, crop.width, crop.height)
    return window, ((0, int(crop.flip)) if turns % 2 else (int(crop.flip), 0))


class Requester(Dataset):
    """Place (epoch, clip number) -> Request, or the VideoError that could not be helped. Runs in worker processes."""

    def __init__(self, reader: ClipReader, pictures: bool, gpu: bool) -> None:
        self.reader, self.pictures, self.gpu = reader, pictures, gpu

    def __getitem__(self, place: tuple[int, int]) -> Request | VideoError:
        return self.ask(place, {})

    def ask(self, place: tuple[int, int], known: dict[int, str]) -> Request | VideoError:
        """`known`: clips that proved unreadable before, with reasons."""
        try:
            _, request, bad = self.reader.with_replacements(*place, lambda chosen: self._one(place, chosen), known)
        except VideoError as error:
            return error
        request.bad = bad
        return request

    def _one(self, place: tuple[int, int], chosen: int) -> Request:
        clip, key = self.reader.clips[chosen], (self.reader.seed, place[0], chosen)
        turns = 0
        if self.pictures:
            encoded, frames = self._pictures(clip, key)
            width, height = _size_of(clip, encoded[0])
        else:
            encoded, frames, found = self._video(clip, self.reader.chooser(key))
            width, height, turns = found.width, found.height, found.rotation // 90
        sides = (height, width) if turns % 2 else (width, height)
        placed = [stored_window(crop, width, height, turns) for crop in self.reader.windows(*sides, key)]
        windows, flips = [window for window, _ in placed], [flip for _, flip in placed]
        content = [np.frombuffer(part, np.uint8) for part in encoded]
        return Request(place, chosen, clip.label, content, frames.astype(np.int32), windows, flips, turns)

    def _video(self, clip: Clip, choose: Chooser) -> tuple[list[bytes], np.ndarray, Outline]:
        if not Path(clip.path).exists():
            raise VideoError(f"{clip.path}: no such file")
        found = outline(clip.path)
        if not self.gpu and found.codec not in _CPU_CODECS:
            raise VideoError(f"{clip.path}: DALI decodes {found.codec} on a GPU only; take data.reader cpu")
        count = clip.num_frames or found.count
        if not 0 < count <= found.count:
            raise VideoError(f"{clip.path}: holds {found.count} pictures, {count} are expected; `scan` the list")
        choose = limited(clip.path, choose, found.rate, self.reader.data.max_seconds)
        return [Path(clip.path).read_bytes()], choose(count), found

    def _pictures(self, clip: Clip, key: tuple[int, ...]) -> tuple[list[bytes], np.ndarray]:
        if clip.shard:
            chosen: list[np.ndarray] = []
            choose = self.reader.stored_chooser(key)

            def remember(stored: int, source: int) -> np.ndarray:
                chosen.append(choose(stored, source))
                return chosen[-1]

            jpegs = jpegs_of(clip, remember)
            return [jpegs[number] for number in chosen[-1].tolist()], chosen[-1]
        frames = self.reader.chooser(key)(clip.num_frames)
        paths = [Path(clip.path) / self.reader.data.frame_pattern.format(number + 1) for number in frames.tolist()]
        try:
            return [path.read_bytes() for path in paths], frames
        except OSError as error:
            raise VideoError(f"{clip.path}: {error}") from error


def _size_of(clip: Clip, picture: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            return opened.size
    except OSError as error:
        raise VideoError(f"{clip.path}: {error}") from error


class _Asked(NamedTuple):
    """A batch of requests; their bytes travel as one tensor, which workers hand over in shared memory."""

    requests: list[Request | VideoError]
    content: Tensor
    sizes: list[list[int]]


def _collect(requests: list[Request | VideoError]) -> _Asked:
    encoded = [request.encoded if isinstance(request, Request) else [] for request in requests]
    for request in requests:
        if isinstance(request, Request):
            request.encoded = []
    joint = [np.empty(0, np.uint8), *itertools.chain.from_iterable(encoded)]
    return _Asked(
        requests, torch.from_numpy(np.concatenate(joint)), [[len(part) for part in parts] for parts in encoded]
    )


def _restore(asked: _Asked) -> list[Request | VideoError]:
    content, start = asked.content.numpy(), 0
    for request, sizes in zip(asked.requests, asked.sizes, strict=True):
        for size in sizes:
            request.encoded.append(content[start : start + size])
            start += size
    return asked.requests


class _Graph:
    """One DALI pipeline with `depth` batches under way: it starts at the `depth`-th that is fed."""

    def __init__(
        self,
        *,
        pictures: bool,
        batch: int,
        frames: int,
        repeats: int,
        size: int,
        bicubic: bool,
        device: torch.device,
        depth: int,
    ) -> None:
        self.pictures, self.frames, self.repeats, self.size, self.device = pictures, frames, repeats, size, device
        self.bicubic, self.depth, self.fed = bicubic, depth, 0
        self.inputs = {"window": "windows"} if bicubic else {"window": "windows", "flip": "flips"}
        gpu = device.type == "cuda"
        self.pipe = Pipeline(
            batch_size=batch * (frames if pictures else 1),
            num_threads=4 if gpu else 1,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=depth,
        )
        decoder = "mixed" if gpu else "cpu"
        with self.pipe:
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
            if pictures:
                # As Pillow decodes: with interpolated chroma and the exact inverse transform.
                video = fn.decoders.image(encoded, device=decoder, jpeg_fancy_upsampling=True, use_fast_idct=False)
            else:
                numbers = fn.external_source(name="frames", ndim=1, dtype=types.INT32)
                video = fn.decoders.video(encoded, device=decoder, frames=numbers, pad_mode="none")
            self.pipe.set_outputs(*(self._crop(video, repeat) for repeat in range(repeats)))
        self.pipe.build()

    def _crop(self, video: Any, repeat: int) -> Any:
        """The finished crop; where it is bicubic, the window alone."""
        window = fn.external_source(name=f"window{repeat}", ndim=1, dtype=types.INT32)
        cut = fn.slice(video, start=window[:2], shape=window[2:], axis_names="HW")
        if self.bicubic:
            return cut
        flip = fn.external_source(name=f"flip{repeat}", ndim=1, dtype=types.INT32)
        sized = fn.resize(cut, resize_x=self.size, resize_y=self.size, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(sized, horizontal=flip[0], vertical=flip[1])

    def feed(self, requests: list[Request]) -> None:
        each = self.frames if self.pictures else 1
        self.pipe.feed_input("encoded", [part for request in requests for part in request.encoded])
        if not self.pictures:
            self.pipe.feed_input("frames", [request.frames for request in requests])
        for repeat in range(self.repeats):
            for name, values in self.inputs.items():
                arrays = [np.array(getattr(request, values)[repeat], np.int32) for request in requests]
                self.pipe.feed_input(f"{name}{repeat}", [array for array in arrays for _ in range(each)])
        self.fed += 1
        # The first call runs as many batches as the queue is deep.
        if self.fed >= self.depth:
            self.pipe.schedule_run()

    def take(self, requests: list[Request]) -> tuple[Tensor, list[int]]:
        """The oldest batch fed, uint8 (B * repeats, T, S, S, 3), and which of its clips gave too few frames.

        Raises RuntimeError: the decoder failed; this graph is of no further use.
        """
        outputs = self.pipe.share_outputs()
        try:
            each = self.frames if self.pictures else 1
            wanted = [self._shape(request) for request in requests for _ in range(each)]
            short = [number for number, found in enumerate(outputs[0].shape()) if list(found) != wanted[number]]
            if short:
                return torch.empty(0), short
            if self.bicubic:
                crops = [self._bicubic(output, requests, repeat) for repeat, output in enumerate(outputs)]
            else:
                shape = (len(requests), self.frames, self.size, self.size, 3)
                crops = [self._copy(output.as_tensor()).view(shape) for output in outputs]
        finally:
            self.pipe.release_outputs()
        for crop in crops:
            for number, request in enumerate(requests):
                if request.turns:
                    crop[number] = torch.rot90(crop[number], request.turns, (1, 2))
        return torch.stack(crops, 1).flatten(0, 1), []

    def _shape(self, request: Request) -> list[int]:
        """What the first crop of a request must come out as."""
        height, width = request.windows[0][2:] if self.bicubic else (self.size, self.size)
        return [height, width, 3] if self.pictures else [self.frames, height, width, 3]

    def _copy(self, tensor: Any) -> Tensor:
        copy = torch.empty(tensor.shape(), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(tensor, copy, cuda_stream=stream)
        return copy

    def _bicubic(self, windows: Any, requests: list[Request], repeat: int) -> Tensor:
        """Cut windows of several sizes -> uint8 (B, T, S, S, 3), resized and mirrored."""
        crops, each = [], self.frames if self.pictures else 1
        for number, request in enumerate(requests):
            parts = [self._copy(windows[number * each + part]) for part in range(each)]
            crop = bicubic(torch.stack(parts) if self.pictures else parts[0], self.size)
            mirrored = [axis for axis, on in zip((2, 1), request.flips[repeat], strict=True) if on]
            crops.append(crop.flip(mirrored) if mirrored else crop)
        return torch.stack(crops)


class DaliLoader(ClipLoader):
    """ClipLoader's contract with `video` on `device`; data.prefetch batches are under way on it.

    Raises DataError: a list that mixes prepared clips or frame folders with video files.
    """

    def __init__(self, clips: Sequence[Clip], data: DataConfig, *, device: torch.device, **kind: Any) -> None:
        super().__init__(clips, data, **kind)
        self.device = device
        if self.clips.values("member") != {""}:
            raise DataError("data.reader dali does not read tar files; take data.reader cpu")
        kinds = {bool(shard) for shard in self.clips.values("shard")}
        if kinds == {False}:
            kinds = {bool(folder) for folder in self.clips.values("frame_folder")}
        if len(kinds) > 1:
            raise DataError(
                "data.reader dali reads videos or prepared clips, this list mixes them; take data.reader cpu"
            )
        self._requester = Requester(self._reader, kinds.pop(), device.type == "cuda")
        self._graph: _Graph | None = None
        self._undecodable: dict[int, str] = {}

    def _work(self) -> tuple[Dataset, Any]:
        return self._requester, _collect

    def _fresh(self, left: int) -> _Graph:
        """A new graph for at most `left` batches."""
        reader = self._reader
        self._graph = None  # the old one's memory first
        self._graph = _Graph(
            pictures=self._requester.pictures,
            batch=self.batch_size,
            frames=reader.num_frames,
            repeats=self.data.num_sample if self.train else 1,
            size=reader.image_size,
            bicubic=reader.windows(reader.image_size, reader.image_size, (0,))[0].bicubic,
            device=self.device,
            depth=min(self.data.prefetch, left),
        )
        return self._graph

    def _reads(self) -> Iterator[_Read | VideoError]:
        waiting: deque[list[Request]] = deque()
        left = len(self._batches)
        if not left:
            return
        # Never the last epoch's graph: left in the middle, it still holds batches of that epoch.
        self._fresh(left)
        for asked in self._loader:
            requests = self._usable(_restore(asked))
            if isinstance(requests, VideoError):
                yield requests
                return
            left -= 1
            waiting.append(requests)
            self._graph.feed(requests)
            if len(waiting) >= self.data.prefetch:
                yield self._finish(waiting, left)
        while waiting:
            yield self._finish(waiting, left)

    def _usable(self, requests: list[Request | VideoError]) -> list[Request] | VideoError:
        """The requests with those for clips known to be undecodable asked anew, or the error of one that is hopeless."""
        out = []
        for request in requests:
            if isinstance(request, Request) and request.index in self._undecodable:
                request = self._requester.ask(request.place, self._undecodable)
            if isinstance(request, VideoError):
                return request
            out.append(request)
        return out

    def _finish(self, waiting: deque[list[Request]], left: int) -> _Read | VideoError:
        """The oldest batch under way; `left` batches are still to be fed."""
        requests = waiting.popleft()
        try:
            video, short = self._graph.take(requests)
            if not short:
                return self._batch(video, requests)
        except RuntimeError as error:
            log.warning("DALI gave up on a batch (%s); its clips are read one by one", _first_line(error))
        try:
            parts = [self._alone(request) for request in requests]
        except VideoError as error:
            return error
        if waiting or left:
            graph = self._fresh(len(waiting) + left)
            for later in waiting:
                graph.feed(later)
        return self._batch(torch.cat([video for video, _ in parts]), [request for _, request in parts])

    def _batch(self, video: Tensor, requests: list[Request]) -> _Read:
        repeats = len(requests[0].windows)
        index = torch.tensor([request.index for request in requests])
        # Here and not by the workers: only now it is known which replacements took part.
        added = self._columns(index) if self._columns else {}
        return _Read(
            video=video,
            index=index.repeat_interleave(repeats),
            label=torch.tensor([request.label for request in requests]).repeat_interleave(repeats),
            bad={number: reason for request in requests for number, reason in request.bad.items()},
            columns={name: rows.repeat_interleave(repeats, 0) for name, rows in added.items()},
        )

    def _alone(self, request: Request) -> tuple[Tensor, Request]:
        """A clip in a batch of its own; replacements until one can be decoded. Raises VideoError."""
        while True:
            graph = self._fresh(1)
            try:
                graph.feed([request])
                video, short = graph.take([request])
                reason = "fewer frames decode than it promises" if short else ""
            except RuntimeError as error:
                reason = f"DALI cannot decode it ({_first_line(error)})"
            if not reason:
                return video, request
            self._undecodable[request.index] = f"{self.clips[request.index].path}: {reason}"
            again = self._requester.ask(request.place, self._undecodable)
            if isinstance(again, VideoError):
                raise again
            request = again


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line]
    return (told or lines or [type(error).__name__])[-1 if told else 0][:200]
