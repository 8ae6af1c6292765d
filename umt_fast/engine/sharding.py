"""Several ranks: gradients averaged over replicas (DDP), or parameters, gradients and optimizer state in shards (FSDP2).

Under FSDP an objective's `trainable.shard_units` names the submodules whose parameters are gathered for their own forward
and backward only (blocks, called as modules); the other trained parameters are gathered for the whole step. Frozen
parameters stay whole on every rank: without gradient and optimizer state, in bf16, they cost an eighth of a trained one,
and gathering the teacher in each step would cost more than it saves. Scalars stay whole too: they cannot be cut.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from umt_fast.config import RunConfig

R = TypeVar("R")


def unit_dtype(run: RunConfig, device: torch.device) -> torch.dtype | None:
    """What units are gathered in: bf16 where their products compute in it, which halves bytes and memory; None: fp32.

    LayerNorms get bf16 weights then. A GPU's autocast takes them to fp32, a CPU's refuses them.
    """
    return torch.bfloat16 if run.dtype == "bf16" and device.type == "cuda" else None


def shard(objective: nn.Module, run: RunConfig, device: torch.device) -> None:
    """Cuts the trained parameters over all ranks, in place, block by block: no device ever holds the whole model.

    The shards, the gradients' sum (unless run.compress) and the optimizer are fp32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    reduced = torch.bfloat16 if run.compress == "bf16" else torch.float32
    whole = {parameter for parameter in objective.parameters() if not parameter.requires_grad or parameter.ndim == 0}
    # Inputs are not cast: the residual stream stays fp32, as without sharding.
    unit = MixedPrecisionPolicy(param_dtype=unit_dtype(run, device), reduce_dtype=reduced, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    for module in objective.trainable.shard_units:
        if any(parameter not in whole for parameter in module.parameters()):
            fully_shard(module, mesh=mesh, mp_policy=unit, ignored_params=whole)
    fully_shard(objective, mesh=mesh, mp_policy=rest, ignored_params=whole)


def replicate(module: nn.Module, run: RunConfig, *, unused: bool) -> DistributedDataParallel:
    """The module with gradients averaged over ranks. unused: some parameters get no gradient, the same in every step."""
    # Buffers are constant; newer releases call the switch that keeps them out of every step another name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    constant = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # DDP learns a static graph in the first backward pass and ends that pass with a reduction. With accumulation the first
    # pass must not reduce, and DDP fails with an internal error; a compiled module hides the graph.
    static = run.accumulate == 1 and not run.compile
    replica = DistributedDataParallel(
        module,
        gradient_as_bucket_view=True,
        static_graph=static,
        find_unused_parameters=unused and not static,
        **constant,
    )
    if run.compress == "bf16":
        replica.register_comm_hook(None, bf16_compress_hook)
    return replica


@contextlib.contextmanager
def micro_step(run_step: nn.Module, last: bool) -> Iterator[None]:
    """Around a forward and backward pass: gradients cross the network only in the last micro-step."""
    if isinstance(run_step, FSDPModule):
        run_step.set_requires_gradient_sync(last)
    quiet = isinstance(run_step, DistributedDataParallel) and not last
    with run_step.no_sync() if quiet else contextlib.nullcontext():
        yield


def within(objective: nn.Module, function: Callable[[], R]) -> R:
    """What a function gives that calls parts of an objective, for which a sharded one's parameters are gathered.

    Every rank must call it, and the function must call the same parts as often on each.
    """
    if not isinstance(objective, FSDPModule):
        return function()
    # A part that is called before the whole would take itself for the root of what is sharded.
    objective.call_within = lambda call: {"result": call()}
    register_fsdp_forward_method(objective, "call_within")
    try:
        return objective.call_within(function)["result"]
    finally:
        objective.reshard()  # no backward pass follows that would do it


def average_whole(parameters: list[nn.Parameter]) -> None:
    """Averages over ranks the gradients of parameters that sharding left whole."""
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        for parameter in parameters:
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, shards of all ranks included, as a plain tensor equal on every rank."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(state: Any, keep: bool) -> Any:
    """A nested state with every shard gathered, on the CPU; every rank must call it, those with `keep` get the values.

    One tensor at a time, so that no device holds more than one whole besides its shards. Without shards the tensors stay
    where they are.
    """
    if isinstance(state, DTensor):
        value = state.full_tensor()
        return value.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep) for value in state]
    return state


def _like(value: Tensor, reference: Tensor) -> Tensor:
    """value as reference is laid out; every rank has the same value, so nothing crosses the network."""
    if isinstance(reference, DTensor) and not isinstance(value, DTensor) and value.shape == reference.shape:
        value = value.to(reference.device)
        return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
    return value


def _size(state: dict[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "absent"


def load_average(values: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Copies stored averages of weights, of any layout, into those of a run. Raises ValueError where they do not fit."""
    unlike = [name for name in values if _size(stored, name) != _size(values, name)]
    if unlike:
        raise ValueError(f"averaged weights (model_ema) differ: {', '.join(unlike[:3])}")
    for name, value in values.items():
        value.copy_(_like(stored[name], value))


def named_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's saved state by parameter name; earlier versions counted the parameters in the order of their groups.

    Raises ValueError where the groups are not this optimizer's.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = state["param_groups"]
    if all(isinstance(number, int) for group in saved for number in group["params"]):
        flat = [name for group in own for name in group]
        moments = {flat[number]: values for number, values in state["state"].items() if number < len(flat)}
        following = iter(flat)
        saved = [
            {**group, "params": [next(following, "") for _ in group["params"]]}
            for group in _split_scalars(saved, optimizer.param_groups)
        ]
        state = {"state": moments, "param_groups": saved}
    if [sorted(group["params"]) for group in saved] != [sorted(group) for group in own]:
        raise ValueError(
            f"its {len(saved)} groups of parameters are not the {len(own)} of this run. Continue with the optimizer settings "
            "it was made with, or start a new run.out from these weights (--init)"
        )
    return state


def load_states(
    module: nn.Module, optimizer: torch.optim.Optimizer, model: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Loads states saved under any layout into a module and optimizer of any layout.

    Raises RuntimeError or ValueError where they do not fit.
    """
    own = module.state_dict()
    unlike = [
        f"{name} is {_size(model, name)} in the file, {_size(own, name)} in this run"
        for name in dict.fromkeys([*model, *own])
        if _size(model, name) != _size(own, name)
    ]
    if unlike:
        raise ValueError(
            f"{len(unlike)} tensors differ, the first: {'; '.join(unlike[:3])}. Continue with the model settings it was made "
            "with, or start a new run.out"
        )
    state = named_state(module, optimizer, state)
    parameters = dict(module.named_parameters())
    moments = {
        name: {key: _like(value, parameters[name]) for key, value in values.items()}
        for name, values in state["state"].items()
    }
    # torch makes moments by a step before it loads them, of no rate and no gradient, which changes no weight. It must not be a
    # skipped one: apex does not count the step after that.
    optimizer.found_inf = torch.zeros((), device=optimizer.param_groups[0]["params"][0].device)
    set_state_dict(
        module,
        optimizer,
        model_state_dict={name: _like(value, own[name]) for name, value in model.items()},
        optim_state_dict=state | {"state": moments},
        # A parameter that had no gradient so far has no moments. The names were compared above.
        options=StateDictOptions(strict=False),
    )


def _split_scalars(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups, or the optimizer's own where an earlier version kept scalars at the front of the last group."""
    sizes, expected = ([len(group["params"]) for group in groups] for groups in (saved, own))
    return own if len(expected) == 3 and sizes == [expected[0], expected[1] + expected[2]] else saved
