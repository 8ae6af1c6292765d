"""torch.compile for a GPU that is not there: Inductor lowers, fuses and writes its kernels, which nobody loads or runs.

Inductor sees tensors without values anyway (fake_gpu.py has them); what it asks of the device besides is answered here.
What it would decide by timing is left out: autotuning, off by default, and the padding of products whose rows are no multiple
of 16 bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._triton

from benchmarks.fake_gpu import OLDEST_TORCH, TORCH, fake_gpu
from kernels.build import resources

if TORCH < OLDEST_TORCH:
    raise ImportError(
        f"this is torch {torch.__version__}; predictions need {'.'.join(map(str, OLDEST_TORCH))} or newer"
    )

import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import triton
from torch import nn
from torch._dynamo import device_interface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_helpers import skip_gpu_driver_setup
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

# Streaming multiprocessors, by compute capability: an A100 of 80 GB, an H100 or H200 (SXM).
_PROCESSORS = {(8, 0): 108, (9, 0): 132}
_folding = joint_graph.UniformValueConstantFolder.run


class _Compiled(Exception):
    """Both graphs are compiled, and the first is about to run."""


class _Constants(TorchDispatchMode):
    """Makes on the host what is asked for on the device: Inductor reads single constants to fold them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        device = {"device": torch.device("cpu")} if kwargs and "device" in kwargs else {}
        return func(*args, **(kwargs or {}) | device)


def _fold(self: joint_graph.UniformValueConstantFolder, *args: Any, **keywords: Any) -> Any:
    with _Constants():
        return _folding(self, *args, **keywords)


def _unloaded(key: str, path: str, linemap: object = None, attrs: object = None) -> types.ModuleType:
    """The module of a compiled graph, which stops where it would run."""

    def call(arguments: list) -> None:
        raise _Compiled

    module = types.ModuleType(key)
    module.__file__, module.call = path, call
    return module


def _properties(capability: tuple[int, int]) -> types.SimpleNamespace:
    """What Inductor reads of torch.cuda.get_device_properties; the same for both generations but for the processors."""
    return types.SimpleNamespace(
        name="fake",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=_PROCESSORS[capability],
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        gcnArchName="",
    )


def _forget() -> None:
    """Clears what torch keeps of the answers: those of this machine before, those of the imagined one after."""
    DeviceProperties.create.cache_clear()
    for found in vars(torch.utils._triton).values():
        if hasattr(found, "cache_clear"):
            found.cache_clear()


@contextlib.contextmanager
def _answers(capability: tuple[int, int], note: Callable[[GraphLowering, str], None]) -> Iterator[None]:
    """What AOTAutograd and Inductor ask of CUDA, answered."""
    properties = _properties(capability)
    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    interface = {
        "current_device": cuda["current_device"],
        "device_count": cuda["device_count"],
        "get_device_properties": cuda["get_device_properties"],
        "exchange_device": cuda["_exchange_device"],
        "maybe_exchange_device": cuda["_maybe_exchange_device"],
    }
    replaced = [
        (PyCodeCache, {"load_by_key_path": staticmethod(_unloaded)}),
        (GraphLowering, {"save_output_code": staticmethod(lambda code: note(V.graph, code))}),
        (joint_graph, {"lazy_init": lambda device=None: None}),
        (joint_graph.UniformValueConstantFolder, {"run": _fold}),
        (triton.runtime.driver, {"_active": driver}),
        (torch.cuda, cuda),
        (device_interface.CudaInterface, {name: staticmethod(answer) for name, answer in interface.items()}),
        (device_interface, {"caching_worker_device_properties": {"cuda": [properties]}}),
    ]
    with contextlib.ExitStack() as stack:
        for owner, answers in replaced:
            stack.enter_context(mock.patch.multiple(owner, **answers))
        stack.enter_context(inductor_config.patch(compile_threads=1, force_disable_caches=True, shape_padding=False))
        stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True))
        _forget()
        try:
            yield
        finally:
            _forget()


def build(code: str, capability: tuple[int, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Compiles Inductor's kernels in a graph's code down to machine code; their names and resources (kernels/build.py).

    Of a kernel's candidates, between which a GPU would choose by time, the one that spills least counts.
    """
    with (
        _answers(capability, lambda graph, code: None),
        skip_gpu_driver_setup(),
        inductor_config.patch(use_static_triton_launcher=False),
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, source in dict(re.findall(r"async_compile\.triton\('(\w+)', '{3}(.*?)'{3}", code, re.S)).items():
            path = Path(folder) / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kernel = getattr(module, name)
            kernel.precompile(warm_cache_only=True)
            candidates = [resources(found.kernel.asm["cubin"]) for found in kernel.compile_results]
            yield name, min(candidates, key=lambda found: (found["spilled_bytes"], found["registers"]))


def lower(
    make: Callable[[torch.device], tuple[nn.Module, tuple]],
    capability: tuple[int, int],
    note: Callable[[GraphLowering, str], None],
    options: dict[str, Any],
) -> None:
    """Compiles a module and its backward pass, each as one graph, or fails as torch.compile would.

    make: gives module and arguments on a device. note: gets each graph once Inductor has scheduled it, and its code.
    options: of Inductor.
    """
    # Patterns are traced once; on a device that is there, as it does not matter on which.
    joint_graph.lazy_init(torch.device("cpu"))

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        with _answers(capability, note), inductor_config.patch(options):
            return compile_fx(graph, inputs)

    torch.compiler.reset()
    try:
        with fake_gpu(capability) as device:
            module, arguments = make(device)
            torch.compile(module, fullgraph=True, dynamic=False, backend=backend)(*arguments)
    except _Compiled:
        return
    finally:
        torch.compiler.reset()
    raise AssertionError("the compiled graph ran")
