"""Clips that a program hands over, as files or decoded: the pixels that evaluation would make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.decode.video import Chooser, VideoError, decode_frames
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.sources.clip import Clip, DataError

Decoded = np.ndarray | Tensor
Videos = str | Path | Decoded | Sequence[str | Path | Decoded]
"""A file, decoded frames uint8 (T, H, W, 3) or (B, T, H, W, 3), or a sequence of files and of decoded clips (T, H, W, 3)."""

_WANTED = "give frames as uint8 (T, H, W, 3) or (B, T, H, W, 3), RGB from 0 to 255"


def pixels_of(videos: Videos, data: DataConfig, *, num_frames: int, image_size: int) -> Tensor:
    """uint8 (B, T, S, S, 3) on the CPU: the frames and the crop that evaluation with data.sampling and data.augment takes.

    Decoded clips are sampled like files: of more than num_frames frames some are chosen, of fewer some are repeated.

    Raises:
        DataError: a file that cannot be read, frames that are no uint8 pixels, an empty clip or sequence.
    """
    clips = _clips_of(videos)
    paths = [Clip(path=str(clip)) if isinstance(clip, (str, Path)) else Clip(path="frames") for clip in clips]
    reader = ClipReader(paths, data, num_frames=num_frames, image_size=image_size, seed=0, train=False)
    return torch.from_numpy(np.concatenate([_read(reader, number, clip) for number, clip in enumerate(clips)]))


def frames_of(video: str | Path | Decoded, choose: Chooser) -> np.ndarray:
    """Chosen frames of one clip, uint8 (T, H, W, 3), as they are. Raises DataError as pixels_of."""
    clips = _clips_of(video)
    if len(clips) != 1:
        raise DataError(f"{len(clips)} clips were given, and one is wanted: a path, or frames as uint8 (T, H, W, 3)")
    (clip,) = clips
    if isinstance(clip, np.ndarray):
        return clip[choose(len(clip))]
    if not Path(clip).is_file():
        raise DataError(f"{clip} is no video file")
    try:
        return decode_frames(clip, choose)
    except VideoError as error:
        raise DataError(str(error)) from error


def _clips_of(videos: Videos) -> list[str | Path | np.ndarray]:
    """One entry for each clip: a path or frames (T, H, W, 3)."""
    if isinstance(videos, (str, Path)):
        return [videos]
    if isinstance(videos, (np.ndarray, Tensor)):
        frames = _frames_of(videos)
        return list(frames) if frames.ndim == 5 else [frames]
    if not isinstance(videos, Sequence):
        raise DataError(f"videos are of type {type(videos).__name__}; give a path, or {_WANTED.removeprefix('give ')}")
    clips = [_clips_of(video) for video in videos]
    if not clips:
        raise DataError("no videos: the sequence is empty; give at least one")
    many = next((len(clip) for clip in clips if len(clip) != 1), 1)
    if many != 1:
        raise DataError(f"a sequence of clips holds one of {many} clips; give each alone, frames as (T, H, W, 3)")
    return [clip for (clip,) in clips]


def _frames_of(video: Decoded) -> np.ndarray:
    frames = video.detach().cpu() if isinstance(video, Tensor) else video
    shape, kind = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
    if kind != "uint8":
        raise DataError(f"frames are {kind} {shape}; {_WANTED}: pixels are normalized inside")
    if len(shape) not in (4, 5) or shape[-1] != 3:
        raise DataError(f"frames have the shape {shape}; {_WANTED}: channels last")
    if 0 in shape:
        raise DataError(f"frames have the shape {shape}, which holds no pixel; {_WANTED}")
    return np.asarray(frames)


def _read(reader: ClipReader, number: int, clip: str | Path | np.ndarray) -> np.ndarray:
    """(1, T, S, S, 3)."""
    if not isinstance(clip, np.ndarray):
        if Path(clip).is_dir():
            raise DataError(f"{clip} is a folder; give a video file")
        try:
            return reader.read(0, number).video
        except VideoError as error:
            raise DataError(str(error)) from error
    key = (0, 0, number)
    return reader.crops(clip[reader.chooser(key)(len(clip))], key)
