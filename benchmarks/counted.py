"""Counts what the operations of a step ask of a device: FLOPs of matrix products, bytes read and written, bytes held.

An operation reads each of its tensors once and writes each of its results once; views and allocations are free; one that
picks rows reads these alone; one in place reads and writes what it changes. What a kernel keeps to itself (scratch space, a
second pass over its input) is not seen. It works on real tensors and on those of fake_gpu.py.

`count` runs a stage-1 step of either implementation of `bench stage1` on a GPU that is not there, and counts it: what
changes in a step then shows in a test, and a wait of the host too.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_gpu import fake_gpu, running_node
from kernels._launch import rows_per_program
from umt_fast.bench.measure import random_video
from umt_fast.bench.stage1 import fast_steps, plain_steps
from umt_fast.config import Stage1Config
from umt_fast.engine.distributed import Ranks
from umt_fast.masking import num_visible

aten, ours = torch.ops.aten, torch.ops.umt_kernels
# The caching allocator gives out whole multiples of this.
_GRAIN = 512
_UNWRITTEN = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# In-place operations that do not read what they overwrite.
_OVERWRITES = {
    aten.copy_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.normal_.default,
    aten.uniform_.default,
    aten.bernoulli_.float,
    aten.exponential_.default,
    aten.random_.default,
}
_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation with tensors on the device. part: teacher, student, backward, optimizer or rest. place: the module, or
    the node of the graph. products: FLOPs of matrix products in 16 bits or more; products8: in 8 bits."""

    part: str
    place: str
    name: str
    products: float
    products8: float
    bytes: float


@dataclass(slots=True)
class Counts:
    """Of a step. waits: how often the host waits for the device. host_bytes: copied between the two. peak: most bytes held
    at a time on the device."""

    operations: list[Operation] = field(default_factory=list)
    waits: int = 0
    host_bytes: float = 0.0
    peak: int = 0


def size_of(tensor: Tensor) -> int:
    """Bytes of the different elements: what is broadcast is read once."""
    extents = (extent for extent, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(extents) * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _by_schema(func: Any, args: tuple, kwargs: dict) -> Iterator[tuple[Tensor, bool, str]]:
    """Each tensor that goes in: is it changed, and the name of its argument."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            yield tensor, changed, argument.name


def _picked(func: Any, args: tuple, out: Any) -> float | None:
    """Bytes of operations that touch chosen rows of a tensor only, or None for all others."""
    if func in (aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.embedding.default):
        return 2 * size_of(out) + sum(map(size_of, _tensors(args[1:])))
    if func in (aten._index_put_impl_.default, aten.index_put_.default):
        accumulate = len(args) > 3 and args[3]
        return (3 if accumulate else 2) * size_of(args[2]) + sum(map(size_of, _tensors(args[1])))
    if func in (ours.token_gather.default, ours.gather_norm.default):
        return 2 * size_of(out) + sum(map(size_of, _tensors(args[1:])))
    if func is ours.patch_gather.default:
        video, visible = args[:2]
        return size_of(out) + out.numel() * video.element_size() + size_of(visible)
    if func in (ours.linear.default, ours.mlp.default, ours.input_gradient.default):
        given = _tensors(args)
        half = args[0].dtype
        # Inside, fp32 weights are rounded: written, and read by the product in place of them.
        weights = [args[1]] if func is not ours.mlp.default else [args[1], args[3]]
        inside = sum(weight.numel() * 2 * half.itemsize for weight in weights if weight.dtype != half)
        if func is ours.mlp.default:
            hidden = args[0].shape[0] * args[1].shape[0] * half.itemsize
            inside += hidden if out[2].numel() else 2 * hidden  # between the two products
        return inside + sum(map(size_of, given)) + sum(map(size_of, _tensors(out)))
    if func in (ours.align_loss.default, ours.align_loss_backward.default):
        first = func is ours.align_loss_backward.default
        student, _, visible, weight = args[first : first + 4]
        rows = 2 * size_of(student) + sum(map(size_of, _tensors([visible, weight, args[first + 4], out])))
        if first:
            layers, batch, n, width = student.shape
            parts = -(-batch * n // rows_per_program(layers * batch * n))
            rows += size_of(args[0]) + 2 * (2 * layers * parts * width * 4)
        return rows
    return None


def bytes_of(func: Any, args: tuple, kwargs: dict, out: Any, device: torch.device) -> float:
    """Bytes of `device` that an operation reads and writes."""
    given, results = list(_by_schema(func, args, kwargs)), _tensors(out)
    changing = any(changed for _, changed, _ in given)
    if not changing:
        inside = {_storage(tensor) for tensor, _, _ in given}
        results = [tensor for tensor in results if _storage(tensor) not in inside]
        if not results or func in _UNWRITTEN:
            return 0
    picked = _picked(func, args, out)
    if picked is not None:
        return picked
    moved = 0
    for tensor, changed, name in given:
        # The fused optimizers may scale gradients, and so call them changed; here they do not.
        changed = changed and not (func is aten._fused_adamw_.default and name == "grads")
        read = not changed or func not in _OVERWRITES
        moved += size_of(tensor) * (changed + read) * (tensor.device == device)
    return moved + sum(size_of(tensor) * (tensor.device == device) for tensor in results if not changing)


def products_of(func: Any, args: tuple, kwargs: dict, out: Any) -> tuple[float, float]:
    """FLOPs of matrix products, in 16 bits or more and in 8."""
    if func is ours.semantic_mask.default:
        return 2 * args[1].numel(), 0
    if func in (ours.linear.default, ours.input_gradient.default, ours.weight_gradient.default):
        inner = args[1].shape[1]
        return 2 * args[0].shape[0] * args[0].shape[1] * (args[1].shape[0] if func is ours.linear.default else inner), 0
    if func is ours.mlp.default:
        return 2 * args[0].shape[0] * (args[1].numel() + args[3].numel()), 0
    if func is ours.scaled_linear.default:
        return 0, 2 * args[0].shape[0] * args[2].numel()
    if func is aten._int_mm.default:
        return 0, 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    formula = flop_registry.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=out) if formula else 0
    return (0, flops) if flops and args[0].dtype in _EIGHT_BITS else (flops, 0)


class Memory:
    """Bytes of the storages on a device that are alive, and the most there were."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.held, self.peak = device, 0, 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def see(self, tensor: Tensor) -> None:
        """Notes a tensor's storage, once, until it is freed."""
        if tensor.device != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            taken = -(-storage.nbytes() // _GRAIN) * _GRAIN
            self._alive[key] = (weakref.ref(storage, lambda _: self._freed(key)), taken)
            self.held += taken
            self.peak = max(self.peak, self.held)

    def _freed(self, key: int) -> None:
        self.held -= self._alive.pop(key)[1]


class Counter(TorchDispatchMode):
    """Counts every operation while it is active; `restart` begins again, with what is held still held.

    visible_share: (kept, of), how many of a boolean index's entries are true: tensors without values cannot tell.
    """

    def __init__(self, device: torch.device, visible_share: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.device, self.visible_share = device, visible_share
        self.memory, self.counts = Memory(device), Counts()
        self._modules: list[str] = []
        self._optimizing = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Counter:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, *_: self._modules.append(type(module).__name__)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
            register_optimizer_step_pre_hook(lambda *_: self._optimize(True)),
            register_optimizer_step_post_hook(lambda *_: self._optimize(False)),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _leave(self) -> None:
        self._modules.pop()

    def _optimize(self, begins: bool) -> None:
        self._optimizing = begins

    def wait(self, device: torch.device | None = None) -> None:
        """What the host calls to wait for the device (in place of torch.cuda.synchronize)."""
        self.counts.waits += 1

    def restart(self) -> None:
        self.counts, self.memory.peak = Counts(), self.memory.held

    def finish(self) -> Counts:
        self.counts.peak = self.memory.peak
        return self.counts

    def _where(self) -> tuple[str, str]:
        """Part and place of what is running."""
        node = running_node()
        if self._optimizing:
            return "optimizer", ""
        if node is not None:
            return "backward", node.name()
        place = self._modules[-1] if self._modules else ""
        for part in ("Teacher", "Student"):
            if any(part in name for name in self._modules):
                return part.lower(), place
        return "rest", place

    def _note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        tensors = _tensors((args, kwargs, out))
        if not any(tensor.device == self.device for tensor in tensors):
            return
        for tensor in _tensors(out):
            self.memory.see(tensor)
        moved = bytes_of(func, args, kwargs, out, self.device)
        if moved:
            found = Operation(*self._where(), func.__name__, *products_of(func, args, kwargs, out), moved)
            self.counts.operations.append(found)

    def _note_host(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Copies between host and device: the host waits for those that are not told otherwise."""
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], out)
        if source.device != target.device:
            in_copy = func is aten.copy_.default and args[2:] == (True,)
            # Types are converted on the host's side.
            self.counts.host_bytes += size_of(source if source.device == self.device else target)
            self.counts.waits += not (kwargs.get("non_blocking") or in_copy)

    def _positions(self, mask: Tensor) -> list[Tensor]:
        """What a boolean index becomes before it is used: the positions of its true entries, which the host waits for."""
        kept, of = self.visible_share or (1, 1)
        found = [mask.new_empty(mask.numel() * kept // of, dtype=torch.int64) for _ in range(mask.ndim)]
        self.counts.waits += 1
        self._note(aten.nonzero.default, (mask,), {}, found)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.counts.waits += args[0].device == self.device
            return 1.0 if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        if func is aten.index_put.default and isinstance(args[0], FakeTensor):
            # The gradient of indexing; where tensors have values it is put in place, into zeros.
            func = aten._index_put_impl_.default
        if func in (aten.index.Tensor, aten._index_put_impl_.default) and isinstance(args[0], FakeTensor):
            indices = []
            for index in args[1]:
                boolean = index is not None and index.dtype == torch.bool
                indices += self._positions(index) if boolean else [index]
            args = (args[0], indices, *args[2:])
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_host(func, args, kwargs, out)
        self._note(func, args, kwargs, out)
        return out


def count(config: Stage1Config, implementation: Literal["fast", "plain"], capability: tuple[int, int]) -> Counts:
    """A step of run.batch_size clips on a GPU of this compute capability, the optimizer's state already there."""
    log = logging.getLogger("umt_fast")
    level = log.level
    log.setLevel(logging.ERROR)  # that the teacher is untrained does not matter here
    vit = config.student
    per_frame = (vit.image_size // vit.patch_size) ** 2
    share = (num_visible(per_frame, config.mask.ratio), per_frame)
    try:
        with (
            fake_gpu(capability) as device,
            Counter(device, share) as counter,
            mock.patch("torch.cuda.synchronize", counter.wait),
            mock.patch("umt_fast.engine.trainer.current_ranks", lambda run: Ranks(0, 1, device)),
            # Clips that are on the device need no way to it.
            mock.patch("umt_fast.engine.trainer.CudaLane"),
        ):
            video = random_video(config.run.batch_size, vit.num_frames, vit.image_size, device)
            step = (fast_steps if implementation == "fast" else plain_steps)(config, video, device)[0]
            step(0)
            counter.restart()
            step(1)
            return counter.finish()
    finally:
        log.setLevel(level)
