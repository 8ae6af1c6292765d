"""Weights files in and out, of whatever model: safetensors, PyTorch files, TorchScript archives.

Nothing of a file is run: PyTorch files are read with weights_only=True, archives as torchscript.py says. Official training
files keep their settings beside the tensors as objects of classes of their own; those are read as plain ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from umt_fast.config import Vocabulary
from umt_fast.files import WriteError, atomic_path
from umt_fast.models.weights import torchscript

_WRAPPERS = ("model", "module", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# Settings in official training files. An OrderedDict is the one dictionary with attributes that weights_only fills.
_SETTINGS = [
    argparse.Namespace,
    (OrderedDict, "utils.easydict.EasyDict"),
    (OrderedDict, "easydict.EasyDict"),
]
# Training state that deepspeed keeps beside the parameters, as objects of classes that change from version to version.
_DEEPSPEED = "deepspeed."
# Where our safetensors files say which model they are of, and which tokenizer it reads texts with (older ones: its name).
_METADATA, _VOCABULARY, _TOKENIZER = "umt_fast.model_config", "umt_fast.vocabulary", "umt_fast.tokenizer"
# What config.json has of a tokenizer beside the description.
_WORDS, _FINGERPRINT = "tokenizer", "tokenizer_fingerprint"
# What save_pretrained writes into a folder.
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the keys."""


class UnreadableError(WeightsError):
    """A file that is truncated, or no weights file."""


class _Unread:
    """In place of an object of deepspeed's: takes whatever its pickle gives, and does nothing with it."""

    def __new__(cls, *_: Any, **__: Any) -> _Unread:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class WeightsFile(NamedTuple):
    """state: the tensors by name, unwrapped, on the CPU. rest: what the file holds beside them, by name."""

    state: dict[str, Tensor]
    rest: dict[str, Any]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on the kind of file that is loaded: our own message says what is wrong with it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.load|Detected pickle protocol")
        yield


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, unwrapped, on the CPU; see read_weights."""
    return read_weights(path).state


def is_saved_folder(path: Path) -> bool:
    """Whether a folder has the config.json of save_pretrained."""
    return (path / CONFIG).is_file()


def vocabulary_in(rest: dict[str, Any]) -> Vocabulary:
    """The tokenizer that a file knows beside its tensors: whole, by name alone as in older files, or none.

    Raises WeightsError: it is damaged.
    """
    carried, record = rest.get("vocabulary"), rest.get("config")
    if isinstance(carried, dict):
        found = Vocabulary(*(str(carried.get(field, "")) for field in Vocabulary._fields))
        if found.fingerprint and not re.fullmatch(r"\d+-[0-9a-f]{12}", found.fingerprint):
            raise WeightsError(
                f"the weights' record of their tokenizer {found.name} is damaged: its fingerprint is {found.fingerprint!r:.40}"
            )
        return found
    return Vocabulary(record.get("tokenizer", "") if isinstance(record, dict) else "")


def _saved_folder(folder: Path) -> WeightsFile:
    """What save_pretrained wrote, as a checkpoint would have it: `model_config` and `vocabulary`."""
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON; give a folder that save_pretrained wrote") from error
    if not isinstance(described, dict) or "task" not in described:
        raise WeightsError(f"{path} describes no model of umt_fast; give what save_pretrained or push_to_hub wrote")
    name, fingerprint = (described.pop(key, "") for key in (_WORDS, _FINGERPRINT))
    words = Vocabulary(str(folder) if name == "." else name, fingerprint)
    return WeightsFile(load_state(folder / WEIGHTS), {"model_config": described} | recorded(words))


def recorded(vocabulary: Vocabulary) -> dict[str, Any]:
    """A tokenizer where a checkpoint has it; nothing where none is known."""
    return {"vocabulary": vocabulary._asdict()} if vocabulary.name else {}


def folder_record(vocabulary: Vocabulary) -> dict[str, str]:
    """A tokenizer as config.json has it, its files beside it where its name is `.`; nothing where none is known."""
    found = {_WORDS: vocabulary.name, _FINGERPRINT: vocabulary.fingerprint}
    return {key: value for key, value in found.items() if value}


def _instead(folder: Path) -> str:
    """What to give in place of a folder."""
    if folder.suffix == ".sharded":
        return f"make one of it: `convert {folder} {folder.stem}.safetensors`"
    newest = max(folder.glob("checkpoint-*"), default=None)
    return (
        f"give a checkpoint of the run, as {newest}"
        if newest
        else "give a file, or a folder that save_pretrained wrote"
    )


def read_weights(path: str | Path) -> WeightsFile:
    """A weights file: flat, or the parameters under `model`, `module` or `state_dict`, with or without DDP's prefix; or a
    folder that save_pretrained wrote.

    The tensors of a PyTorch file are mapped: what is not used is not read. Raises WeightsError: no such file, a truncated or
    foreign file, a file without tensors, objects that are neither tensors nor plain values.
    """
    path = Path(path)
    if is_saved_folder(path):
        return _saved_folder(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, and weights are one file here; {_instead(path)}")
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    content = _content(path)
    rest = content if isinstance(content, dict) else {}
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(
            f"{path} holds no tensors by name; expected a state dict, or one under {', '.join(_WRAPPERS)}"
        )
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    nameless = next((key for key in state if not isinstance(key, str)), None)
    if nameless is not None:
        raise WeightsError(
            f"{path} has a tensor under {nameless!r}, which is no name; expected a state dict, as a module's state_dict() is"
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return WeightsFile(state, {key: value for key, value in rest.items() if value is not content and key not in state})


def _content(path: Path) -> Any:
    unreadable = f"{path} is not a readable weights file (truncated, or of another kind)"
    if torchscript.is_archive(path):
        try:
            return torchscript.read_archive(path)
        except torchscript.UnsupportedArchive as error:
            raise WeightsError(f"{path} is a TorchScript archive that cannot be read: {error}") from error
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return _pickled(path)
    except OSError:
        raise
    except Exception as error:  # what is no weights file fails in many ways
        refused = _refused(error)
        if refused and zipfile.is_zipfile(path):
            raise WeightsError(
                f"{path} holds an object of {refused}; only tensors and plain values are read, as others can run code. "
                "Save the module's state_dict() alone where you trust the file"
            ) from error
        raise UnreadableError(unreadable) from error


def _pickled(path: Path) -> Any:
    """A PyTorch file. Names of deepspeed's are replaced by a class that does nothing, as they turn up."""
    allowed: list[Any] = [*_SETTINGS]
    while True:
        try:
            with torch.serialization.safe_globals(allowed), _quiet():
                # Only zips can be mapped; a training file is three times what its parameters are.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            name = _refused(error)
            if name is None or not name.startswith(_DEEPSPEED) or (_Unread, name) in allowed:
                raise
            allowed.append((_Unread, name))


def _refused(error: Exception) -> str | None:
    """The full name of the object that weights_only would not load, where that was the reason."""
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))
    return None if found is None else found[1]


def _safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
        head = file.metadata() or {}
    described = head.get(_METADATA)
    # Beside the tensors, as in a checkpoint.
    if described is None:
        return content
    named = {"name": head.get(_TOKENIZER, "")}
    words = json.loads(head[_VOCABULARY]) if _VOCABULARY in head else named
    return {"model": content, "model_config": json.loads(described)} | ({"vocabulary": words} if words["name"] else {})


def save_state(
    state: dict[str, Tensor],
    path: str | Path,
    model_config: dict[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Writes tensors by name as safetensors or, for any other suffix, as a flat PyTorch file; whole or not at all.

    model_config: the description of their model (models.description), and vocabulary: the tokenizer that it reads texts with,
    kept in the head of a safetensors file; a flat PyTorch file has no place for them.
    """
    path = Path(path)
    # Copies: safetensors takes no two names for the same memory, as tied weights have.
    state = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    try:
        with atomic_path(path, errors=(RuntimeError, SafetensorError)) as temporary:
            if path.suffix == ".safetensors":
                head = {_METADATA: json.dumps(model_config)} if model_config else {}
                if head and vocabulary:
                    head |= {_TOKENIZER: vocabulary.name, _VOCABULARY: json.dumps(vocabulary._asdict())}
                save_file(state, temporary, head or None)
            else:
                torch.save(state, temporary)
    except WriteError as error:
        raise WeightsError(str(error)) from error
