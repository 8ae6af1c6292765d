"""Lists of tens of millions of rows as a few tensors, which worker processes share where Python objects would be copied.

Torch moves a tensor to shared memory when a process is started with it; every worker then maps the same pages. Not pyarrow:
its tables are copied unless a temporary file backs them, and a row of one took three times as long to read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.sources.clip import Clip

# Names in JSON may hold half of a surrogate pair; it must come back as it was.
_HALVES = "surrogatepass"
# Rows whose places are Python numbers at a time.
_AT_ONCE = 1 << 16


class StringsBuilder:
    """Collects strings one by one for a Strings."""

    def __init__(self) -> None:
        self.blob, self.ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, text: str) -> None:
        self.blob += text.encode("utf-8", _HALVES)
        self.ends.append(len(self.blob))

    def done(self) -> Strings:
        blob = torch.frombuffer(self.blob, dtype=torch.uint8) if self.blob else torch.empty(0, dtype=torch.uint8)
        return Strings(blob, torch.frombuffer(self.ends, dtype=torch.int64))


class Strings(Sequence[str]):
    """Strings as one UTF-8 blob, uint8, and the int64 places (n + 1,) where they begin and end."""

    def __init__(self, blob: Tensor, ends: Tensor) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        builder = StringsBuilder()
        for text in strings:
            builder.add(text)
        return builder.done()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = _within(row, len(self))
        begin, end = self.ends[row : row + 2].tolist()
        return self.blob[begin:end].numpy().tobytes().decode("utf-8", _HALVES)

    def encoded(self) -> Iterator[bytes]:
        """Every string as its UTF-8 bytes, without making Python objects of all of them at once."""
        blob = memoryview(self.blob.numpy())
        for first in range(0, len(self), _AT_ONCE):
            for begin, end in pairwise(self.ends[first : first + _AT_ONCE + 1].tolist()):
                yield blob[begin:end].tobytes()


def _within(row: int, count: int) -> int:
    if not -count <= row < count:
        raise IndexError(f"row {row} of {count}")
    return row % count


_DEFAULTS = {field.name: field.default for field in fields(Clip) if field.name != "path"}


class ClipsBuilder:
    """Collects clips one by one for a Clips."""

    def __init__(self) -> None:
        self.paths = StringsBuilder()
        self.columns: dict[str, StringsBuilder | array] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, clip: Clip) -> None:
        for name, default in _DEFAULTS.items():
            value = getattr(clip, name)
            if value != default:
                self._put(name, value)
        self.paths.add(clip.path)

    def _put(self, name: str, value: str | float) -> None:
        column = self._filled(name)
        column.add(value) if isinstance(column, StringsBuilder) else column.append(value)

    def _filled(self, name: str) -> StringsBuilder | array:
        """A column with the default in every row that gave it no value so far."""
        default = _DEFAULTS[name]
        if name not in self.columns:
            new = StringsBuilder() if isinstance(default, str) else array("d" if isinstance(default, float) else "q")
            self.columns[name] = new
        column = self.columns[name]
        missing = len(self) - len(column)
        if isinstance(column, StringsBuilder):
            column.ends.extend([len(column.blob)] * missing)
        else:
            column.extend([default] * missing)
        return column

    def done(self) -> Clips:
        columns: dict[str, Strings | Tensor] = {"path": self.paths.done()}
        for name in self.columns:
            column = self._filled(name)
            if isinstance(column, StringsBuilder):
                columns[name] = column.done()
            else:
                columns[name] = torch.frombuffer(column, dtype=torch.float64 if column.typecode == "d" else torch.int64)
        return Clips(columns)


class Clips(Sequence[Clip]):
    """Clips by column; a field that no clip sets costs nothing."""

    def __init__(self, columns: dict[str, Strings | Tensor]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> Clips:
        builder = ClipsBuilder()
        for clip in clips:
            builder.add(clip)
        return builder.done()

    def __len__(self) -> int:
        return len(self.columns["path"])

    def values(self, name: str) -> set[str | float]:
        """The different values of a field, without making a Clip of every row."""
        column = self.columns.get(name)
        if column is None:
            return {_DEFAULTS[name]}
        return set(column) if isinstance(column, Strings) else set(column.unique().tolist())

    def count(self, name: str, values: Sequence[float]) -> int:
        """How many clips have one of these numbers in a field."""
        column = self.columns.get(name)
        if column is None:
            return len(self) if _DEFAULTS[name] in values else 0
        return int(torch.isin(column, torch.tensor(values, dtype=column.dtype)).sum())

    def identity(self) -> str:
        """64 bits, in hexadecimal, of the names in their order: equal for a list, its manifest and its prepared folder.

        Of the folder that all paths share only the last name counts, so that a list keeps its identity where its files move,
        and those of train/ and test/ differ.
        """
        paths, members = self.columns["path"], self.columns.get("member", ())
        folder = None
        for path in paths.encoded():
            folder = path[: path.rfind(b"/") + 1] if folder is None else folder
            while not path.startswith(folder):
                folder = folder[: folder.rfind(b"/", 0, -1) + 1]
        folder = folder and folder[: folder.rfind(b"/", 0, -1) + 1]
        digest = hashlib.blake2b(digest_size=8)
        for path in paths.encoded():
            digest.update(path[len(folder) :] + b"\0")
        for member in members.encoded() if members else ():
            digest.update(member + b"\0")
        return digest.hexdigest()

    @overload
    def __getitem__(self, row: int) -> Clip: ...
    @overload
    def __getitem__(self, row: slice) -> list[Clip]: ...
    def __getitem__(self, row: int | slice) -> Clip | list[Clip]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = _within(row, len(self))
        return Clip(
            **{
                name: column[row] if isinstance(column, Strings) else type(_DEFAULTS[name])(column[row].item())
                for name, column in self.columns.items()
            }
        )


def first_of_each(hashes: array, name_of: Callable[[int], str]) -> np.ndarray:
    """For each row the first row of the same name, int64 (n,); `hashes` holds hash(name) of each row.

    Hashes take the place of a dictionary of tens of millions of names; equal hashes are looked at.
    """
    _, first, inverse = np.unique(np.frombuffer(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    same = first[inverse]
    others: dict[str, int] = {}
    for row in np.flatnonzero(same != np.arange(len(same))).tolist():
        name = name_of(row)
        if name != name_of(int(same[row])):
            same[row] = others.setdefault(name, row)
    return same
