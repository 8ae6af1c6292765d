"""How files are written: as a whole or not at all, by one process at a time, known again by their checksum."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("umt_fast")


class WriteError(OSError):
    """A file that cannot be written; the message names it and the reason, as `reason` does alone. It is as it was before."""

    reason = ""

    @classmethod
    def of(cls, path: Path, error: BaseException) -> WriteError:
        said = str(error).strip().splitlines()
        reason = getattr(error, "strerror", None) or (said[-1] if said else type(error).__name__)
        made = cls(f"{path} cannot be written: {reason}")
        made.reason = reason
        return made


class LockedError(OSError):
    """Another process holds the lock on a file."""


@contextlib.contextmanager
def atomic_path(path: str | Path, *, shared: bool = False, errors: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A path to write to, beside `path`; it gets that name at the block's end, on disk, and goes where the block raises.

    Readers see the old file or the new one, also after a kill or a power cut. The file has the mode that the umask gives,
    whatever the writer makes of it.

    Args:
        shared: other processes may write the same file at the same time; the last one stays.
        errors: what else than OSError the writer raises where it cannot write.

    Raises WriteError: disk full, no permission, no such folder. The block must do nothing but write.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing" if shared else f"{path.name}.writing")
    try:
        temporary.unlink(missing_ok=True)  # of a write that was killed
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        put(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, *errors)):
            raise WriteError.of(path, error) from error
        raise


def put(source: Path, path: Path) -> None:
    """Gives a written file, or a folder of written files, its final name, in place of what has it; both are on disk then."""
    _sync(source)
    if path.is_dir():
        remove_folder(path)
    os.replace(source, path)
    _sync(path.parent)  # the name: a file's own fsync does not put it there


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Deletes a folder, renamed first: one that is deleted by half must not be taken for whole."""
    leaving = path.with_name(path.name + ".leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def write_text(path: str | Path, text: str | Iterable[str]) -> None:
    """Replaces a file by a text, or by texts one after another, in UTF-8; see atomic_path."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_json(path: str | Path, value: Any, indent: int | None = None, *, shared: bool = False) -> None:
    """Replaces a file by a value as JSON; see atomic_path."""
    text = json.dumps(value, indent=indent) + "\n"
    with atomic_path(path, shared=shared) as temporary:
        temporary.write_text(text)


def require_writable(folder: Path) -> None:
    """Tries whether files can be made in a folder. Raises OSError."""
    probe = folder / f".{os.getpid()}.writable"
    probe.touch()
    probe.unlink()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an advisory lock on a file, which is made where it is missing, during the block.

    The system lets go of it however this process ends. Programs that it starts do not inherit it: one that outlives it must
    not hold its lock. Where the file cannot be locked, as on file systems without locks, a warning says so and the block runs.

    Raises LockedError where another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(f"another process holds {path}") from error
        except OSError as error:
            log.warning("WARNING: %s cannot be locked (%s): start no second run in this folder", path, error.strerror)
        yield


def checksum(contents: bytes | Iterable[bytes | str | Path]) -> str:
    """BLAKE2b-128, in hexadecimal, of bytes, or of bytes and the contents of files one after another. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for content in [contents] if isinstance(contents, bytes) else contents:
        if isinstance(content, bytes):
            digest.update(content)
            continue
        with open(content, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
