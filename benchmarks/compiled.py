"""What Inductor makes of the fast stage-1 step on a GPU, counted without one: predictions.

    python -m benchmarks.compiled [--model b16|l16] [--batch_size 64] [--gpu a100|h100|h200|all]

The step of `--run.compile` is compiled for a GPU that is not there (fake_inductor.py). Of each kernel that would be
launched, Inductor's own or a library's or ours, FLOPs and bytes are counted, the optimizer's as in predict.py, and

    bound = sum over kernels of max(FLOPs / matmul rate, bytes / copy rate)

with the rates of a datasheet. Inductor's kernels read each input and write each result once. `ideal` is the bound `fused` of
predict.py.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import triton
import tyro
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import get_fused_kernel_name

from benchmarks.counted import Counts, Operation, bytes_of, products_of
from benchmarks.fake_gpu import DEVICE
from benchmarks.fake_inductor import build, lower
from benchmarks.predict import CAPABILITIES, cells_of, check_request, count, figures, fused, top
from umt_fast.bench.measure import Model, random_video
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import ConfigError, Stage1Config
from umt_fast.engine.compiling import OPTIONS
from umt_fast.plan import SHEETS
from umt_fast.tasks.pretraining import UnmaskedAlignment

GENERATED = "generated: "
NOT_COUNTED = (
    "real kernels, which reach some 60 to 80% of such rates; what caches save; scratch memory and second passes inside kernels",
    "launches, unless a graph replays them (--run.cuda_graph)",
    "autotuning (max_autotune), which may put a pass into a matrix product where that is faster",
)


@dataclass(slots=True)
class Compiled:
    """Kernels of a step in the order of their launches, and the code of its graphs."""

    kernels: list[Operation] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Counted:
    """A step run eagerly, and the kernels of the same step compiled, its optimizer's too."""

    config: Stage1Config
    eager: Counts
    kernels: list[Operation]
    machine: dict[str, object] | None


def _place(node: BaseSchedulerNode, backward: bool) -> tuple[str, str]:
    """Part of the step and module of a kernel, by the first operation that has one."""
    for inner in node.get_nodes():
        for origin in inner.node.get_origins() if inner.node is not None else ():
            modules = list((origin.meta.get("nn_module_stack") or {}).values())
            if modules:
                path, kind = modules[-1]
                part = next((part for part in ("teacher", "student") if f".{part}" in path), "rest")
                return "backward" if backward else part, getattr(kind, "__name__", str(kind)).rpartition(".")[2]
    return "backward" if backward else "rest", ""


def _extern(node: ExternKernelSchedulerNode) -> tuple[str, float, float, float]:
    """Name, FLOPs in 16 bits or more and in 8, and bytes of a kernel that Inductor calls."""
    kernel = node.node
    origin = kernel.get_origin_node()
    if origin is None:  # of several results
        origin = next((other for other in kernel.get_origins() if other.target is kernel.op_overload), None)
    if origin is None or not isinstance(origin.target, torch._ops.OpOverload):
        return str(kernel.python_kernel_name), 0, 0, node.get_read_write_buffers_sizes()
    args, kwargs = torch.fx.node.map_arg((origin.args, origin.kwargs), lambda other: other.meta["val"])
    found = (origin.target, args, dict(kwargs), origin.meta["val"])
    return origin.target.__name__, *products_of(*found), bytes_of(*found, DEVICE)


def kernels_of(graph: GraphLowering) -> Iterator[Operation]:
    """The kernels of a scheduled graph."""
    for node in graph.scheduler.nodes:
        place = _place(node, graph.is_backward)
        if isinstance(node, ExternKernelSchedulerNode):
            if not isinstance(node.node, MultiOutput):
                yield Operation(*place, *_extern(node))
        elif not isinstance(node, NopKernelSchedulerNode):
            name = GENERATED + get_fused_kernel_name(node.get_nodes(), "original_aten").removeprefix("fused_")
            yield Operation(*place, name, 0, 0, node.get_read_write_buffers_sizes())


def compile_step(config: Stage1Config, capability: tuple[int, int]) -> Compiled:
    """Forward and backward of a step of run.batch_size clips, compiled for a GPU of this compute capability."""
    found = Compiled()
    log = logging.getLogger("umt_fast")
    level = log.level
    log.setLevel(logging.ERROR)  # that the teacher is untrained does not matter here

    def make(device: torch.device) -> tuple[nn.Module, tuple[dict[str, Tensor], Tensor]]:
        vit = config.student
        objective = UnmaskedAlignment(config).to(device).train()
        video = random_video(config.run.batch_size, vit.num_frames, vit.image_size, device)
        return objective, ({"video": video}, torch.zeros(1, dtype=torch.int64, device=device))

    def note(graph: GraphLowering, code: str) -> None:
        found.kernels += kernels_of(graph)
        found.code.append(code)

    try:
        lower(make, capability, note, OPTIONS)
    finally:
        log.setLevel(level)
    return found


def passes(kernels: list[Operation], matmul: float, copy: float) -> dict[str, dict[str, float]]:
    """Launches, ms and GB of the kernels by kind: products (also attention), calls (others that exist) and generated ones."""
    kinds = {"products": [], "calls": [], "generated": []}
    for kernel in kernels:
        made = "products" if kernel.products or kernel.products8 else "calls"
        kinds["generated" if kernel.name.startswith(GENERATED) else made].append(kernel)
    return {
        kind: {
            "launches": len(found),
            "ms": round(1e3 * sum(kernel.seconds(matmul, copy) for kernel in found), 3),
            "gb": round(sum(kernel.bytes for kernel in found) / 1e9, 3),
        }
        for kind, found in kinds.items()
    }


def resources_of(codes: list[str], capability: tuple[int, int]) -> dict[str, object]:
    """How many kernels Inductor wrote, and the bytes that a thread spills of those that do."""
    found = {(number, name): row for number, code in enumerate(codes) for name, row in build(code, capability)}
    spilling = {name: row["spilled_bytes"] for (_, name), row in found.items() if row["spilled_bytes"]}
    return {"kernels": len(found), "spilling": spilling}


def counted_step(config: Stage1Config, capability: tuple[int, int], built: bool) -> Counted:
    """The step of one precision of the teacher for one kind of GPU; built: with the resources of Inductor's kernels."""
    eager, compiled = count(config, "fast", capability), compile_step(config, capability)
    machine = resources_of(compiled.code, capability) if built else None
    compiled.kernels += [operation for operation in eager.operations if operation.part == "optimizer"]
    return Counted(config, eager, compiled.kernels, machine)


def predict(model: Model, batch_size: int, gpus: Iterable[str], most: int, built: bool = False) -> Iterator[dict]:
    """The JSON lines, one for each GPU; built: with the resources of Inductor's kernels."""
    known: dict[tuple[tuple[int, int], str], Counted] = {}
    for gpu in gpus:
        sheet, capability = SHEETS[gpu], CAPABILITIES[gpu]
        rates = (sheet.matmul, sheet.bandwidth)
        eight = "fp8" if capability >= (9, 0) else "int8"
        steps, kinds, machine = {}, {}, {}
        for precision, label in (("native", ""), (eight, f", {eight} teacher")):
            if (capability, precision) not in known:
                config = stage1_config(model, batch_size, "bf16", precision)
                known[capability, precision] = counted_step(config, capability, built)
            step = known[capability, precision]
            if step.machine is not None:
                machine[f"compiled{label}"] = step.machine
            kinds[f"compiled{label}"] = passes(step.kernels, *rates)
            steps[f"eager{label}"] = figures(step.eager, batch_size, *rates)
            steps[f"compiled{label}"] = figures(Counts(step.kernels), batch_size, *rates)
            del steps[f"compiled{label}"]["peak_memory_gib"]
            steps[f"ideal{label}"] = fused(step.config, sum(o.products8 for o in step.eager.operations), *rates)
        kernels = known[capability, "native"].kernels
        generated = [kernel for kernel in kernels if kernel.name.startswith(GENERATED)]
        yield {
            "bench": "compiled",
            "kind": "prediction",
            "model": model,
            "batch_size": batch_size,
            "gpu": sheet.name,
            "matmul_tflops": round(rates[0] / 1e12, 2),
            "copy_gb_per_s": round(rates[1] / 1e9, 1),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "steps": steps,
            "kinds": kinds,
            "built": machine,
            "most_ms": top(kernels, *rates, by="ms", most=most),
            "most_gb": top(generated, *rates, by="gb", most=most),
            "not_counted": NOT_COUNTED,
        }


def table(line: dict) -> str:
    """A line for people."""
    where = f"prediction: {line['gpu']}, {line['model']}, {line['batch_size']} clips"
    rows = [["prediction", "step", "bound ms", "clips/s at most", "TFLOP", "GB", "launches"], ["---"] * 7]
    for name, row in line["steps"].items():
        cells = [where, name, f"{row['bound_ms']:.2f}", f"{row['clips_per_s_at_most']:.0f}"]
        if "gb" in row:
            cells += [f"{row['tflop']:.2f}", f"{row['gb']:.1f}", row["operations"]]
        rows.append(cells + [""] * (7 - len(cells)))
    rows += [[], ["prediction", "kernels", "launches", "ms", "GB"], ["---"] * 5]
    for name, kinds in line["kinds"].items():
        for kind, row in kinds.items():
            rows.append([f"prediction: {name}", kind, row["launches"], f"{row['ms']:.2f}", f"{row['gb']:.1f}"])
    for title, key in (("by bound", "most_ms"), ("generated, by bytes", "most_gb")):
        if line[key]:
            rows += [[], [f"prediction: compiled, {title}", "place", "kernel", "launches", "ms", "GB"], ["---"] * 6]
            rows += cells_of(line[key])
    for name, row in line["built"].items():
        spilling = ", ".join(f"{kernel} ({size} bytes)" for kernel, size in row["spilling"].items()) or "none"
        rows += [
            [],
            ["prediction", "kernels built", "that spill"],
            ["---"] * 3,
            [f"prediction: {name}", row["kernels"], spilling],
        ]
    text = ["| " + " | ".join(map(str, row)) + " |" if row else "" for row in rows]
    rates = f"{line['matmul_tflops']:.0f} TFLOP/s and {line['copy_gb_per_s']:.0f} GB/s (datasheet)"
    text += ["", f"prediction at {rates}: sum over kernels of max(FLOPs / matmul rate, bytes / copy rate)."]
    text += ["ideal: every elementwise pass fused into a neighbor. Not in it:"]
    return "\n".join(text + [f"- {what}" for what in line["not_counted"]])


def main(
    model: Model = "b16",
    batch_size: int = 64,
    gpu: Literal["a100", "h100", "h200", "all"] = "h100",
    top: int = 12,
    build: bool = False,
) -> None:
    """Compile a whole stage-1 step for a GPU and predict its bound; needs none. One JSON line for each GPU, tables on stderr.

    Args:
        model: Student; the teacher is the official one of that size.
        batch_size: Clips per step.
        gpu: For which it is compiled, and whose datasheet gives the rates.
        top: How many of the most expensive kernels to list.
        build: Compile Inductor's kernels to machine code too (a second each) and name those that spill registers.
    """
    check_request(batch_size, top)
    for line in predict(model, batch_size, list(SHEETS) if gpu == "all" else [gpu], top, build):
        print(table(line), file=sys.stderr)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ConfigError as error:
        sys.exit(f"benchmarks.compiled: {error}")
