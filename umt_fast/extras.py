"""Packages that only some users need: imported where they are used, and named with their extra where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from umt_fast.config import ConfigError

# Where a module is named otherwise than the package that brings it.
_PACKAGES = {"PIL": "pillow", "open_clip": "open_clip_torch", "faiss": "faiss-cpu", "werkzeug": "flask"}


class MissingPackageError(ConfigError):
    """A package that an extra of umt_fast brings is not installed; the message names both."""


@contextmanager
def packages_of(extra: str) -> Iterator[None]:
    """Around imports of packages of an extra (pyproject.toml).

    Raises MissingPackageError where one is not installed. A package that is there and does not load keeps its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or str(error)).partition(".")[0]
        package = _PACKAGES.get(module, module)
        raise MissingPackageError(f"{package} is not installed; `pip install 'umt_fast[{extra}]'` brings it") from error
