"""Whether what is timed is right: `python -m benchmarks.checks tests`, then `... values`; gpu.py runs both.

tests: the native kernel tests that gpu.py lists, a process for each file. values: attention of every backend, forward and
backward, against float64 on the same rounded inputs; recorded and fused steps beside eager ones. Writes checks.jsonl.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import kernels
from benchmarks.gpu import REPOSITORY, TESTS
from benchmarks.rates import BACKENDS, DTYPE, NAME
from benchmarks.steps import losses_of, trainer_step
from benchmarks.timing import DEVICE, GPU, Lines, Row, out_folder, short
from umt_fast.bench.fidelity import compare
from umt_fast.bench.measure import random_video
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import ConfigError
from umt_fast.models.teachers.quantized import require_precision

TOKENS = (98, 160, 197, 320, 784, 1568)
# Of a tensor's relative error: bf16 keeps 8 bits of each factor, fp32 24.
BOUND = 0.02 if DTYPE == torch.bfloat16 else 1e-4


def run_tests(path: str) -> tuple[Row, str]:
    """The line of one file's tests, and what pytest said."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", path, "-k", TESTS[path]]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED")]
    ok = done.returncode == 0 and counts.get("passed", 0) + counts.get("skipped", 0) > 0
    row: Row = {"bench": "tests", "file": path, "ok": ok, "exit_status": done.returncode, "failed_tests": failed[:20]}
    return row | counts | {"seconds": round(time.perf_counter() - started, 1), "device": DEVICE.type}, done.stdout


def tests(lines: Lines) -> bool:
    """Runs the files side by side; a line for each as soon as it has ended."""
    good = True
    with ThreadPoolExecutor(len(TESTS)) as pool:
        for job in as_completed([pool.submit(run_tests, path) for path in TESTS]):
            row, said = job.result()
            lines.add(row)
            print(f"{row['file']}: {said.strip().splitlines()[-1]}" if row["ok"] else said[-6000:], flush=True)
            good &= row["ok"]
    return good


def inputs(case: str, tokens: int, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and an upstream gradient, (2, n, heads, 64); case "near -120": every logit is that, give or take a few."""
    heads, width = (12, 64) if GPU else (2, 64)
    q, k, v, upstream = (
        torch.randn(2, n, heads, width, device=DEVICE, dtype=DTYPE) for n in (queries, tokens, tokens, queries)
    )
    if case == "near -120":
        # One channel alone makes the logit: 31 * -31 / 8 = -120.
        q[..., 0], k[..., 0] = 31.0, -31.0
    return q, k, v, upstream


def truth(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and gradients with respect to q, k and v in float64, on the CPU, written out: no autograd, no library softmax."""
    q, k, v, upstream = (x.detach().double().cpu().transpose(1, 2) for x in (q, k, v, upstream))
    scale = q.shape[-1] ** -0.5
    logits = scale * q @ k.mT
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    inner = upstream @ v.mT
    slope = weights * (inner - (weights * inner).sum(-1, keepdim=True))
    parts = weights @ v, scale * slope @ k, scale * slope.mT @ q, weights.mT @ upstream
    return [part.transpose(1, 2) for part in parts]


def relative(found: Tensor, right: Tensor) -> float:
    return ((found.detach().double().cpu() - right).norm() / right.norm()).item()


def attention_values(lines: Lines) -> bool:
    """A line for each backend and case: relative errors of output and gradients, and whether they are within BOUND.

    "definition" is backend="math", which rounds its logits to the dtype as the official code does: no verdict on it.
    """
    torch.manual_seed(0)
    cases = [("random", n, n) for n in TOKENS] + [("random", n, 1) for n in TOKENS[:3]]
    cases += [("near -120", n, n) for n in (197, 320)] + [("near -120", 197, 1)]
    good = True
    for case, tokens, queries in cases:
        values = inputs(case, tokens, queries)
        right = truth(*values)
        for backend in (*BACKENDS, "auto", "definition"):
            row: Row = {
                "bench": "attention values",
                "backend": backend,
                "case": case,
                "tokens": tokens,
                "queries": queries,
                "dtype": NAME,
            }
            try:
                errors = errors_of(backend, *values, right)
            except RuntimeError as error:
                # A backend that this device or shape lacks; what "auto" takes must be there.
                good &= backend != "auto"
                lines.add(row | {"error": short(error)})
                continue
            ok = backend == "definition" or max(errors) <= BOUND
            named = dict(zip(("output", "dq", "dk", "dv"), (float(f"{e:.3g}") for e in errors), strict=True))
            lines.add(row | {"errors": named} | ({} if backend == "definition" else {"ok": ok, "bound": BOUND}))
            print(
                f"attention {case}, {tokens} tokens, {queries} queries, {backend}: {named} {'ok' if ok else 'WRONG'}",
                flush=True,
            )
            good &= ok
    return good


def errors_of(backend: str, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, right: list[Tensor]) -> list[float]:
    """Relative errors of output, dq, dk, dv; infinite where something is no number."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else contextlib.nullcontext():
        out = kernels.attention(*leaves, backend={"auto": "auto", "definition": "math"}.get(backend, "sdpa"))
        found = [out, *torch.autograd.grad(out, leaves, upstream)]
    errors = [relative(a, b) for a, b in zip(found, right, strict=True)]
    return [error if error == error else float("inf") for error in errors]


# Ways of a step beside the eager one, and how far a loss of theirs may lie from its own: a recorded step launches the same
# kernels, fused products round elsewhere.
WAYS: dict[str, tuple[dict[str, object], float]] = {
    "graph": ({"cuda_graph": True}, 2e-3),
    "fused": ({"linear": "fused"}, 2e-2),
}


def steps_agree(lines: Lines) -> bool:
    """Losses of five B/16 steps, drop path off, eager and in other ways; without a GPU there are no other ways."""
    found, good = {}, True
    for name, (changes, _) in ({"eager": ({}, 0.0)} | WAYS).items():
        torch.manual_seed(0)
        config = stage1_config("b16" if GPU else "tiny", 8 if GPU else 2, NAME)
        config.student.drop_path = 0.0
        config.run = replace(config.run, device=DEVICE.type, tensorboard=False, **changes)
        video = random_video(config.run.batch_size, config.student.num_frames, config.student.image_size, DEVICE)
        try:
            step, trainer = trainer_step(config, video)
            for number in range(5):
                step(number)
        except (ValueError, RuntimeError) as error:
            lines.add({"bench": "way of a step", "way": name, "error": short(error)})
            good &= not GPU
            continue
        found[name] = losses_of(trainer)
    for name, (_, limit) in WAYS.items():
        if {"eager", name} <= found.keys():
            gap = max(abs(a - b) / abs(a) for a, b in zip(found["eager"], found[name], strict=True))
            losses = {"eager": found["eager"], name: found[name]}
            lines.add(
                {
                    "bench": "way of a step",
                    "way": name,
                    "losses": losses,
                    "largest_relative_gap": gap,
                    "ok": gap < limit,
                }
            )
            print(f"{name} step beside an eager one: largest relative gap of losses {gap:.2g}", flush=True)
            good &= gap < limit
    return good


def teachers(lines: Lines) -> None:
    """How far each 8-bit teacher is from the exact one on random clips and weights: figures without a verdict."""
    for precision in ("int8", "fp8"):
        config = stage1_config("b16" if GPU else "tiny", 4, NAME)
        video = random_video(4, config.student.num_frames, config.student.image_size, DEVICE)
        try:
            require_precision(replace(config.teacher, precision=precision), DEVICE)
            row = compare(config, precision, [video], DEVICE)
        except ConfigError as error:
            row = {"bench": "fidelity", "precision": precision, "error": short(error)}
        lines.add(row)


def main(mode: str) -> None:
    lines = Lines(out_folder(), "checks.jsonl")
    if mode == "tests":
        good = tests(lines)
    else:
        good = attention_values(lines)
        good &= steps_agree(lines)
        teachers(lines)
    sys.exit(0 if good else "what checks.jsonl marks is wrong")


if __name__ == "__main__":
    main(sys.argv[1])
