"""The rates of bounds and plans: `python -m benchmarks.rates machine`, then `... products SIZE ...`; gpu.py runs both.

A step's matrix products at their real shapes, forward and for both gradients, in bf16 and 8 bits; attention by backend; a
copy. Writes rates.jsonl and rates.json, one line, which `python -m umt_fast plan --measured` takes once steps are measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

import kernels
from benchmarks.bench_kernels import spans_of
from benchmarks.timing import DEVICE, GPU, Clocks, Lines, Row, about, out_folder, short, spread
from umt_fast.bench.stage1 import stage1_config
from umt_fast.engine.precision import cpu_has_bf16
from umt_fast.files import write_json
from umt_fast.models.flops import grid_of, visible_of

DTYPE = torch.bfloat16 if GPU or cpu_has_bf16() else torch.float32
NAME = "bf16" if DTYPE == torch.bfloat16 else "fp32"
HOW = (
    "median of calls timed one by one by CUDA events, L2 cache cold, the device idle until the call was launched; random values"
    if GPU
    else "median of calls timed one by one by the clock; random values"
)
CLIPS = {"tiny": 2, "b16": 64, "l16": 32}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Shape:
    """A linear layer: x (rows, inputs) -> (rows, outputs); what follows it in a block."""

    model: str
    name: str
    rows: int
    inputs: int
    outputs: int
    follows: str
    trained: bool = True


def shapes_of(model: str) -> list[Shape]:
    """The student's four layers and the teacher's widest, at the batch that steps.py times."""
    config = stage1_config(model, CLIPS[model], "bf16")
    student, clip = config.student, config.teacher
    grid = grid_of(student)
    rows, c, d = CLIPS[model] * visible_of(student, config.mask), student.width, clip.width
    every = CLIPS[model] * grid.frames * (1 + (clip.image_size // clip.patch_size) ** 2)
    return [
        Shape(model, "student qkv", rows, c, 3 * c, "bias"),
        Shape(model, "student proj", rows, c, c, "bias, residual"),
        Shape(model, "student fc1", rows, c, 4 * c, "bias, GELU"),
        Shape(model, "student fc2", rows, 4 * c, c, "bias, residual"),
        Shape(model, "teacher fc1", every, d, 4 * d, "bias, GELU", trained=False),
    ]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def native_calls(shape: Shape) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(pass, epilogue, call) in the compute dtype, each operand in the memory order it has in a step."""
    x, weight = _random(shape.rows, shape.inputs), _random(shape.outputs, shape.inputs)
    yield "forward", "", lambda: x @ weight.t()
    bias, residual = _random(shape.outputs), _random(shape.rows, shape.outputs)
    gelu = shape.follows.endswith("GELU")

    def whole() -> Tensor:
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else residual + out if shape.follows.endswith("residual") else out

    yield "forward", shape.follows, whole
    if shape.trained:
        upstream = _random(shape.rows, shape.outputs)
        yield "dgrad", "", lambda: upstream @ weight
        yield "wgrad", "", lambda: upstream.t() @ x


def _fp8(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(torch.float8_e4m3fn)


def _block_scales(rows: int, columns: int) -> Tensor:
    """Of blocks of 128 x 128 as cuBLAS wants them: blocks of columns padded to fours, and their index running fastest."""
    return torch.rand(-(-rows // 128), -(-columns // 512) * 4, device=DEVICE).t()


def eight_bit_calls(shape: Shape) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """(kind, pass, epilogue, call) of products in 8 bits: the left operand by rows, the right one by columns."""
    passes = {"forward": (shape.rows, shape.outputs, shape.inputs)}
    if shape.trained:
        passes["dgrad"] = (shape.rows, shape.inputs, shape.outputs)
        passes["wgrad"] = (shape.outputs, shape.inputs, shape.rows)
    for name, (m, n, k) in passes.items():
        a, b = _fp8(m, k), _fp8(n, k).t()
        one, per_row, per_column = (torch.rand(s, device=DEVICE) for s in ((), (m, 1), (1, n)))

        def tensor(a: Tensor = a, b: Tensor = b, one: Tensor = one, fast: bool = True) -> Tensor:
            return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

        def row(a: Tensor = a, b: Tensor = b, left: Tensor = per_row, right: Tensor = per_column) -> Tensor:
            return torch._scaled_mm(a, b, left, right, out_dtype=torch.bfloat16, use_fast_accum=True)

        def block(a: Tensor = a, b: Tensor = b, m: int = m, n: int = n, k: int = k) -> Callable[[], Tensor]:
            kinds = F.ScalingType
            left, right = torch.rand(-(-k // 128), m, device=DEVICE).t(), _block_scales(n, k)
            return lambda: F.scaled_mm(
                a, b, left, kinds.BlockWise1x128, right, kinds.BlockWise128x128, output_dtype=torch.bfloat16
            )

        yield "fp8 tensor", name, "", tensor
        yield "fp8 row", name, "", row
        yield "fp8 block", name, "", _made_at_first_call(block)
    integers = [
        torch.randint(-127, 128, s, dtype=torch.int8, device=DEVICE)
        for s in ((shape.rows, shape.inputs), (shape.outputs, shape.inputs))
    ]
    yield "int8", "forward", "", lambda: torch._int_mm(integers[0], integers[1].t())
    x, weight = _random(shape.rows, shape.inputs), torch.randn(shape.outputs, shape.inputs, device=DEVICE)
    bias = torch.randn(shape.outputs, device=DEVICE)
    for kind, precision in (("int8", "int8"), ("fp8 row", "fp8")):
        values = kernels.quantize_weight(weight, precision)
        yield kind, "forward", "quantize, bias", lambda v=values: kernels.quantized_linear(x, *v, bias)


def _made_at_first_call(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Operands made where they are used, so that what a device lacks fails there and is on record."""
    made: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return call


def _timed(call: Callable[[], object], flops: float) -> Row:
    try:
        spans = spans_of(call, budget=0.08)
    except Exception as error:
        return {"error": short(error)}
    middle, (low, high) = statistics.median(spans), spread(spans)
    return {
        "seconds": middle,
        "spread_s": [low, high],
        "calls": len(spans),
        "tflops": float(f"{flops / middle / 1e12:.4g}"),
    }


def products(lines: Lines, models: list[str]) -> None:
    """Times every product of the models and writes its line; those known of this commit are left out."""
    keys = ("model", "shape", "kind", "pass", "epilogue")
    known = {tuple(row[key] for key in keys) for row in lines.known() if row["bench"] == "product"}
    for shape in (shape for model in models for shape in shapes_of(model)):
        flops = 2.0 * shape.rows * shape.inputs * shape.outputs
        native = ((NAME, *entry) for entry in native_calls(shape))
        # A CPU emulates fp8 products for minutes.
        eight = eight_bit_calls(shape) if GPU else ()
        for kind, which, epilogue, call in chain(native, eight):
            if (shape.model, shape.name, kind, which, epilogue) in known:
                continue
            row = {
                "bench": "product",
                "model": shape.model,
                "shape": shape.name,
                "kind": kind,
                "pass": which,
                "epilogue": epilogue,
                "rows": shape.rows,
                "inputs": shape.inputs,
                "outputs": shape.outputs,
            }
            row = lines.add(row | _timed(call, flops) | {"how": HOW})
            said = row.get("error") or f"{row['tflops']} TFLOP/s"
            print(f"{shape.model} {shape.name} {kind} {which} {epilogue}: {said}", flush=True)


def attention_shapes(model: str) -> dict[str, tuple[int, int, int, int]]:
    """(batch, tokens, heads, width) that student, teacher and a fine-tuned classifier ask for."""
    config, clips = stage1_config(model, CLIPS[model], "bf16"), CLIPS[model]
    vit, clip = config.student, config.teacher
    grid, visible = grid_of(vit), visible_of(vit, config.mask)
    every, frame = grid.size, (clip.image_size // clip.patch_size) ** 2
    return {
        "student": (clips, visible, vit.num_heads, vit.width // vit.num_heads),
        "teacher": (clips * grid.frames, 1 + frame, clip.num_heads, clip.width // clip.num_heads),
        "classifier": (max(1, clips // 4), every, vit.num_heads, vit.width // vit.num_heads),
    }


def attention_calls(
    batch: int, tokens: int, heads: int, width: int
) -> tuple[str, list[tuple[str, Callable[[], object], float]]]:
    """The backend that torch itself takes, and (pass, call, FLOPs); q, k and v are views of one tensor, as in a step."""
    q, k, v = _random(batch, tokens, 3, heads, width).requires_grad_().unbind(2)
    own = SDPBackend(torch._fused_sdp_choice(*(x.transpose(1, 2) for x in (q, k, v)))).name
    upstream, flops = _random(batch, tokens, heads, width), 4.0 * batch * heads * tokens**2 * width

    def forward() -> Tensor:
        with torch.no_grad():
            return kernels.attention(q, k, v, backend="sdpa")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kernels.attention(q, k, v, backend="sdpa"), (q, k, v), upstream)

    # Backward: five products for forward's two.
    return own, [("forward", forward, flops), ("forward and backward", both, 3.5 * flops)]


def attention(lines: Lines, models: list[str]) -> None:
    """Forward, and forward with backward, of every backend; which one torch itself takes is in each line."""
    for model, name, shape in ((m, name, shape) for m in models for name, shape in attention_shapes(m).items()):
        own, calls = attention_calls(*shape)
        sizes = dict(zip(("batch", "tokens", "heads", "width"), shape, strict=True))
        for backend, (which, call, flops) in ((b, entry) for b in BACKENDS for entry in calls):
            row = {"bench": "attention", "model": model, "shape": name, "backend": backend, "pass": which}
            with sdpa_kernel(BACKENDS[backend]):
                timed = _timed(call, flops)
            row = lines.add(row | sizes | {"dtype": NAME, "torch_takes": own} | timed | {"how": HOW})
            said = row.get("error") or f"{row['tflops']} TFLOP/s"
            print(f"{model} attention of the {name}, {backend}, {which}: {said}", flush=True)


def read(out: Path) -> Row:
    """rates.json, or nothing where there is none yet."""
    path = out / "rates.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(out: Path, changes: Row) -> None:
    """rates.json with some entries changed: one line, whole or not at all."""
    write_json(out / "rates.json", read(out) | changes)


def summary(lines: Lines) -> Row:
    """TFLOP/s by model and kind over all products of a step together, by shape, and of attention."""
    together: dict[str, dict[str, list[float]]] = {}
    single: dict[str, dict[str, float]] = {}
    attended: dict[str, dict[str, float]] = {}
    for row in lines.known():
        if row["bench"] == "product":
            at = f"{row['model']} {row['shape']}"
            label = f"{row['kind']} {row['pass']}" + (f" with {row['epilogue']}" if row["epilogue"] else "")
            single.setdefault(at, {})[label] = row["tflops"]
            if not row["epilogue"]:
                sums = together.setdefault(row["model"], {}).setdefault(row["kind"], [0.0, 0.0])
                sums[0] += row["tflops"] * row["seconds"]
                sums[1] += row["seconds"]
        else:
            at = f"{row['model']} {row['shape']}, {row['tokens']} tokens"
            attended.setdefault(at, {})[f"{row['backend']} {row['pass']}"] = row["tflops"]
    means = {m: {kind: float(f"{a / b:.4g}") for kind, (a, b) in kinds.items()} for m, kinds in together.items()}
    return {"products": means, "shapes": single, "attention": attended}


def machine(out: Path) -> None:
    """Device, versions, the order of attention's backends, a copy and one large product; refuses another device's folder."""
    found, before = about(), read(out)
    if before and before["device"] != found["device"]:
        sys.exit(f"{out} holds figures of {before['device']}, this is {found['device']}; give another OUT")
    size = 8192 if GPU else 1024
    a, b, source = (
        _random(size, size),
        _random(size, size),
        torch.ones(2**30 if GPU else 2**27, dtype=torch.uint8, device=DEVICE),
    )
    with Clocks() as clocks:
        product, copies = _timed(lambda: a @ b, 2.0 * size**3), spans_of(source.clone)
    order = [backend.name for backend in _cur_sdpa_kernel_backends(with_priority=True)]
    found |= {
        "matmul_tflops": product["tflops"],
        "matmul_of": f"{NAME}, {size} cubed",
        "copy_gb_per_s": round(2 * source.numel() / statistics.median(copies) / 1e9, 1),
        "sdpa_order": ", ".join(order),
        "clocks": clocks.row(),
    }
    write(out, found)
    print(json.dumps(found), flush=True)


def main(mode: str, *models: str) -> None:
    torch.manual_seed(0)
    out = out_folder()
    if mode == "machine":
        machine(out)
        return
    lines = Lines(out, "rates.jsonl")
    with Clocks() as clocks:
        products(lines, list(models))
        write(out, summary(lines))
        attention(lines, list(models))
    write(out, summary(lines) | {"clocks_of_rates": clocks.row()})


if __name__ == "__main__":
    main(*sys.argv[1:])
