"""Batches of clips in an order that follows from the seed alone, sharded over ranks, resumable at any batch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from umt_fast.config import DataConfig
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.reader import ClipReader, Sample
from umt_fast.data.sources.clip import Clip, absent, missing_files
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.prepared import check_use, locate
from umt_fast.workers import end_with_parent, fork_server

log = logging.getLogger("umt_fast.data")


class _Places(Dataset):
    """Place (epoch, clip number) -> Sample, or the VideoError that could not be helped."""

    def __init__(self, reader: ClipReader) -> None:
        self.reader = reader

    def __getitem__(self, place: tuple[int, int]) -> Sample | VideoError:
        try:
            return self.reader.read(*place)
        except VideoError as error:
            return error


class _Batches:
    """The places of the batches still to come; set anew before each epoch, so that workers outlive epochs."""

    def __init__(self) -> None:
        self.epoch = 0
        self.order: Sequence[np.ndarray] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Bound here: a generator of an epoch that was left must not go on with the next one's order.
        epoch, order = self.epoch, self.order
        return ([(epoch, clip) for clip in batch.tolist()] for batch in order)

    def __len__(self) -> int:
        return len(self.order)


class _Read(NamedTuple):
    """A batch as a worker hands it over; torch tensors travel in shared memory, not through a pipe."""

    video: Tensor
    index: Tensor
    label: Tensor
    bad: dict[int, str]
    columns: dict[str, Tensor]
    cut: dict[int, str] = {}
    """Clips that are cut in the middle, by number."""


Columns = Callable[[Tensor], dict[str, Tensor]]


def _stack(samples: list[Sample | VideoError], columns: Columns | None) -> _Read | VideoError:
    for sample in samples:
        if isinstance(sample, VideoError):
            return sample
    repeats = samples[0].video.shape[0]
    index = torch.tensor([sample.index for sample in samples])
    added = columns(index) if columns else {}
    own = {name: np.concatenate([sample.columns[name] for sample in samples]) for name in samples[0].columns}
    return _Read(
        video=torch.from_numpy(_joined([sample.video for sample in samples])),
        index=index.repeat_interleave(repeats),
        label=torch.tensor([sample.label for sample in samples]).repeat_interleave(repeats),
        bad={number: reason for sample in samples for number, reason in sample.bad.items()},
        columns={name: rows.repeat_interleave(repeats, 0) for name, rows in added.items()}
        | {name: torch.from_numpy(rows) for name, rows in own.items()},
        cut={sample.index: sample.cut for sample in samples if sample.cut},
    )


def _joined(videos: list[np.ndarray]) -> np.ndarray:
    """One after the other; one alone, as all views of a clip may be, is not copied again."""
    return np.ascontiguousarray(videos[0]) if len(videos) == 1 else np.concatenate(videos)


def _start_worker(worker: int) -> None:
    end_with_parent()
    # Decoding processes are the parallelism; threads of torch and of the tokenizer inside them would only compete.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class ClipLoader:
    """Iterates over one epoch's batches from the current position.

    A batch is `{video: uint8 (B * num_sample, T, S, S, 3), index: int64, label: int64}` on the CPU; `index` is the
    clip's number in the list. In training the last incomplete batch of an epoch is left out, so that every rank makes
    the same number of steps; in evaluation (train=False) it is kept and nothing is shuffled.

    The order of an epoch, the frames and the crops are functions of (seed, epoch, clip number): a state is therefore
    just {epoch, position}, and the number of workers changes nothing.
    """

    kinds = 1
    remedy = "`scan` the list to find them all"
    """What to do about files that cannot be read."""
    needs_files = True
    """In evaluation all files must be there before the first is read."""

    def __init__(
        self,
        clips: Sequence[Clip],
        data: DataConfig,
        *,
        num_frames: int,
        image_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train: bool = True,
        reader: Callable[..., ClipReader] = ClipReader,
    ) -> None:
        """reader: makes what reads a sample, called as ClipReader is; another gives other crops, and columns of its own."""
        if not clips:
            raise DataError("the list holds no clips")
        if train and len(clips) < batch_size * world_size:
            raise DataError(
                f"{len(clips)} clips do not fill one step of {batch_size} clips x {world_size} ranks; "
                "lower run.batch_size or give a longer list"
            )
        clips = locate(clips if isinstance(clips, Clips) else Clips.of(clips), data.prepared)
        check_use(clips, data, num_frames, train)
        if data.max_seconds and 1 in clips.values("frame_folder"):
            raise DataError(
                f"data.max_seconds is {data.max_seconds}, but folders of pictures have no frame rate; list the first pictures "
                "alone (path, how many, label) and leave it out"
            )
        self.clips, self.data, self.batch_size, self.train = clips, data, batch_size, train
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.position = 0, 0
        self.bad_files: dict[str, str] = {}
        self.cut_files: dict[int, str] = {}
        """Clips by number that are cut in the middle, as far as they were read."""
        self._batches = _Batches()
        self._columns: Columns | None = None
        if not train and self.needs_files:
            missing, count = absent(self.clips)
            if missing:
                raise missing_files(missing, count, "the list")
        self._reader = reader(clips, data, num_frames=num_frames, image_size=image_size, seed=seed, train=train)

    def __len__(self) -> int:
        """Batches of one whole epoch on this rank."""
        if self.train:
            return len(self.clips) // self.batch_size // self.world_size
        mine = len(range(self.rank, len(self.clips), self.world_size))
        return -(-mine // self.batch_size)

    def add_columns(self, columns: Columns) -> None:
        """Batches also get what `columns(clip numbers, int64 (B,))` gives, made by the decoding processes.

        To be called before the first batch; `columns` must be picklable.
        """
        if "_loader" in self.__dict__:
            raise RuntimeError("add_columns must be called before the first batch: the decoding processes have started")
        self._columns = columns

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch; staying in the current one keeps the position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "bad_files": dict(self.bad_files)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.bad_files = dict(state["bad_files"])

    @functools.cached_property
    def identity(self) -> str:
        """What a state belongs to; see Clips.identity."""
        return self.clips.identity()

    def name_of(self, index: int) -> str:
        """The path of a clip by its number."""
        return self.clips[index].name

    def order(self, epoch: int) -> list[list[int]]:
        """The clip numbers of this rank's batches of an epoch."""
        return [batch.tolist() for batch in self._order(epoch)]

    def _order(self, epoch: int) -> Sequence[np.ndarray]:
        count = len(self.clips)
        if not self.train:
            mine = np.arange(self.rank, count, self.world_size)
            return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(count)
        step = self.batch_size * self.world_size
        mine = shuffled[: len(self) * step].reshape(len(self), self.world_size, self.batch_size)[:, self.rank]
        return mine.copy()  # the rest of the permutation is not kept

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._batches.epoch, self._batches.order = self.epoch, self._order(self.epoch)[self.position :]
        try:
            for read in self._reads():
                if isinstance(read, VideoError):
                    raise DataError(str(read))
                for number, reason in read.bad.items():
                    self._note_bad(number, reason)
                self.cut_files |= read.cut
                self.position += 1
                yield {"video": read.video, "index": read.index, "label": read.label} | read.columns
        except RuntimeError as error:
            if "DataLoader worker" in str(error) or "shared memory" in str(error):
                raise DataError(
                    f"a decoding process died or could not start ({error}); out of memory or of /dev/shm is the usual cause: "
                    "lower data.workers, or give the container more (docker: --shm-size)"
                ) from error
            raise

    def _reads(self) -> Iterator[_Read | VideoError]:
        """The batches still to come of this epoch."""
        return iter(self._loader)

    def _work(self) -> tuple[Dataset, Callable[[list[Any]], Any]]:
        """What a worker does for a place, and how it makes a batch of the results."""
        return _Places(self._reader), functools.partial(_stack, columns=self._columns)

    @functools.cached_property
    def _loader(self) -> DataLoader:
        """Made at the first epoch; its workers, and the list in the memory they share, stay for all later ones."""
        workers = min(self.data.workers, len(self._batches))
        dataset, collate = self._work()
        return DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.data.prefetch if workers else None,
            collate_fn=collate,
            worker_init_fn=_start_worker,
            multiprocessing_context=fork_server(__name__) if workers else None,
        )

    def _note_bad(self, number: int, reason: str) -> None:
        name = self.clips[number].name
        if name in self.bad_files:
            return
        self.bad_files[name] = reason
        log.warning("skipped a bad clip: %s", reason)
        allowed = self.data.max_bad_share * len(self.clips)
        if len(self.bad_files) > allowed:
            clip = self.clips[number]
            remedy = self.remedy
            if clip.shard:
                remedy = "Repeat the `prepare` of that folder with --verify to find them all"
            elif clip.member:
                remedy = "Fetch the tar files again"
            raise DataError(
                f"{len(self.bad_files)} of {len(self.clips)} clips are unreadable, {self._beyond()}; the last: {reason}. "
                f"{remedy}"
            )

    def _beyond(self) -> str:
        """Which limit the number of unreadable clips is beyond."""
        return f"more than data.max_bad_share {self.data.max_bad_share} allows"
