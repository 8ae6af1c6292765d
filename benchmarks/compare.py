"""Our operators beside torch, torch.compile, Liger and quack in one Markdown table: `python -m benchmarks.compare [NAME ...]`.

Columns are medians in µs and, of `ours`, the share of the bound: the bytes at the rate of a large copy in the same run, or the
FLOPs at the rate of a large product. NAME keeps the operations whose name begins so; --size is that of bench_kernels.py. A
library that is not installed has a dash, one that does not run its error below the table. quack's GELU is the tanh form, and
without a bias. `--device cpu` compares the CPU backends, compiled code left out; without it a GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

Call = Callable[[], object]
COLUMNS = {"ours": "ours", "plain": "torch", "compiled": "torch.compile", "liger": "Liger", "quack": "quack"}


def found(module: str, name: str) -> Any:
    """A function of a library, or None where that is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def own_cases() -> Iterator[Any]:
    """A student's LayerNorm and MLP, forward and backward, which bench_kernels.py has not."""
    import torch
    import torch.nn.functional as F

    import kernels
    from benchmarks.kernel_cases import DEVICE, DTYPE, FRAMES, PATCH, SIZE, SIZES, Case

    width, _, _, batch, pixels = SIZES[SIZE]
    tokens = (pixels // PATCH) ** 2
    rows, element = batch * FRAMES * (tokens - int(tokens * 0.8)), DTYPE.itemsize
    stream = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    branch = torch.randn(rows, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight, bias = (torch.randn(width, device=DEVICE, requires_grad=True) for _ in range(2))
    leaves = (stream, branch, weight, bias)

    def plain_norm() -> tuple[Any, Any]:
        z = stream + branch
        return F.layer_norm(z, (width,), weight, bias, 1e-6).to(DTYPE), z

    norms = {
        "ours": lambda: kernels.layer_norm(stream, weight, bias, 1e-6, branch=branch, dtype=DTYPE),
        "plain": plain_norm,
        "compiled": torch.compile(plain_norm, dynamic=False),
    }
    liger = found("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
    if liger is not None:

        def liger_norm() -> tuple[Any, Any]:
            z = stream + branch
            return liger.apply(z, weight, bias, 1e-6).to(DTYPE), z

        norms["liger"] = liger_norm
    x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    w1, w2 = (
        torch.randn(*shape, device=DEVICE, dtype=DTYPE) / 30 for shape in ((4 * width, width), (width, 4 * width))
    )
    b1, b2 = (torch.zeros(n, device=DEVICE, dtype=DTYPE) for n in (4 * width, width))
    layers = [tensor.requires_grad_() for tensor in (w1, b1, w2, b2)]

    def plain_mlp() -> Any:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    mlps = {
        "ours": lambda: kernels.mlp(x, *layers),
        "plain": plain_mlp,
        "compiled": torch.compile(plain_mlp, dynamic=False),
    }
    flops = 4 * rows * width * 4 * width
    for name, calls, wanted, moved, work in (
        ("layer_norm", norms, leaves, (8 + 2 * element, 12 + element), (0, 0)),
        ("mlp", mlps, (x, *layers), (0, 0), (flops, 2 * flops)),
    ):
        yield Case(f"{name} forward", calls, rows * width * moved[0], work[0])
        yield Case(
            f"{name} backward",
            {key: backward_of(call, wanted) for key, call in calls.items()},
            rows * width * moved[1],
            work[1],
        )
    linears = {
        "ours": lambda: kernels.linear(x.detach(), w1.detach(), b1.detach(), activation="gelu"),
        "plain": lambda: F.gelu(F.linear(x.detach(), w1.detach(), b1.detach())),
        "compiled": torch.compile(lambda: F.gelu(F.linear(x.detach(), w1.detach(), b1.detach())), dynamic=False),
    }
    gemm_act = found("quack.gemm_interface", "gemm_act")
    if gemm_act is not None:
        options = {"activation": "gelu_tanh_approx", "store_preact": False}
        linears["quack"] = lambda: gemm_act(x.detach(), w1.detach().t(), **options)
    yield Case("linear gelu", linears, flops=flops / 2)


def backward_of(call: Call, leaves: tuple) -> Call:
    """The backward pass of a call, whose forward is recorded once, at the first."""
    import torch

    kept: list[Any] = []

    def run() -> object:
        if not kept:
            out = call()
            out = out if isinstance(out, tuple) else (out,)
            kept.extend((out, [torch.randn_like(part) for part in out]))
        return torch.autograd.grad(kept[0], leaves, kept[1], retain_graph=True)

    return run


def main(arguments: list[str]) -> str:
    """The table. Exits with one line where there is no GPU and --device does not say cpu."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="operations whose name begins so; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("tiny", "b16", "l16"), help="default: b16 on a GPU, tiny on a CPU")
    options = parser.parse_args(arguments)
    # Read when the cases are made.
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.size:
        os.environ["UMT_BENCH"] = options.size
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m benchmarks.compare: this machine has no GPU; --device cpu compares the CPU backends")
    from benchmarks.bench_kernels import bound_of, measured_copy_rate, seconds_of
    from benchmarks.kernel_cases import DEVICE, DTYPE, SIZE, cases
    from umt_fast.engine.precision import measure_matmul_rate

    copy, matmul = measured_copy_rate(), measure_matmul_rate(DEVICE, DTYPE)
    columns = {key: title for key, title in COLUMNS.items() if DEVICE.type == "cuda" or key != "compiled"}
    lines, failed = [["operation", *columns.values(), "share of bound"], ["---"] * (len(columns) + 2)], []
    for case in (case for make in (own_cases, cases) for case in make()):
        if not case.name.startswith(tuple(options.names) or ("",)):
            continue
        seconds: dict[str, float] = {}
        for key in columns.keys() & case.providers.keys():
            try:
                seconds[key] = seconds_of(case.providers[key])
            except Exception as error:
                failed.append(f"{case.name}, {columns[key]}: {type(error).__name__}: {error}".splitlines()[0][:200])
        bound = bound_of(case, copy, matmul)
        share = f"{bound / seconds['ours']:.0%}" if bound and "ours" in seconds else "-"
        lines.append([case.name, *(f"{1e6 * seconds[key]:.1f}" if key in seconds else "-" for key in columns), share])
        print(case.name, {key: round(1e6 * value, 1) for key, value in seconds.items()}, file=sys.stderr, flush=True)
    if len(lines) == 2:
        sys.exit(
            f"python -m benchmarks.compare: no operation begins with {' or '.join(options.names)}; without names all are"
        )
    head = f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, torch {torch.__version__}, {SIZE}, µs"
    return "\n".join(
        [head, "", *("| " + " | ".join(line) + " |" for line in lines), *([""] if failed else []), *failed]
    )


if __name__ == "__main__":
    print(main(sys.argv[1:]))
