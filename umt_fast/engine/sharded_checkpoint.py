"""Checkpoints as folders to which every rank writes its part, for models that no host should hold whole.

`checkpoint-<step>.sharded` holds torch.distributed.checkpoint's files, with tensors named `model.<official name>` and
`optimizer.<name>.<moment>` (earlier versions: the parameter's number in place of its name), and `rest.pt`: the rest of what
a one-file checkpoint has. Any layout and any one rank alone can read it. All ranks must see the same folder.
"""

from __future__ import annotations

import pickle
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
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

from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.engine.distributed import gather
from umt_fast.files import WriteError, atomic_path, put

REST = "rest.pt"
# Said of every save and load of one process, also from the thread of one in the background.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
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


def _single() -> dict[str, bool]:
    """How torch is told that there is one process."""
    return {"no_dist": not dist.is_initialized()}


def named_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `model`, `optimizer` and, where there is one, `model_ema`, by the names that they have in the files."""
    tensors = {
        f"{part}.{name}": value for part in ("model", "model_ema") for name, value in content.get(part, {}).items()
    }
    for name, values in content["optimizer"]["state"].items():
        tensors |= {f"optimizer.{name}.{moment}": value for moment, value in values.items()}
    return tensors


class Save:
    """A folder of tensors that all ranks write: begun when it is made, usable once `wait` returns.

    The folder gets its name when every part is on disk, so that a kill at any time leaves the older checkpoints as they are.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        rest: dict[str, Any],
        *,
        first: bool,
        published: Callable[[Path], None] = lambda path: None,
        group: dist.ProcessGroup | None = None,
        background: bool = False,
    ) -> None:
        """Copies the tensors and writes the copy in the background, or writes them at once.

        Args:
            tensors: each rank gives its shards.
            published: called on the first rank as soon as the folder has its name; in the background in a thread.
            group: ranks' process group for CPU tensors, which nothing else uses meanwhile; None: the default one.

        Raises CheckpointError as wait does, where it writes at once.
        """
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.first, self.published = first, published
        self.error: BaseException | None = None
        self.ended = threading.Event()
        try:
            self._begin(rest)
        except (OSError, RuntimeError) as error:
            self.error = error
        if any(gather(self.error is not None)):  # only the first rank begins; the others must not go on without it
            self.error = self.error or RuntimeError("the first rank could not begin it")
            self.ended.set()
            self.wait()
        to = {"storage_writer": FileSystemWriter(self.partial, sync_files=True), "process_group": group, **_single()}
        if background:
            dcp.async_save(tensors, **to).add_done_callback(self._end)
        else:
            written: Future = Future()
            try:
                written.set_result(dcp.save(tensors, **to))
            except (OSError, RuntimeError, CheckpointException) as error:
                written.set_exception(error)
            self._end(written)
            self.wait()

    def _begin(self, rest: dict[str, Any]) -> None:
        if self.first:
            shutil.rmtree(self.partial, ignore_errors=True)  # of a save that was killed
            self.partial.mkdir()
            with atomic_path(self.partial / REST, errors=(RuntimeError,)) as temporary:
                torch.save(rest, temporary)

    def _end(self, written: Future) -> None:
        """What follows when this rank's part is on disk; on the first rank all ranks' parts are then."""
        try:
            written.result()
            if self.first:
                put(self.partial, self.path)  # also in place of a damaged one that was passed over
                self.published(self.path)
        except BaseException as error:  # in a thread: wait raises it
            self.error = error
        finally:
            self.ended.set()

    def settle(self) -> None:
        """Returns once this rank's part is written or has failed, whatever the other ranks do."""
        self.ended.wait()

    def wait(self) -> None:
        """Returns once the checkpoint is on disk; every rank must call it.

        Raises CheckpointError on every rank (disk full, no permission); older checkpoints are untouched then.
        """
        self.settle()
        if not any(gather(self.error is not None)):
            return
        error = self.error or RuntimeError("another rank could not write its part")
        if self.first:
            shutil.rmtree(self.partial, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError, CheckpointException)):
            raise error
        reason = WriteError.of(self.path, error)
        raise CheckpointError(f"checkpoint {reason}. Earlier checkpoints are whole; make room and run again") from error


def write(path: Path, tensors: dict[str, Tensor], rest: dict[str, Any], *, first: bool) -> Path:
    """Writes a folder of tensors from all ranks at once; see Save, also for the errors."""
    Save(path, tensors, rest, first=first)
    return path


def _load(path: Path, reader: _Reader, tensors: dict[str, Tensor]) -> None:
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
    parameters, state = dict(module.named_parameters()), {}
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, entry in index.items():
        if key.startswith("optimizer."):
            name, moment = key[len("optimizer.") :].rsplit(".", 1)
            number = int(name) if name.isdecimal() else None
            own = parameters[name] if number is None else numbered[number]
            fits = isinstance(own, DTensor) and entry.size == own.shape
            value = torch.empty_like(own) if fits else torch.empty(entry.size, dtype=entry.properties.dtype)
            state.setdefault(name if number is None else number, {})[moment] = value
    averaged = {name: torch.empty_like(value) for name, value in model.items() if f"model_ema.{name}" in index}
    content = {"model": model, "optimizer": {"state": state, "param_groups": rest["groups"]}}
    content |= {"model_ema": averaged} if averaged else {}
    _load(path, reader, named_tensors(content))
    return rest | content


def read_weights(path: Path) -> dict[str, Any]:
    """`model`, its tensors whole, with the rest but without the optimizer's state; in one process.

    Raises CheckpointError for another folder.
    """
    if not (path / ".metadata").is_file():
        if (path / "model.safetensors").is_file():
            raise CheckpointError(
                f"the folder {path} holds weights but no config.json, which save_pretrained wrote beside them"
            )
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
