"""run.tune for every task: which settings it may change, what it times, and where a run has its choice from.

The choice of a continued run is the one in its checkpoint, whatever the cache says. Else the device is asked (engine/tune.py)
with random clips and random weights, on the first rank's device alone: the ranks' exchange of gradients, which hides behind
the backward pass more or less well, is not in the figures, nor is decoding.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import typing
from pathlib import Path
from typing import Any

import torch

from umt_fast.config import ConfigError, RunConfig, TeacherConfig, from_dict, to_dict
from umt_fast.engine import checkpoint, tune, tune_store
from umt_fast.engine.distributed import Ranks, current_ranks
from umt_fast.engine.graphed import require_graphs
from umt_fast.engine.sharded_checkpoint import REST
from umt_fast.engine.tune_measure import Case
from umt_fast.engine.tune_process import Result, run_candidate
from umt_fast.models.attention import require_attention
from umt_fast.models.linear import require_linear
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.tasks.base import task_named, task_of

log = logging.getLogger("umt_fast")


# Settings that may be chosen: section and field.
AXES = {
    "compile": ("run", "compile"),
    "cuda_graph": ("run", "cuda_graph"),
    "attention": ("run", "attention"),
    "linear": ("run", "linear"),
    "precision": ("teacher", "precision"),
}
_SECTIONS = {"run": RunConfig, "teacher": TeacherConfig}
# Attention backends that are packages of their own, and those that no CPU has.
_PACKAGES = ("flash_attn", "xformers")
_GPU_ONLY = (*_PACKAGES, "efficient", "cudnn")
# What of a run leaves a step as it is.
_IRRELEVANT = (
    "out",
    "seed",
    "epochs",
    "warmup_epochs",
    "max_steps",
    "log_every",
    "save_every",
    "checkpoint",
    "async_save",
    "keep",
    "keep_every_epochs",
    "resume",
    "tensorboard",
    "tune_deadline",
)
# Of an optimizer.
_NUMBERS = ("lr", "min_lr", "warmup_lr", "lr_batch", "betas", "eps", "weight_decay")


def settings_of(config: Any) -> tune.Candidate:
    """The values that a configuration has for AXES, as far as its kind has them."""
    found = {}
    for name, (section, field) in AXES.items():
        part = getattr(config, section, None)
        if hasattr(part, field):
            found[name] = getattr(part, field)
    return found


def _default(name: str) -> Any:
    section, field = AXES[name]
    return getattr(_SECTIONS[section](), field)


def free(config: Any) -> list[str]:
    """The settings left at their default: whoever set one keeps it."""
    return [name for name, value in settings_of(config).items() if value == _default(name)]


def with_settings(config: Any, settings: tune.Candidate) -> Any:
    """A copy with these settings. Raises ConfigError where they do not go together."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, field = AXES[name]
        changes.setdefault(section, {})[field] = value
    parts = {section: dataclasses.replace(getattr(config, section), **values) for section, values in changes.items()}
    return dataclasses.replace(config, **parts)


def why_not(config: Any, settings: tune.Candidate, ranks: Ranks) -> str:
    """Why a run of this configuration cannot have these settings here, or an empty text."""
    if settings.get("linear") == "fused":
        if not getattr(task_of(config), "fuses_linear", False):
            return f"run.linear fused is for stage 1, not task {task_of(config).name}"
        if ranks.device.type != "cuda":
            return "run.linear fused needs a GPU"
    if ranks.device.type != "cuda" and settings.get("attention") in _GPU_ONLY:
        return f"run.attention {settings['attention']} needs a GPU"
    if settings.get("attention") in _PACKAGES and importlib.util.find_spec(settings["attention"]) is None:
        return f"{settings['attention']} is not installed"
    try:
        candidate = with_settings(config, settings)
        if candidate.run.cuda_graph:
            require_graphs(ranks.device, ranks.world_size)
        if "precision" in settings:
            require_precision(candidate.teacher, ranks.device)
    except ConfigError as error:
        return str(error)
    return ""


def space(config: Any, ranks: Ranks) -> list[tune.Candidate]:
    """Every combination of the free settings in run.tune_axes that is possible here, the configured one first."""
    given = settings_of(config)
    values = []
    for name, value in given.items():
        section, field = AXES[name]
        hint = typing.get_type_hints(_SECTIONS[section])[field]
        others = (False, True) if hint is bool else typing.get_args(hint)
        chosen = name in free(config) and name in config.run.tune_axes
        values.append([value, *(other for other in others if chosen and other != value)])
    every = (dict(zip(given, combination, strict=True)) for combination in itertools.product(*values))
    return [settings for settings in every if settings == given or not why_not(config, settings, ranks)]


def _of_checkpoint(config: Any, ranks: Ranks) -> tune.Candidate | None:
    """The settings with which a tuned run saved its newest checkpoint; None where there is none, or this is no place for them.

    Settings that are not free now stay as they are configured.
    """

    def read(path: Path) -> dict[str, Any]:
        if path.is_dir():
            return torch.load(path / REST, map_location="cpu", weights_only=True)
        # Mapped: the weights are not read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    newest = checkpoint.load_newest(Path(config.run.out), read) if config.run.resume else None
    if newest is None:
        return None
    path, content = newest
    record = content.get("config") or {}
    if record.get("run", {}).get("tune", "off") == "off":
        return None
    settings = settings_of(config)
    for name in free(config):
        section, field = AXES[name]
        settings[name] = record.get(section, {}).get(field, _default(name))
    refusal = why_not(config, settings, ranks)
    if refusal:
        log.warning("WARNING: run.tune cannot go on with %s of %s: %s", tune.label(settings), path, refusal)
        return None
    log.info("run.tune: %s, as in %s", tune.label(settings), path)
    return settings


def key_of(config: Any, world_size: int, machine: dict[str, Any]) -> dict[str, Any]:
    """What the fastest way may depend on: machine and software, model, shapes, and the settings that are not free."""
    record = to_dict(config)
    run = {name: value for name, value in record.pop("run").items() if name not in _IRRELEVANT}
    optim, data = record.pop("optim"), record.pop("data")
    for name in ("init", "bert", "tokenizer"):
        record.pop(name, None)
    for name in ("videos", "images"):  # whether there are any
        if name in record:
            record[name] = bool(record[name])
    if "teacher" in record:
        record["teacher"].pop("weights")
    shapes = {"run": run, "num_sample": data["num_sample"], "world_size": world_size}
    optim = {name: value for name, value in optim.items() if name not in _NUMBERS} | {
        "clip_grad": optim["clip_grad"] > 0
    }
    return {"machine": machine, "task": task_of(config).name, "shapes": shapes, "optim": optim, "model": record}


def settle(config: Any, ranks: Ranks) -> None:
    """Writes the settings that run.tune chooses into the configuration, the same on every rank; nothing where it is off.

    Raises ConfigError: ranks with different devices. CheckpointError: no checkpoint of the run can be read.
    """
    if config.run.tune == "off":
        return
    tune.same_devices(tune_store.device_name(ranks.device))

    def find() -> tune.Candidate:
        settings = _of_checkpoint(config, ranks)
        if settings is not None:
            return settings
        candidates = tune.shortlist(space(config, ranks), settings_of(config), config.run.tune)
        key = key_of(config, ranks.world_size, tune_store.machine(ranks.device))
        return tune.choose(candidates, key, Path(config.run.out), lambda candidate: _ask(config, candidate))

    settled = with_settings(config, tune.on_first_rank(find, ranks))
    for section in _SECTIONS:
        if hasattr(config, section):
            setattr(config, section, getattr(settled, section))


def _ask(config: Any, candidate: tune.Candidate) -> Result:
    eager = with_settings(config, candidate | {"compile": False, "cuda_graph": False})
    for name in ("attention", "linear"):
        if name in candidate:
            eager = with_settings(eager, {name: settings_of(config)[name]})
    request = {
        "candidate": candidate,
        "builder": "umt_fast.tasks.tuning:build_case",
        "task": task_of(config).name,
        "record": to_dict(with_settings(config, candidate)),
        "reference": to_dict(eager),
    }
    return run_candidate(request, config.run.tune_deadline)


def build_case(task: str, record: dict[str, Any], exact: bool) -> Case:
    """The training step of a configuration's record, with random weights and random batches, the same at every call.

    task: its name. exact: without drop path and dropout, so that two ways of computing can be compared.
    """
    kind = task_named(task)
    config = from_dict(kind.Config, record)
    # A trainer of one process, which saves nothing.
    config.run = dataclasses.replace(config.run, parallel="ddp", compress="none")
    if exact:
        config = kind.without_noise(config)
    require_attention(config, current_ranks(config.run).device)
    require_linear(config, current_ranks(config.run).device)
    torch.manual_seed(config.run.seed)
    objective = kind.untrained(config)
    return Case(
        run=config.run,
        optim=config.optim,
        objective=objective,
        batches=kind.random_batches(config),
        num_sample=config.data.num_sample,
        layer_of=getattr(objective, "layer_id", None),
        num_layers=config.student.depth + 1,
    )
