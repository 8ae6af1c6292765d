"""Operators of torch.library with a shorter way to their kernels than torch.library.custom_op has.

Host time of a call beyond its kernel (torch 2.15, one core): 1.9 us in place of 4.8 without a gradient, 8.4 in place of 9.0
where one is wanted. The parts are torch.library's own: define, register_kernel, register_fake, register_autograd. What
custom_op does besides is left to others here:

    results that share memory with arguments   the tests, with torch.library.opcheck
    a refusal where no gradient is defined     the public functions, which detach what they pass on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd.graph import increment_version
from torch.library import Library

NAMESPACE = "umt_kernels"
# Of operators that take tensors of any strides. Without it a compiler copies what it has not stored yet, to be sure of the
# strides it traced, and stores it again for its other users.
ANY_STRIDES = (torch.Tag.flexible_layout,)

# What an operator has registered lives as long as its library.
_libraries: dict[str, Library] = {}


def _counted(fn: Callable[..., Any], mutated: Sequence[int]) -> Callable[..., Any]:
    """The function, after which autograd knows that these arguments have changed."""

    def run(*args: Any) -> Any:
        result = fn(*args)
        for i in mutated:
            if not args[i].is_inference():
                increment_version(args[i])
        return result

    return run


def operator(
    name: str, *, mutates_args: Sequence[str] = (), tags: Sequence[torch.Tag] = ANY_STRIDES
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Makes a function the operator umt_kernels::NAME, for tensors of every device.

    Args:
        name: of the operator. A second definition, as of a module that is loaded again, takes the place of the first.
        mutates_args: the names of the tensors that it writes to; it then returns nothing, and has no gradient.
        tags: of the operator.

    Returns:
        A decorator. An operator that returns something also needs register_fake. Without register_autograd its tensors must
        not require a gradient.
    """

    def register(fn: Callable[..., Any]) -> OpOverload:
        library = _libraries[name] = Library(
            NAMESPACE, "FRAGMENT"
        )  # a library that was there is gone with what it defined
        schema = torch.library.infer_schema(fn, mutates_args=mutates_args)
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        mutated = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]
        torch.library.register_kernel(op.name(), None, _counted(fn, mutated) if mutated else fn, lib=library)
        if mutated:
            register_fake(op)(lambda *args: None)
        return op

    return register


def register_fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function makes an operator's results without values, for tracing."""
    return torch.library.register_fake(op.name(), lib=_library(op))


def register_autograd(
    op: OpOverload, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
) -> None:
    """The gradient of an operator, as of torch.library.register_autograd."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library(op))


def _library(op: OpOverload) -> Library:
    return _libraries[op.name().removeprefix(f"{NAMESPACE}::")]
