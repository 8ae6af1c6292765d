"""Files that commands write."""

from __future__ import annotations

from pathlib import Path

from umt_fast.config import ConfigError
from umt_fast.files import require_writable


def check_output(out: Path | None, *inputs: Path) -> None:
    """Refuses, before any work, an output that would replace what it is made from or that cannot be written."""
    if out is None:
        return
    if any(out.resolve() == given.resolve() for given in inputs):
        raise ConfigError(f"{out} is an input of this command and would be replaced; give another output")
    if out.is_dir():
        raise ConfigError(f"{out} cannot be written: it is a folder; give the name of a file")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: {out.parent} is not a folder")
    try:
        # Files are written beside their place and renamed, so the folder is what counts.
        require_writable(out.parent)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
