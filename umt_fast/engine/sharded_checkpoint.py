"""Checkpoints as folders to which every rank writes its part, for models that no host should hold whole.

`checkpoint-<step>.sharded` holds torch.distributed.checkpoint's files, with tensors named `model.<official name>` and
`optimizer.<index>.<moment>`, and `rest.pt`: the rest of what a one-file checkpoint has. Any layout and any one rank alone
can read it. All ranks must see the same folder.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from umt_fast.engine.checkpoint import CheckpointError, sync_folder
from umt_fast.engine.distributed import gather

REST = "rest.pt"
# What torch.distributed.checkpoint's index of tensors is made of, by the modules that define it.
_INDEX_MODULES = (
    "torch",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "pathlib",
)


class _IndexUnpickler(pickle.Unpickler):
    """Makes nothing but names, sizes and places: the index is a pickle, and a pickle can call anything."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        described = isinstance(found, (type, torch.dtype)) and module in _INDEX_MODULES
        if described or (module, name) == ("torch.serialization", "_get_layout"):
            return found
        raise pickle.UnpicklingError(f"the index of a checkpoint has no place for {module}.{name}")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of the optimizer's state_dict."""
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


def _single() -> dict[str, bool]:
    """How torch is told that there is one process."""
    return {"no_dist": not dist.is_initialized()}


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rest: dict[str, Any],
    *,
    average: dict[str, Tensor] | None = None,
    first: bool,
) -> Path:
    """Writes a checkpoint from all ranks atomically; see `write`. average: of the module's weights, by name."""
    state = optimizer.state_dict()
    tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"model_ema.{name}": value for name, value in (average or {}).items()}
    for index, values in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    path = folder / f"checkpoint-{step:08d}.sharded"
    return write(path, tensors, rest | {"groups": state["param_groups"]}, first=first)


def write(path: Path, tensors: dict[str, Tensor], rest: dict[str, Any], *, first: bool) -> Path:
    """Writes a folder of tensors from all ranks atomically: it gets its name when every part is on disk.

    Raises CheckpointError (disk full, no permission); older checkpoints are untouched then.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
            temporary.mkdir()
        gather(None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(tensors, storage_writer=FileSystemWriter(temporary, sync_files=True), **_single())
        if first:
            with open(temporary / REST, "wb") as file:
                torch.save(rest, file)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)  # a damaged one that was passed over
            os.replace(temporary, path)
            sync_folder(path.parent)
    except (OSError, RuntimeError, CheckpointException) as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {reason}. Earlier checkpoints are whole; make room and run again"
        ) from error
    return path


def _load(path: Path, reader: _Reader, tensors: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader, **_single())
        except CheckpointException as error:  # not an Exception: callers could not catch it with the others
            raise RuntimeError(f"{path}: {str(error).strip().splitlines()[-1]}") from error


def read(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A checkpoint's content as a one-file checkpoint's, each tensor laid out as this module's and optimizer's are.

    Raises CheckpointError where the sizes are another model's; other errors mean damage.
    """
    reader = _Reader(path)
    index = reader.read_metadata().state_dict_metadata
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    model = {name: torch.empty_like(value) for name, value in module.state_dict().items()}
    sizes = {key[len("model.") :]: entry.size for key, entry in index.items() if key.startswith("model.")}
    differing = [name for name in model.keys() | sizes if name not in model or sizes.get(name) != model[name].shape]
    if differing:
        raise CheckpointError(
            f"{path} does not fit the configured model: {', '.join(sorted(differing)[:5])} "
            f"({len(differing)} tensors differ in name or size)"
        )
    parameters, state = _parameters(optimizer), {}
    for key, entry in index.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            own = parameters[int(number)]
            fits = isinstance(own, DTensor) and entry.size == own.shape
            value = torch.empty_like(own) if fits else torch.empty(entry.size, dtype=entry.properties.dtype)
            state.setdefault(int(number), {})[name] = value
    tensors = {f"model.{name}": value for name, value in model.items()}
    tensors |= {f"optimizer.{i}.{name}": value for i, values in state.items() for name, value in values.items()}
    averaged = {name: torch.empty_like(value) for name, value in model.items() if f"model_ema.{name}" in index}
    tensors |= {f"model_ema.{name}": value for name, value in averaged.items()}
    _load(path, reader, tensors)
    average = {"model_ema": averaged} if averaged else {}
    return rest | {"model": model, "optimizer": {"state": state, "param_groups": rest["groups"]}} | average


def read_weights(path: Path) -> dict[str, Any]:
    """`model`, its tensors whole, with the rest but without the optimizer's state; in one process.

    Raises CheckpointError for another folder.
    """
    if not (path / ".metadata").is_file():
        raise CheckpointError(
            f"the folder {path} is not a checkpoint; give a checkpoint-*.pt or checkpoint-*.sharded of a run"
        )
    reader = _Reader(path)
    index = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    _load(path, reader, tensors)
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    return rest | {"model": {key[len("model.") :]: value for key, value in tensors.items()}}
