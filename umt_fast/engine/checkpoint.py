"""Checkpoints: written whole or not at all, found again newest first, kept by policy.

A file is `checkpoint-<step>.pt`, a dictionary of plain values and tensors that torch reads with weights_only=True:
`model` in the official layout, `optimizer`, `trainer`, `loader` (one state per rank), `config`, the run's settings, and
`model_config`, which alone rebuilds the model (models/description.py), and of one that reads texts `vocabulary`, its
tokenizer. The form of many files, `checkpoint-<step>.sharded`, is sharded_checkpoint.py's.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from umt_fast.engine.distributed import gather
from umt_fast.files import LockedError, WriteError, atomic_path, lock, remove_folder, require_writable

log = logging.getLogger("umt_fast")

_NAME = re.compile(r"checkpoint-(\d{8})\.(pt|sharded)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or continued from."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file or folder) of a run's checkpoints, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def prepare_folder(folder: Path) -> None:
    """Makes the run folder and tries it, so that a run that could not save does not start."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_writable(folder)
    except OSError as error:
        raise CheckpointError(f"run.out {folder} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def own_folder(folder: Path, *, first: bool) -> Iterator[None]:
    """Makes the run folder and keeps other runs from it during the block; to be entered by all ranks together.

    The first rank holds an advisory lock on `.lock` in the folder, which the system lets go of however its process ends.
    Where the file system has no locks, a warning says so and the run goes on.

    Raises CheckpointError, on every rank: a folder that cannot be written, or that another run holds.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if first:
            try:
                prepare_folder(folder)
                stack.enter_context(lock(folder / ".lock"))
            except CheckpointError as error:
                refusal = str(error)
            except LockedError:
                refusal = (
                    f"another run is writing to {folder}; wait for its end or give another run.out (where none runs any "
                    f"more, as after the loss of a machine, delete {folder / '.lock'})"
                )
        refusal = gather(refusal)[0]
        if refusal:
            raise CheckpointError(refusal)
        yield


def save(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Writes a checkpoint atomically: a reader sees the whole file or none, also after a power cut.

    Raises CheckpointError (disk full, no permission); older checkpoints are untouched then.
    """
    return write(folder / f"checkpoint-{step:08d}.pt", content)


def write(path: Path, content: dict[str, Any]) -> Path:
    """Writes a file of a run atomically, as `save` does; the same errors."""
    try:
        with atomic_path(path, errors=(RuntimeError,)) as temporary:
            torch.save(content, temporary)
    except WriteError as error:
        raise CheckpointError(f"checkpoint {error}. Earlier checkpoints are whole; make room and run again") from error
    return path


def prune(folder: Path, step_saved: int, keep: int, permanent_steps: int) -> None:
    """Deletes all but the newest `keep` checkpoints up to the one just saved; every permanent_steps-th stays (0: none).

    Files of later steps do not count: after a resume from an earlier step they are the damaged ones passed over.
    """
    for step, path in [entry for entry in checkpoints(folder) if entry[0] <= step_saved][:-keep]:
        if permanent_steps and step % permanent_steps == 0:
            continue
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a one-file checkpoint, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_newest(folder: Path, read: Callable[[Path], dict[str, Any]] = read_file) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None where there is none.

    A damaged one is named in a warning and passed over. Raises CheckpointError when all are damaged, or one may not be
    read: going on from an older one would throw sound work away.
    """
    found = checkpoints(folder)
    for _, path in reversed(found):
        try:
            return path, read(path)
        except CheckpointError:
            raise
        except PermissionError as error:
            raise CheckpointError(f"{path} may not be read: {error.strerror}; give this user access to it") from error
        except Exception as error:  # a cut file fails in many ways: zip, pickle, storage
            log.warning("WARNING: %s is damaged (%s); trying the one before it", path, type(error).__name__)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} can be read; move them away to start anew"
        )
    return None
