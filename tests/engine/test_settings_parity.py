"""Rates, weight decay and parameter groups against the official settings: every configuration of every settings_* file."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.parity_files import parity_files
from umt_fast.config import FinetuneConfig, OptimConfig, Stage1Config, VitConfig
from umt_fast.engine.optim import build_optimizer
from umt_fast.engine.schedule import scaled, warmup_cosine, weight_decay_cosine
from umt_fast.models.classifier import Classifier
from umt_fast.models.student import Student
from umt_fast.tasks.classification import Supervised


def configurations() -> list:
    found = []
    for path in parity_files("settings"):
        with safe_open(path, "np") as file:
            names = json.loads(file.metadata()["config"])
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return found


def read(path: Path, name: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    with safe_open(path, "np") as file:
        return (
            json.loads(file.metadata()["config"])[name],
            file.get_tensor(f"{name}.lr"),
            file.get_tensor(f"{name}.weight_decay"),
        )


def arguments(case: dict[str, Any]) -> dict[str, list[str]]:
    """The official command line, option -> values."""
    found = re.findall(r"--(\w+)((?: (?!--)\S+)*)", case["arguments"])
    assert found
    return {name: values.split() for name, values in found}


def finetuning(case: dict[str, Any]) -> bool:
    return case["script"] == "run_class_finetuning"


def optim_of(case: dict[str, Any]) -> OptimConfig:
    """Ours for an official command line. What that leaves out is our default, which must be the official one."""
    given = arguments(case)
    defaults = (FinetuneConfig if finetuning(case) else Stage1Config)().optim
    own = {
        "lr": float,
        "min_lr": float,
        "warmup_lr": float,
        "weight_decay": float,
        "layer_decay": float,
        "opt_eps": float,
    }
    options = {name: read_as(given[name][0]) for name, read_as in own.items() if name in given}
    if "opt_betas" in given:
        options["betas"] = tuple(map(float, given["opt_betas"]))
    if "opt_eps" in options:
        options["eps"] = options.pop("opt_eps")
    base = {
        name: getattr(defaults, name) for name in ("lr", "min_lr", "warmup_lr", "weight_decay", "layer_decay", "betas")
    }
    return OptimConfig(**(base | options))


@pytest.mark.parametrize(("path", "name"), configurations())
def test_rate_of_each_step_parity(path: Path, name: str) -> None:
    case, wanted, _ = read(path, name)
    optim, schedule = optim_of(case), case["schedule"]
    batch = case["global_batch"] * int(arguments(case).get("num_sample", [2 if finetuning(case) else 1])[0])
    assert scaled(optim.lr, optim, batch) == pytest.approx(case["peak_lr"], rel=1e-12)
    assert scaled(optim.min_lr, optim, batch) == pytest.approx(case["min_lr"], rel=1e-12)
    rate = warmup_cosine(
        optim,
        global_batch=batch,
        steps_per_epoch=case["steps_per_epoch"],
        epochs=case["epochs"],
        warmup_epochs=schedule["warmup_epochs"],
        warmup_steps=max(0, schedule["warmup_steps"]),
    )
    assert len(wanted) == case["steps_per_epoch"] * case["epochs"]
    assert np.array([rate(step) for step in range(len(wanted))]) == pytest.approx(wanted, rel=1e-12, abs=0)


@pytest.mark.parametrize(("path", "name"), configurations())
def test_weight_decay_of_each_step_parity(path: Path, name: str) -> None:
    case, _, wanted = read(path, name)
    first = optim_of(case).weight_decay
    last = float(arguments(case).get("weight_decay_end", [first])[0])
    decay = weight_decay_cosine(first, last, len(wanted))
    assert np.array([decay(step) for step in range(len(wanted))]) == pytest.approx(wanted, rel=1e-12, abs=0)


def model_of(case: dict[str, Any], names: set[str]) -> Classifier | Student:
    """A narrow model of the case's depth."""
    frames = int(arguments(case).get("num_frames", [8])[0])
    vit = VitConfig(width=8, depth=case["depth"], num_heads=2, image_size=32, num_frames=frames, drop_path=0.0)
    if not finetuning(case):
        heads = len({key.split(".")[1] for key in names if key.startswith("clip_decoder.")})
        return Student(vit, heads, 16)
    return Classifier(vit, 10)


@pytest.mark.parametrize(("path", "name"), configurations())
def test_parameter_groups_parity(path: Path, name: str) -> None:
    """Which parameters have which rate and decay. The constant position table is a parameter of the official model alone."""
    case, _, _ = read(path, name)
    names = {key for group in case["groups"] for key in group["names"]}
    model, optim = model_of(case, names), optim_of(case)
    assert optim.layer_decay == case["layer_decay"]
    layer_of = None
    if finetuning(case):
        vit = VitConfig(width=8, depth=case["depth"], num_heads=2, image_size=32, num_frames=8)
        layer_of = Supervised(FinetuneConfig(student=vit)).layer_id
    optimizer = build_optimizer(model, optim, lr=1.0, layer_of=layer_of, num_layers=case["depth"] + 1)
    called = {id(parameter): key for key, parameter in model.named_parameters()}
    ours = {
        called[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    theirs = {
        key: (group["lr_scale"], group["weight_decay"])
        for group in case["groups"]
        for key in group["names"]
        if key != "pos_embed"
    }
    assert set(ours) == set(theirs)
    for key, values in theirs.items():
        assert ours[key] == pytest.approx(values, rel=1e-12), key
    groups = {frozenset(group["names"]) - {"pos_embed"} for group in case["groups"]}
    assert {frozenset(called[id(p)] for p in group["params"]) for group in optimizer.param_groups} == groups
    assert (
        list(optimizer.defaults["betas"]) == case["adamw"]["betas"]
        and optimizer.defaults["eps"] == case["adamw"]["eps"]
    )


def test_a_warm_up_in_steps_replaces_that_in_epochs() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_lr=0.0, lr_batch=0)
    rate = warmup_cosine(optim, global_batch=1, steps_per_epoch=10, epochs=3, warmup_epochs=2, warmup_steps=5)
    assert [rate(step) for step in (0, 2, 4, 5)] == pytest.approx([0, 0.5, 1, 1])
    assert rate(29) == pytest.approx((1 + np.cos(np.pi * 24 / 25)) / 2)
