"""Schedules, parameter groups, and what the optimizer does with a step that is not finite."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.test_trainer import losses, trainer
from umt_fast.config import OptimConfig
from umt_fast.engine import checkpoint
from umt_fast.engine.optim import parameter_groups
from umt_fast.engine.schedule import warmup_cosine
from umt_fast.engine.trainer import NonFiniteError


def test_schedule_is_the_official_one() -> None:
    import numpy as np

    optim = OptimConfig(lr=1.5e-4, min_lr=1e-5, warmup_lr=0.0)
    rate = warmup_cosine(optim, global_batch=2048, steps_per_epoch=10, epochs=20, warmup_epochs=4)
    i = np.arange(160)
    rest = 8e-5 + 0.5 * (1.2e-3 - 8e-5) * (1 + np.cos(np.pi * i / 160))
    expected = np.concatenate([np.linspace(0, 1.2e-3, 40), rest])
    np.testing.assert_allclose([rate(step) for step in range(200)], expected, rtol=1e-12, atol=1e-18)


def test_decay_groups_and_layer_rates() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    groups = parameter_groups(module, OptimConfig(layer_decay=0.5, weight_decay=0.1), lambda name: int(name[0]), 2)
    seen = {(group["weight_decay"], group["lr_scale"], len(group["params"])) for group in groups}
    assert seen == {(0.1, 0.25, 1), (0.0, 0.25, 1), (0.0, 0.5, 2), (0.1, 1.0, 1), (0.0, 1.0, 1)}


def test_position_tables_are_not_decayed() -> None:
    module = nn.Module()
    module.pos_embed, module.weight = nn.Parameter(torch.zeros(1, 4, 3)), nn.Parameter(torch.zeros(4, 3))
    groups = parameter_groups(module, OptimConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (decay[id(module.pos_embed)], decay[id(module.weight)]) == (0.0, 0.1)


def test_a_run_that_apex_updated_continues(tmp_path: Path) -> None:
    """apex counts steps in its groups; moments and all that follows are the same."""
    trainer(tmp_path / "whole").train()
    trainer(tmp_path / "parts", max_steps=8).train()
    newest = checkpoint.checkpoints(tmp_path / "parts")[-1][1]
    content = torch.load(newest, weights_only=True)
    state = content["optimizer"]
    assert all(float(values.pop("step")) == 8 for values in state["state"].values())
    kept = ("params", "lr", "betas", "eps", "weight_decay", "lr_scale")
    state["param_groups"] = [
        {name: group[name] for name in kept} | {"step": 8, "bias_correction": True} for group in state["param_groups"]
    ]
    torch.save(content, newest)
    continued = trainer(tmp_path / "parts")
    continued.train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(group["fused"] for group in continued.optimizer.param_groups), "or found_inf would be ignored"


@pytest.mark.parametrize("poison", [0, 11, 23])
def test_a_bad_step_leaves_parameters_and_moments_alone(poison: int, tmp_path: Path) -> None:
    """Many steps between looks: what the update after the bad one sees must be what it would have seen without it."""
    run = trainer(tmp_path, poison=poison, log_every=100)
    states = []
    step = run.optimizer.step

    def watched() -> None:
        step()
        states.append([float(run.optimizer.found_inf), *(p.detach().clone() for p in run.parameters)])

    run.optimizer.step = watched
    with pytest.raises(NonFiniteError):
        run.train()
    bad = [number for number, state in enumerate(states) if state[0]]
    assert len(bad) == 1 and all(torch.isfinite(value).all() for state in states for value in state[1:])
    if bad[0]:
        assert all(torch.equal(a, b) for a, b in zip(states[bad[0]][1:], states[bad[0] - 1][1:], strict=True))
