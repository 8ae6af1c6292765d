"""torch.compile as runs use it: no graph is ever cut in silence."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

# Of Inductor. A sum of more than this many tensors is stored where several kernels read it, not computed anew in each: a
# transformer's residual stream then costs every kernel two reads, and not up to five.
OPTIONS = {"realize_reads_threshold": 2}

Pieces = Iterable[tuple[nn.Module, str]]


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, options=dict(OPTIONS))


def compiled(module: nn.Module) -> nn.Module:
    """The module as one graph for each shape of its inputs, or an error when it is called: a break would cost speed in
    silence."""
    return _whole(module)


def compile_pieces(pieces: Pieces) -> None:
    """Compiles methods of modules in place, each as one graph for each shape of its inputs, or an error when it is called.

    pieces: (module, name of its method). Modules of one class share their graphs: twelve blocks are one or two.
    """
    shared: dict[Callable[..., Any], Callable[..., Any]] = {}
    for module, name in pieces:
        function = getattr(type(module), name)
        if function not in shared:
            shared[function] = _whole(function)
        setattr(module, name, types.MethodType(shared[function], module))


def compiled_for_ddp(objective: nn.Module) -> nn.Module:
    """The objective for DistributedDataParallel, which sends each gradient as soon as the backward pass has it.

    One backward graph would give all gradients at its end, and nothing would be left to hide their way behind. An objective
    with `pieces()` is therefore compiled piece by piece (the teacher whole, the student block by block), any other one as
    one graph.
    """
    # Dynamo would cut every graph inside DDP's forward at the borders of its buckets, and say so nowhere.
    torch._dynamo.config.optimize_ddp = False
    pieces = getattr(objective, "pieces", None)
    if pieces is None:
        return compiled(objective)
    compile_pieces(pieces())
    return objective


def compiled_graphs() -> int:
    """Forward graphs compiled in this process so far, as the compiler got them: parts count where one was cut."""
    return counters["aot_autograd"]["ok"]
