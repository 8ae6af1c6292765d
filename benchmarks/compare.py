"""Our operators beside torch, torch.compile, Liger and quack in one Markdown table: `python -m benchmarks.compare [NAME ...]`.

Columns are medians in µs and, of `ours`, the share of the bound: the bytes at the rate of a large copy in the same run, or the
FLOPs at the rate of a large product. On a CPU bytes that fit its cache count for nothing, as calls before have left them there.
NAME keeps the operations whose name begins so; --size is that of bench_kernels.py. A library that is not installed has a dash,
one that does not run its error below the table. A column is there only where the mathematics is the same: Liger (0.8.5) has the
LayerNorm; quack (0.6.5) that and the plain product with bias and residual, but of GELU the tanh form alone. `--device cpu`
compares the CPU backends; there --compile adds torch.compile's column, but for backward passes of kernel_cases.py. Without
--device a GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

Call = Callable[[], object]
COLUMNS = {"ours": "ours", "plain": "torch", "compiled": "torch.compile", "liger": "Liger", "quack": "quack"}


def found(module: str, name: str) -> Any:
    """A function of a library by its dotted name; None where the library is not installed, one that raises where it does not
    import or has no such function."""
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            return None
        told = f"{type(error).__name__}: {error}"

        def fails(*_: Any, **__: Any) -> None:
            raise ImportError(f"{module}.{name} is not there: {told}")

        return fails


def own_cases() -> Iterator[Any]:
    """A student's LayerNorm, MLP and linear layers, which bench_kernels.py has not."""
    from benchmarks.kernel_cases import FRAMES, PATCH, SIZE, SIZES

    width, _, _, batch, pixels = SIZES[SIZE]
    tokens = (pixels // PATCH) ** 2
    rows = batch * FRAMES * (tokens - int(tokens * 0.8))
    yield from _norm_cases(rows, width)
    yield from _linear_cases(rows, width)


def _norm_cases(rows: int, width: int) -> Iterator[Any]:
    """Behind the sum of an fp32 stream and a branch, then of the branch alone; forward and backward."""
    import torch
    import torch.nn.functional as F

    import kernels
    from benchmarks.kernel_cases import DEVICE, DTYPE, Case

    stream = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    branch = torch.randn(rows, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight, bias = (torch.randn(width, device=DEVICE, requires_grad=True) for _ in range(2))
    half = DTYPE.itemsize

    def plain(x: Any) -> Any:
        # fp32 as in the kernels, also of half numbers.
        return F.layer_norm(x.float(), (width,), weight, bias, 1e-6).to(DTYPE)

    def summed(norm: Callable[[Any], Any]) -> Call:
        def call() -> tuple[Any, Any]:
            z = stream + branch
            return norm(z).to(DTYPE), z

        return call

    norms = {"plain": plain}
    liger = found("liger_kernel.ops.layer_norm", "LigerLayerNormFunction.apply")
    if liger is not None:
        norms["liger"] = lambda x: liger(x, weight, bias, 1e-6)
    both = {"ours": lambda: kernels.layer_norm(stream, weight, bias, 1e-6, branch=branch, dtype=DTYPE)}
    both |= {key: summed(norm) for key, norm in norms.items()}
    alone = {"ours": lambda: kernels.layer_norm(branch, weight, bias, 1e-6)}
    alone |= {key: lambda norm=norm: norm(branch) for key, norm in norms.items()}
    for name, calls, leaves, moved in (
        ("layer_norm", both, (stream, branch, weight, bias), (8 + 2 * half, 12 + half)),
        ("layer_norm alone", alone, (branch, weight, bias), (2 * half, 3 * half)),
    ):
        calls["compiled"] = torch.compile(calls["plain"], dynamic=False)
        backward = {key: backward_of(call, leaves) for key, call in calls.items()}
        _add_quack_norm(calls, backward, stream if "alone" not in name else None, branch, weight, bias)
        yield Case(f"{name} forward", calls, rows * width * moved[0])
        yield Case(f"{name} backward", backward, rows * width * moved[1])


def _add_quack_norm(forward: dict[str, Call], backward: dict[str, Call], stream: Any, *tensors: Any) -> None:
    """quack's LayerNorm, whose two passes are functions that autograd does not know."""
    import torch

    layernorm_fwd, layernorm_bwd = (found("quack.rmsnorm", f"layernorm_{way}") for way in ("fwd", "bwd"))
    if layernorm_fwd is None:
        return
    branch, weight, bias = (tensor.detach() for tensor in tensors)
    stream = None if stream is None else stream.detach()

    def run(**wanted: bool) -> tuple[Any, Any]:
        z = branch if stream is None else stream + branch
        return layernorm_fwd(z, weight, bias, 1e-6, **wanted), z

    def forward_pass() -> Any:
        normed, z = run()
        return normed if stream is None else (normed.to(branch.dtype), z)

    kept: list[Any] = []

    def backward_pass() -> tuple[Any, ...]:
        if not kept:
            (_, rstd, mean), z = run(return_rstd=True, return_mean=True)
            kept.extend((z, rstd, mean, torch.randn_like(branch), torch.randn_like(z)))
        z, rstd, mean, dy, dz = kept
        dx, dweight, dbias = layernorm_bwd(z, weight, dy.to(z.dtype), rstd, mean)
        if stream is None:
            return dx, dweight, dbias
        total = dx + dz
        return total, total.to(branch.dtype), dweight, dbias

    forward["quack"], backward["quack"] = forward_pass, backward_pass


def _linear_cases(rows: int, width: int) -> Iterator[Any]:
    """The MLP forward and backward, then a linear layer with what its product can carry."""
    import torch
    import torch.nn.functional as F

    import kernels
    from benchmarks.kernel_cases import DEVICE, DTYPE, Case

    def floats(*shape: int) -> Any:
        return torch.randn(*shape, device=DEVICE, dtype=DTYPE)

    x, (w1, w2) = floats(rows, width), (floats(4 * width, width) / 30, floats(width, 4 * width) / 30)
    b1, b2 = floats(4 * width), floats(width)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w1, b1, w2, b2)]

    def plain_mlp() -> Any:
        x, w1, b1, w2, b2 = leaves
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    mlps = {"ours": lambda: kernels.mlp(*leaves), "plain": plain_mlp}
    mlps["compiled"] = torch.compile(plain_mlp, dynamic=False)
    flops = 2 * rows * width * 4 * width
    yield Case("mlp forward", mlps, flops=2 * flops)
    yield Case("mlp backward", {key: backward_of(call, leaves) for key, call in mlps.items()}, flops=4 * flops)

    hidden, residual = floats(rows, 4 * width), floats(rows, width)
    gemm, gemm_add = (found("quack.gemm_interface", name) for name in ("gemm", "gemm_add"))
    for name, ours, plain, quack in (
        (
            "linear bias",
            lambda: kernels.linear(x, w1, b1),
            lambda: F.linear(x, w1, b1),
            lambda: gemm(x, w1.t(), bias=b1),
        ),
        (
            "linear residual",
            lambda: kernels.linear(hidden, w2, b2, residual=residual),
            lambda: F.linear(hidden, w2, b2) + residual,
            lambda: gemm_add(hidden, w2.t(), residual, bias=b2),
        ),
        (
            "linear gelu",
            lambda: kernels.linear(x, w1, b1, activation="gelu"),
            lambda: F.gelu(F.linear(x, w1, b1)),
            None,
        ),
    ):
        calls = {"ours": ours, "plain": plain, "compiled": torch.compile(plain, dynamic=False)}
        if quack is not None and gemm is not None:
            calls["quack"] = quack
        yield Case(name, calls, flops=flops)


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
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile's column on a CPU too: seconds for each case"
    )
    options = parser.parse_args(arguments)
    # Read when the cases are made.
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.size:
        os.environ["UMT_BENCH"] = options.size
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m benchmarks.compare: this machine has no GPU; --device cpu compares the CPU backends")
    from benchmarks.bench_kernels import bound_of, cache_bytes, measured_copy_rate, seconds_of
    from benchmarks.kernel_cases import DEVICE, DTYPE, SIZE, cases
    from umt_fast.engine.precision import measure_matmul_rate

    copy, matmul, cache = measured_copy_rate(), measure_matmul_rate(DEVICE, DTYPE), cache_bytes()
    compiled = options.compile or DEVICE.type == "cuda"
    columns = {key: title for key, title in COLUMNS.items() if compiled or key != "compiled"}
    lines, failed = [["operation", *columns.values(), "share of bound"], ["---"] * (len(columns) + 2)], []
    for case in (case for make in (own_cases, cases) for case in make()):
        if not case.name.startswith(tuple(options.names) or ("",)):
            continue
        if compiled and not case.name.endswith("backward") and "plain" in case.providers:
            case.providers.setdefault("compiled", torch.compile(case.providers["plain"], dynamic=False))
        seconds: dict[str, float] = {}
        for key in (key for key in columns if key in case.providers):
            try:
                seconds[key] = seconds_of(case.providers[key])
            except Exception as error:
                failed.append(f"{case.name}, {columns[key]}: {type(error).__name__}: {error}".splitlines()[0][:200])
        bound = bound_of(case, copy, matmul, cache)
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
