"""apex's FusedAdam behind torch's interface, with a fake of the package: it needs a GPU and its own build."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from umt_fast.config import ConfigError, OptimConfig
from umt_fast.engine.apex_adamw import apex_adamw, apex_fused_adam
from umt_fast.engine.optim import build_optimizer, parameter_groups, upgraded_state
from umt_fast.engine.sharding import load_states


class FusedAdam(torch.optim.Optimizer):
    """What apex's class does in its capturable mode, by its source, in float64 arithmetic."""

    def __init__(self, params: Any, *, lr: float, betas: Any, eps: float, adam_w_mode: bool, capturable: bool) -> None:
        assert adam_w_mode and capturable
        defaults = {"lr": torch.tensor(lr), "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(params, defaults)
        self.set_grad_none, self.skip = True, torch.zeros(1)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None if self.set_grad_none else parameter.grad.zero_()

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor), "the kernel reads the rate on the device"
            # Counted before this step is known to be bad: the one after a bad one is not counted.
            counted = (self.skip != 1).int()
            group["step"] = group["step"] + counted if "step" in group else torch.ones(1, dtype=torch.int)
            device = group["params"][0].device
            self.skip = grad_scaler._check_inf_per_device(self)[device].reshape(1).clone()
            scale = grad_scaler._get_scale_async()
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                if not self.skip:
                    self._update(parameter, parameter.grad / scale, state, group)

    @staticmethod
    @torch.no_grad()
    def _update(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (first, second), count = group["betas"], int(group["step"])
        m = first * state["exp_avg"].double() + (1 - first) * grad.double()
        v = second * state["exp_avg_sq"].double() + (1 - second) * grad.double() ** 2
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        change = m / (1 - first**count) / ((v / (1 - second**count)).sqrt() + group["eps"])
        parameter -= float(group["lr"]) * (change + group["weight_decay"] * parameter.double()).float()


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = package.optimizers = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


OPTIM = OptimConfig(lr=0.1, weight_decay=0.1, betas=(0.8, 0.9))


def pair(kind: str) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    if kind == "torch":
        return module, build_optimizer(module, OPTIM, lr=OPTIM.lr)
    groups = parameter_groups(module, OPTIM)
    return module, apex_adamw(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)


def run(module: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: range, bad: int = -1) -> None:
    """As the trainer steps: gradients, rate, found_inf, step, zero_grad."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == bad:
                parameter.grad[0] = float("nan")
        norm = sum(parameter.grad.norm() for parameter in module.parameters())
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step) * group["lr_scale"]
        optimizer.found_inf = torch.isfinite(norm).logical_not().float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(parameter.grad is None for parameter in module.parameters())


def values(module: torch.nn.Linear) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("bad", [-1, 0, 3])
def test_steps_and_skipped_steps_are_those_of_torch(apex: None, bad: int) -> None:
    found = []
    for kind in ("torch", "apex"):
        module, optimizer = pair(kind)
        run(module, optimizer, range(6), bad)
        found.append(values(module))
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("first", "then"), [("torch", "apex"), ("apex", "torch"), ("apex", "apex")])
def test_a_run_continues_under_either(apex: None, first: str, then: str) -> None:
    whole, optimizer = pair("torch")
    run(whole, optimizer, range(8))
    module, optimizer = pair(first)
    run(module, optimizer, range(4))
    other, continued = pair(then)
    load_states(other, continued, module.state_dict(), upgraded_state(optimizer.state_dict(), continued))
    run(other, continued, range(4, 8))
    torch.testing.assert_close(values(other), values(whole), rtol=1e-5, atol=1e-6)


def test_gradients_may_stay_in_place(apex: None) -> None:
    module, optimizer = pair("apex")
    module.weight.grad, module.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert (module.weight.grad == 0).all()


def test_it_needs_a_gpu(apex: None) -> None:
    with pytest.raises(ConfigError, match="optim.fused"):
        build_optimizer(torch.nn.Linear(3, 2), OptimConfig(fused="apex"), lr=0.1)


def test_the_other_apex_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")  # the registry's package has no optimizers
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="NVIDIA/apex"):
        apex_fused_adam()
