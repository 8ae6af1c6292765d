"""The tensors of a TorchScript archive, read as data: nothing of its code is run.

OpenAI ships CLIP as such archives, and torch.jit.load runs what one says, `__setstate__` of its classes for example: a file
of weights could then do anything. An archive is a zip with `data.pkl`, a pickle of module objects, `code/`, the sources of
their classes, and `data/N`, the bytes of storage N. The pickle is read by an unpickler that knows tensors and empty objects
alone, the sources are searched for the names of parameters and buffers, and the storages are copied.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Each is called with a list, or a value and its type; the value is what counts.
_TAGS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
_CLASS = re.compile(r"^class (\w+)\((\w*)\):\n((?:(?:  .*)?\n)*)", re.MULTILINE)
_NAMES = re.compile(r"^  (__parameters__|__buffers__) = \[(.*)\]$", re.MULTILINE)


class UnsupportedArchive(ValueError):
    """An archive that is damaged, or holds what is not read; the message says what, in one line."""


def is_archive(path: Path) -> bool:
    """Whether a file is a zip with TorchScript's parts."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {PurePosixPath(name).parts[1:2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
    return {("data.pkl",), ("constants.pkl",), ("code",)} <= names


def read_archive(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archive's module by name, as stored, on the CPU.

    They are those of the loaded module's state_dict(). Raises UnsupportedArchive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = _Parts(archive)
            module = _Unpickler(parts).load()
            if not isinstance(module, _Object):
                raise UnsupportedArchive("its data.pkl holds no module")
            return dict(_tensors_of(module, parts, "", ()))
    except UnsupportedArchive:
        raise
    except pickle.UnpicklingError as error:
        raise UnsupportedArchive(str(error)) from error
    except Exception as error:  # what is damaged fails in many ways
        raise UnsupportedArchive(f"it is damaged ({type(error).__name__})") from error


class _Parts:
    """The archive's entries, below the folder that all of them are in."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        (self._root,) = {PurePosixPath(name).parts[0] for name in archive.namelist()}
        self._storages: dict[str, Tensor] = {}
        self._classes: dict[str, dict[str, tuple[str, str]]] = {}
        if self._holds("byteorder") and self.read("byteorder") != b"little":
            raise UnsupportedArchive("its numbers are big-endian")

    def _holds(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._archive.NameToInfo

    def read(self, name: str) -> bytes:
        return self._archive.read(f"{self._root}/{name}")

    def tensor(self, stored: _Stored) -> Tensor:
        """A tensor; those of one storage share its memory, as tied weights do."""
        (key, dtype, count), offset, size, stride = stored
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        numbers = math.prod(size)
        if min((count, offset, *size, *stride)) < 0 or numbers > count or (numbers and last >= count):
            raise UnsupportedArchive(f"a tensor of size {size} lies outside its storage of {count} numbers")
        if key not in self._storages:
            name = f"data/{key}"
            if self._archive.getinfo(f"{self._root}/{name}").file_size != count * dtype.itemsize:
                raise UnsupportedArchive(f"its storage {key} has not the {count} numbers it should have")
            content = bytearray(self.read(name))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return torch.as_strided(self._storages[key], size, stride, offset)

    def source(self, module: str, name: str) -> tuple[str, str]:
        """(base class, body) of a class; empty where there is none."""
        if module not in self._classes:
            file = f"code/{module.replace('.', '/')}.py"
            text = self.read(file).decode() if self._holds(file) else ""
            self._classes[module] = {found: (base, body) for found, base, body in _CLASS.findall(text)}
        return self._classes[module].get(name, ("", ""))


class _Storage(NamedTuple):
    """What the pickle says of a storage."""

    key: str
    dtype: torch.dtype
    count: int


class _Stored(NamedTuple):
    """What the pickle says of a tensor. No tensor is made within the unpickler: a pickle can alter what it is given."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Object:
    """Holds the state of an object of the archive, whatever its class would do with it."""

    module = name = ""
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes plain values, _Objects and descriptions of tensors; refuses everything else by name."""

    def __init__(self, parts: _Parts) -> None:
        super().__init__(io.BytesIO(parts.read("data.pkl")))
        # New ones for each file: a pickle can set attributes of what it is given.
        self._given: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *values: _Stored(*values[:4]),
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "device"): lambda name, index=None: name,
        }
        self._given |= {("torch.jit._pickle", tag): lambda value, kind=None: value for tag in _TAGS}
        self._given |= {("torch", name): dtype for name, dtype in _STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        """Called for every class and function that the pickle names."""
        key = (module, name)
        if key not in self._given:
            if module.split(".")[0] != "__torch__":
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only tensors are read")
            self._given[key] = type("_Archived", (_Object,), {"module": module, "name": name})
        return self._given[key]

    def persistent_load(self, pid: Any) -> _Storage:
        """What a tensor refers to."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to a {kind!r}, and only storages of numbers are read")
        return _Storage(str(key), dtype, int(count))


def _tensors_of(module: _Object, parts: _Parts, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    base, body = parts.source(module.module, module.name)
    if base != "Module":
        return
    where = prefix.removesuffix(".") or "the module"
    if re.search(r"^  def __setstate__\(", body, re.MULTILINE) or not isinstance(module.state, dict):
        raise UnsupportedArchive(f"{where} is unpacked by code of its own (__setstate__), which is not run")
    if id(module) in above:
        raise UnsupportedArchive(f"{where} contains itself")
    lists = dict(_NAMES.findall(body))
    # Older archives do not list the buffers.
    listed = set(re.findall(r'"([^"]*)"', " ".join(lists.values()))) if len(lists) == 2 else module.state.keys()
    for name, value in module.state.items():
        if isinstance(value, _Stored) and name in listed:
            yield prefix + name, parts.tensor(value)
        elif isinstance(value, _Object):
            yield from _tensors_of(value, parts, f"{prefix}{name}.", (*above, id(module)))
