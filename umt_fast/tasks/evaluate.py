"""`eval`: the figures of a checkpoint, which says by itself what it holds, or of a weights file whose model is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umt_fast.config import ConfigError, DataConfig, require
from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.sharded_checkpoint import read_weights as read_sharded
from umt_fast.models.description import MODELS, complete, found_in
from umt_fast.models.weights import UnreadableError, WeightsError, WeightsFile, kind_of, read_weights
from umt_fast.tasks.base import EvalOptions, task_named


def read_checkpoint(path: Path) -> WeightsFile:
    """The tensors of a checkpoint, file or folder, or of any weights file, and what lies beside them.

    Raises WeightsError, CheckpointError: nothing there, or nothing that can be read.
    """
    if not (path.is_file() or path.is_dir()):
        raise WeightsError(f"no checkpoint at {path}")
    try:
        if path.is_file():
            return read_weights(path)
        content = read_sharded(path)
    except UnreadableError as error:
        raise WeightsError(
            f"{path} is not a checkpoint of an umt_fast run, nor weights (truncated, or of another kind)"
        ) from error
    except (WeightsError, CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged folder fails in many ways
        raise WeightsError(f"{path} is not a checkpoint of an umt_fast run (truncated, or of another kind)") from error
    return WeightsFile(content.pop("model"), content)


def _described(file: WeightsFile, model: dict[str, Any] | None, checkpoint: Path) -> dict[str, Any]:
    """What the file says of its model; what was said of it where it says nothing."""
    own = found_in(file.rest, checkpoint)
    if (own or {}).get("task") == "pretraining" or (own is None and kind_of(file.state) == "stage-1"):
        raise WeightsError(
            f"{checkpoint} is of a stage-1 run; eval judges fine-tuned classifiers (accuracy) and stage-2 models (retrieval)"
        )
    if own is None and model is None:
        raise WeightsError(
            f"{checkpoint} does not say which model it is of; say it: --model {', '.join(MODELS)}, or a recipe as NAME:VARIANT"
        )
    if own is not None and model is not None:
        raise ConfigError(f"{checkpoint} says which model it is of (task {own['task']}); leave out --model")
    return own if model is None else complete(model, file.state, checkpoint)


def evaluate_checkpoint(
    checkpoint: Path,
    list_path: Path,
    data: DataConfig,
    *,
    ranks: Ranks,
    options: EvalOptions | None = None,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of a model on unseen clips, as its task judges it; over all ranks, the same on each.

    Args:
        list_path: labeled clips for a classifier; a caption list (see data/sources/entries.py) for retrieval.
        options: None: the defaults.
        model: the description (see models/description.py) of a file that has none; sizes it lacks are read from the tensors.

    Raises:
        WeightsError, CheckpointError: not readable, weights that are not of the sizes named, or of a kind that has nothing to
            be judged by (stage 1).
        ConfigError: a number out of its range, an option that the task does not read, a `model` for a file that describes
            its own.
        DataError: a list that cannot be read.
    """
    options = options or EvalOptions()
    for name, least in (("batch_size", 1), ("top_k", 0), ("memory_gib", 0)):
        value = getattr(options, name)
        require(value >= least, f"{name} is {value}; it must be at least {least}")
    file = read_checkpoint(checkpoint)
    described = _described(file, model, checkpoint)
    task = task_named(described["task"])
    return task.evaluate(file, described, checkpoint, list_path, data, options, ranks)
