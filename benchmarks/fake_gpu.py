"""A GPU that is not there: tensors with shapes and types and no values, which PyTorch and our code take for CUDA tensors.

`fake_gpu` is a context in which the code of a training step runs as it would on a GPU, as far as which operations follow
which: every branch on the device, every cast of CUDA's autocast, the fused optimizers. Nothing is computed. What PyTorch
asks a real GPU for is answered here instead; autograd's engine needs one even for such tensors, so the graph is walked in
Python.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

_real_linspace = torch.linspace
DEVICE = torch.device("cuda", 0)
# Older ones do not show the graph of an operator of our own.
OLDEST_TORCH = (2, 15)
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
_running: list[Any] = []


def running_node() -> Any | None:
    """The node of the graph that `run_backward` is running, or summing gradients for, if it is."""
    return _running[-1] if _running else None


@contextlib.contextmanager
def _marked(node: Any) -> Iterator[None]:
    _running.append(node)
    try:
        yield
    finally:
        _running.pop()


def _dependencies(roots: Sequence[Any]) -> dict[Any, int]:
    """How many edges of the graph below `roots` lead to each node."""
    waits = dict.fromkeys(roots, 0)
    stack = list(roots)
    while stack:
        for follower, _ in stack.pop().next_functions:
            if follower is not None:
                if follower not in waits:
                    waits[follower] = 0
                    stack.append(follower)
                waits[follower] += 1
    return waits


def _accumulate(variable: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if variable.grad is not None:
        variable.grad.add_(gradient)
    elif gradient.stride() == variable.stride():
        variable.grad = gradient
    else:
        variable.grad = torch.empty_like(variable).copy_(gradient)


def _above(ends: Iterable[Any], nodes: Iterable[Any]) -> set[Any]:
    """Those of the nodes whose running leads to one of the ends."""
    users = defaultdict(list)
    for node in nodes:
        for follower, _ in node.next_functions:
            users[follower].append(node)
    found, stack = set(), list(ends)
    while stack:
        new = [user for user in users[stack.pop()] if user not in found]
        found.update(new)
        stack += new
    return found


def _edge_of(tensor: Tensor) -> tuple[Any, int]:
    """The node that receives a tensor's gradient, and in which place."""
    node = tensor.grad_fn
    return (node, tensor.output_nr) if node is not None else (tensor.view_as(tensor).grad_fn.next_functions[0][0], 0)


@torch.no_grad()
def run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    keep_graph: bool = False,
    create_graph: bool = False,
    inputs: Sequence[Tensor] = (),
    allow_unused: bool = True,
    *,
    accumulate_grad: bool,
    **_: object,
) -> tuple[Tensor | None, ...]:
    """What torch.autograd's engine does for `backward()` and `grad()`, in its order, without a device's streams and threads.

    The graph is given up on the way of `backward()`, so that what a node has saved is freed once the node has run.
    """
    ready, received = [], {}
    nodes = [output.grad_fn for output in outputs]
    waits = _dependencies(nodes)
    with torch.enable_grad():
        wanted_at = [] if accumulate_grad else [_edge_of(tensor) for tensor in inputs]
    ends = {node for node, _ in wanted_at}
    # Nobody asks for what the others give, and some must not run.
    idle = set() if accumulate_grad else waits.keys() - _above(ends, waits)
    wanted = {}

    def give(node: Any, place: int, gradient: Tensor | None) -> None:
        slots = received.setdefault(node, [None] * len(node._input_metadata))
        if gradient is None:
            return
        with _marked(node):
            told = node._input_metadata[place]
            # Formulas leave it to the engine to undo broadcasting.
            gradient = gradient.sum_to_size(told.shape).to(told.dtype)
            slots[place] = gradient if slots[place] is None else slots[place] + gradient

    for output, node, gradient in zip(outputs, nodes, gradients, strict=True):
        give(node, output.output_nr, gradient)
        heapq.heappush(ready, (-node._sequence_nr(), id(node), node))
        if accumulate_grad:
            # The caller's tensor would keep the whole graph.
            output.detach_()
    del nodes, node
    while ready:
        node = heapq.heappop(ready)[2]
        slots, edges = received.pop(node, [None]), node.next_functions
        del waits[node]
        found: Any = ()
        with _marked(node):
            if node in ends:
                wanted[node] = list(slots)
            if hasattr(node, "variable"):
                if accumulate_grad:
                    _accumulate(node.variable, slots[0])
            elif node not in idle and any(slot is not None for slot in slots):
                written_in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
                found = node.apply(*slots) if written_in_python else node(*slots)
        slots.clear()
        found = list(found) if isinstance(found, tuple | list) else [found]
        found += [None] * (len(edges) - len(found))
        for number, (follower, place) in enumerate(edges):
            if follower is not None:
                give(follower, place, found[number])
                found[number] = None
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(ready, (-follower._sequence_nr(), id(follower), follower))
        del node, edges
    return tuple(wanted[node][place] if node in wanted else None for node, place in wanted_at)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What F.scaled_dot_product_attention takes on a GPU for half precision without a mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]


def _moved(self: nn.Module, device: torch.device) -> nn.Module:
    """nn.Module.to; torch's swaps the values of parameters in place, which fake ones do not allow."""
    for module in self.modules():
        for name, value in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(value.detach().to(device), value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))
    return self


def _linspace(*args: Any, **keywords: Any) -> Tensor:
    """torch.linspace with values: rates of blocks are read from it on the host."""
    with unset_fake_temporarily():
        return _real_linspace(*args, **keywords)


@contextlib.contextmanager
def fake_gpu(capability: tuple[int, int]) -> Iterator[torch.device]:
    """A context whose device is a GPU of this compute capability; gives that device."""
    # torch's lists of what the optimizers' combined kernels take know no fake tensors.
    native = [Tensor, nn.Parameter, FakeTensor]
    replaced = [
        ("torch.cuda.get_device_capability", lambda device=None: capability),
        ("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
        ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        ("torch.linspace", _linspace),
        ("torch.optim.optimizer._foreach_supported_types", native),
        ("torch.utils._foreach_utils._foreach_supported_types", native),
        ("torch.autograd._engine_run_backward", run_backward),
    ]
    with contextlib.ExitStack() as stack:
        for name, value in replaced:
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash))
        stack.enter_context(mock.patch.object(nn.Module, "to", _moved))
        # Tables made by numpy are no fake tensors.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield DEVICE
