"""`eval`: the figures of a checkpoint, which says by itself what it holds, or of a weights file whose model is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umt_fast.config import ConfigError, by_option
from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.sharded_checkpoint import read_weights as read_sharded
from umt_fast.models.description import MODELS, complete, found_in
from umt_fast.models.weights import (
    UnreadableError,
    WeightsError,
    WeightsFile,
    is_saved_folder,
    kind_of,
    read_weights,
)
from umt_fast.models.weights.finetune import deepspeed_file, is_deepspeed
from umt_fast.tasks.base import EvalOptions, evaluation_named, evaluations_of


def read_checkpoint(path: Path) -> WeightsFile:
    """The tensors of a checkpoint, file or folder, of any weights file or of a folder that save_pretrained wrote, and what
    lies beside them.

    Raises WeightsError, CheckpointError: nothing there, or nothing that can be read.
    """
    if not (path.is_file() or path.is_dir()):
        raise WeightsError(f"no checkpoint at {path}")
    try:
        if is_deepspeed(path):
            path = deepspeed_file(path)
        if path.is_file() or is_saved_folder(path):
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


def _described(file: WeightsFile, model: dict[str, Any] | None, checkpoint: Path, name: str) -> dict[str, Any]:
    """What the file says of its model; what was said of it where it says nothing."""
    own = found_in(file.rest, checkpoint)
    stage1 = (own or {}).get("task") == "pretraining" or (own is None and kind_of(file.state) == "stage-1")
    if stage1 and "pretraining" not in evaluation_named(name).tasks:
        fitting = "".join(f"`eval {other}`, " for other in evaluations_of("pretraining"))
        raise WeightsError(
            f"{checkpoint} is of a stage-1 run, which `eval {name}` does not judge; {fitting}fine-tune it, or `embed` clips"
        )
    if own is None and model is None:
        raise WeightsError(
            f"{checkpoint} does not say which model it is of; say it: --model {', '.join(MODELS)}, or a recipe as NAME:VARIANT"
        )
    if own is not None and model is not None:
        raise ConfigError(f"{checkpoint} says which model it is of (task {own['task']}); leave out --model")
    if own is not None:
        return own
    # Classes are those of the file: a recipe's number is only usual, and the official scripts take it as an option.
    return complete(model | ({"num_classes": None} if "num_classes" in model else {}), file.state, checkpoint)


def evaluate_checkpoint(
    name: str,
    checkpoint: Path,
    list_path: Path,
    *,
    ranks: Ranks,
    options: EvalOptions | None = None,
    model: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of a model on unseen clips; over all ranks, the same on each.

    Args:
        name: of the evaluation, as classify or retrieve (umt_fast.tasks.EVALUATIONS).
        list_path: the clips; what kind of list, the evaluation says.
        options: of the evaluation's Options. None: the defaults.
        model: the description (see models/description.py) of a file that has none; sizes it lacks are read from the tensors.
        settings: what a checkpoint's own `config` would say of the run of `model`, as its tokenizer and where movies lie.

    Raises:
        WeightsError, CheckpointError: not readable, weights that are not of the sizes named, or of a task that this
            evaluation does not judge.
        ConfigError: no such evaluation, a `model` for a file that describes its own.
        DataError: a list that cannot be read.
    """
    evaluation = evaluation_named(name)
    options = evaluation.Options() if options is None else options
    file = read_checkpoint(checkpoint)
    described = _described(file, model, checkpoint, name)
    if described["task"] not in evaluation.tasks:
        fitting = (
            " or ".join(f"`eval {other}`" for other in evaluations_of(described["task"])) or "none; `embed` its clips"
        )
        raise WeightsError(
            f"{checkpoint} is of task {described['task']!r}, which `eval {name}` does not judge: {fitting}"
        )
    if settings:
        file = file._replace(rest=file.rest | {"config": settings})
    data = by_option("data", options.data)
    return evaluation.run(file, described, checkpoint, list_path, data, options, ranks)
