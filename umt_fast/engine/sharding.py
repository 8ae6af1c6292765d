"""Several ranks: gradients averaged over replicas (DDP), or parameters, gradients and optimizer state in shards (FSDP2).

Under FSDP an objective's `trainable.shard_units` names the submodules whose parameters are gathered for their own forward
and backward only (blocks, called as modules); the other trained parameters are gathered for the whole step. Frozen
parameters stay whole on every rank: without gradient and optimizer state, in bf16, they cost an eighth of a trained one,
and gathering the teacher in each step would cost more than it saves. Scalars stay whole too: they cannot be cut.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from umt_fast.config import RunConfig


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


def states(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The module's state and the optimizer's, both by parameter name; every rank must call it.

    whole: the shards gathered one tensor at a time on the first rank's CPU; the other ranks get nothing. Otherwise each rank
    gets its shards, where they are.
    """
    return get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=whole, cpu_offload=whole))


def _size(state: dict[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "absent"


def named_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's saved state by parameter name; earlier versions counted the parameters in the order of their groups.

    Raises ValueError where the groups are not this optimizer's.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = state["param_groups"]
    if all(isinstance(number, int) for group in saved for number in group["params"]):
        flat = [name for group in own for name in group]
        saved = _split_scalars(saved, optimizer.param_groups)
        moments = {flat[number]: values for number, values in state["state"].items() if number < len(flat)}
        groups = iter(flat)
        saved = [{**group, "params": [next(groups, "") for _ in group["params"]]} for group in saved]
        state = {"state": moments, "param_groups": saved}
    if [sorted(group["params"]) for group in saved] != [sorted(group) for group in own]:
        raise ValueError(
            f"its {len(saved)} groups of parameters are not the {len(own)} of this run. Continue with the optimizer settings "
            "it was made with, or start a new run.out from these weights (--init)"
        )
    return state


def load_states(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    model: dict[str, Tensor],
    state: dict[str, Any],
    *,
    whole: bool = True,
) -> None:
    """Loads states saved under any layout into a module and optimizer of any layout.

    whole: the tensors are those of all ranks, equal on each; otherwise they are laid out as the module's and optimizer's.

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
    # torch makes the moments by a step before it fills them; this step must change nothing and count for nothing. It makes
    # none where a gradient is left.
    optimizer.zero_grad(set_to_none=True)
    optimizer.found_inf = torch.ones((), device=optimizer.param_groups[0]["params"][0].device)
    # Not strict: a parameter that never had a gradient has no moments. The names were compared above.
    options = StateDictOptions(full_state_dict=whole, strict=False)
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=state, options=options)


def _split_scalars(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups, or the optimizer's own where an earlier version kept scalars at the front of the last group."""
    sizes, expected = ([len(group["params"]) for group in groups] for groups in (saved, own))
    return own if len(expected) == 3 and sizes == [expected[0], expected[1] + expected[2]] else saved
