"""What a stage-1 step costs on a GPU at best, fast and plain implementation, counted without one: predictions.

    python -m benchmarks.predict [--model b16|l16] [--batch_size 64] [--gpu a100|h100|h200|all]

Both implementations of `bench stage1` run on tensors without values (fake_gpu.py), every operation of forward, backward and
optimizer is counted (counted.py), and

    bound = sum over operations of max(FLOPs / matmul rate, bytes / copy rate)

with the rates of a datasheet, or measured ones. That is the eager step whose every operation runs at full rate and whose
launches are free: a prediction, and a bound. Beside it stands the host's share, in which the device stands still:

    host = waits * WAIT + bytes copied within the step / PAGEABLE_RATE + bytes of the batch's clips / PINNED_RATE

with the assumptions below. `fused` is the bound for the parts of umt_fast/bench/profile.py, which counts
what is left when every elementwise pass is fused into a neighbor: more than a compiler can do. What Inductor makes of the
step is counted by compiled.py.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal
from unittest import mock

import torch

from benchmarks.counted import Counter, Counts, Operation
from benchmarks.fake_gpu import OLDEST_TORCH, TORCH, fake_gpu
from umt_fast.bench.measure import Model, random_video
from umt_fast.bench.profile import costs
from umt_fast.bench.stage1 import fast_steps, plain_steps, stage1_config
from umt_fast.config import ConfigError, Stage1Config, check_number
from umt_fast.masking import num_visible
from umt_fast.plan import SHEETS, work_of

CAPABILITIES = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}
# Assumed, in bytes/s: copies from memory that CUDA has pinned, over PCIe 4 (A100) or 5, and from all other memory.
PINNED_RATE = {"a100": 25e9, "h100": 50e9, "h200": 50e9}
PAGEABLE_RATE = 12e9
# Assumed, in seconds: from the end of the device's work until what the host issues next begins.
WAIT = 20e-6
# What a prediction of this kind cannot know, in its own output.
NOT_COUNTED = (
    "real kernels, which reach some 60 to 80% of such rates; and what caches save where a batch is small",
    "launches: the host has to issue every operation, which bounds small batches (unless a graph replays them)",
    "the plain implementation's work on the host (its mask, a copy of its position table for each clip)",
    "scratch memory and second passes inside kernels (sorting, attention's backward, cuBLAS, cuDNN), fragmentation",
)


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
        ):
            video = random_video(config.run.batch_size, vit.num_frames, vit.image_size, device)
            steps = (
                fast_steps(config, video, device, False)
                if implementation == "fast"
                else plain_steps(config, video, device)
            )
            steps[0](0)
            counter.restart()
            steps[0](1)
            return counter.finish()
    finally:
        log.setLevel(level)


def figures(counts: Counts, batch_size: int, matmul: float, copy: float) -> dict[str, object]:
    """Of one implementation, at rates in FLOP/s and bytes/s."""
    seconds = [operation.seconds(matmul, copy) for operation in counts.operations]
    bound = sum(seconds)
    products = sum(
        taken
        for operation, taken in zip(counts.operations, seconds, strict=True)
        if operation.products or operation.products8
    )
    return {
        "bound_ms": round(1e3 * bound, 3),
        "clips_per_s_at_most": round(batch_size / bound, 2),
        "share_of_matrix_products": round(products / bound, 3),
        "peak_memory_gib": round(counts.peak / 2**30, 3),
        "tflop": round(sum(o.products + o.products8 for o in counts.operations) / 1e12, 4),
        "gb": round(sum(o.bytes for o in counts.operations) / 1e9, 3),
        "operations": len(counts.operations),
        "host_waits": counts.waits,
        "host_mb": round(counts.host_bytes / 1e6, 3),
    }


def host_ms(counts: Counts, clips_bytes: float, gpu: str) -> float:
    """Milliseconds in which the device stands still for the host; clips_bytes: of the batch's clips, as they are sent."""
    seconds = counts.waits * WAIT + counts.host_bytes / PAGEABLE_RATE + clips_bytes / PINNED_RATE[gpu]
    return round(1e3 * seconds, 3)


def with_host(row: dict[str, object], milliseconds: float, batch_size: int) -> dict[str, object]:
    """The figures of an implementation with its host's share added."""
    rate = batch_size / (row["bound_ms"] + milliseconds) * 1e3
    return row | {"host_ms": milliseconds, "clips_per_s_with_host": round(rate, 2)}


def fused(config: Stage1Config, products8: float, matmul: float, copy: float) -> dict[str, object]:
    """The fast implementation with every elementwise pass fused; products8: FLOPs of the teacher in 8 bits."""
    parts = costs(config, work_of(config).trained)
    bound = 0.0
    for name, cost in parts.items():
        flops = cost.flops - (products8 / 2 if name == "teacher blocks" else 0)
        bound += max(flops / matmul, cost.bytes / copy)
    return {"bound_ms": round(1e3 * bound, 3), "clips_per_s_at_most": round(config.run.batch_size / bound, 2)}


def top(
    operations: Iterable[Operation], matmul: float, copy: float, *, by: Literal["ms", "gb"], most: int
) -> list[dict[str, object]]:
    """The operations that cost most, those of one name at one place together."""
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for operation in operations:
        group = groups[operation.part, operation.place, operation.name.removesuffix(".default")]
        group[0] += 1
        group[1] += 1e3 * operation.seconds(matmul, copy)
        group[2] += operation.bytes / 1e9
    rows = [
        {"part": part, "place": place, "operation": name, "calls": calls, "ms": round(ms, 3), "gb": round(gb, 3)}
        for (part, place, name), (calls, ms, gb) in groups.items()
    ]
    return sorted(rows, key=lambda row: -row[by])[:most]


def cells_of(found: Iterable[dict[str, object]]) -> list[list[object]]:
    """What `top` found, as rows of a table."""
    return [
        [f"prediction: {r['part']}", r["place"], r["operation"], r["calls"], f"{r['ms']:.2f}", f"{r['gb']:.2f}"]
        for r in found
    ]


def check_request(batch_size: int, top: int) -> None:
    """Raises ConfigError for numbers that cannot be predicted for, or a torch that cannot predict."""
    if TORCH < OLDEST_TORCH:
        raise ConfigError(
            f"this is torch {torch.__version__}; predictions need {'.'.join(map(str, OLDEST_TORCH))} or newer"
        )
    if batch_size < 1 or top < 0:
        raise ConfigError(f"batch_size is {batch_size} and top is {top}; they must be at least 1 and 0")


def predict(model: Model, batch_size: int, gpus: Iterable[str], matmul: float, copy: float, most: int) -> list[dict]:
    """The JSON lines, one for each GPU; matmul and copy: rates in FLOP/s and bytes/s, or 0 for the datasheet's."""
    counted: dict[tuple[str, str], Counts] = {}
    lines = []
    for gpu in gpus:
        sheet, capability = SHEETS[gpu], CAPABILITIES[gpu]
        rates = (matmul or sheet.matmul, copy or sheet.bandwidth)
        eight = "fp8" if capability >= (9, 0) else "int8"
        implementations, bounds = {}, {}
        for name, implementation, precision in (
            ("plain", "plain", "native"),
            ("fast", "fast", "native"),
            (eight, "fast", eight),
        ):
            config = stage1_config(model, batch_size, "bf16", precision)
            counts = counted.setdefault((implementation, precision), None) or count(config, implementation, capability)
            counted[implementation, precision] = counts
            label = name if name in ("plain", "fast") else f"fast, {eight} teacher"
            pixels = batch_size * 3 * config.student.num_frames * config.student.image_size**2
            # The official loader sends normalized fp32, ours uint8.
            host = host_ms(counts, pixels * (4 if implementation == "plain" else 1), gpu)
            implementations[label] = with_host(figures(counts, batch_size, *rates), host, batch_size)
            if implementation == "fast":
                bounds[f"{label}, fused"] = fused(config, sum(o.products8 for o in counts.operations), *rates)
        slowest, fast = implementations["plain"], counted["fast", "native"].operations
        lines.append(
            {
                "bench": "predict",
                "kind": "prediction",
                "model": model,
                "batch_size": batch_size,
                "gpu": sheet.name,
                "matmul_tflops": round(rates[0] / 1e12, 2),
                "copy_gb_per_s": round(rates[1] / 1e9, 1),
                "rates": "given" if matmul or copy else "datasheet",
                "torch": torch.__version__,
                "wait_us": 1e6 * WAIT,
                "pageable_gb_per_s": PAGEABLE_RATE / 1e9,
                "pinned_gb_per_s": PINNED_RATE[gpu] / 1e9,
                "implementations": implementations,
                "bounds": bounds,
                "speed_against_plain": {
                    name: round(slowest["bound_ms"] / row["bound_ms"], 3)
                    for name, row in (implementations | bounds).items()
                    if name != "plain"
                },
                "speed_against_plain_with_host": {
                    name: round(row["clips_per_s_with_host"] / slowest["clips_per_s_with_host"], 3)
                    for name, row in implementations.items()
                    if name != "plain"
                },
                "memory_against_plain": round(
                    implementations["fast"]["peak_memory_gib"] / slowest["peak_memory_gib"], 3
                ),
                "most_ms": top(fast, *rates, by="ms", most=most),
                "most_gb": top(fast, *rates, by="gb", most=most),
                "not_counted": NOT_COUNTED,
            }
        )
    return lines


def measured_rates(path: str, model: str) -> tuple[float, float]:
    """TFLOP/s of the model's products in bf16 and GB/s of a copy, as rates.json has them. Raises ConfigError."""
    try:
        with open(path) as file:
            content = json.load(file)
        return float(content["products"][model]["bf16"]), float(content["copy_gb_per_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"measured is {path}, which is no rates.json of benchmarks/gpu.sh with products of {model} in bf16"
        ) from error


def table(line: dict) -> str:
    """A line for people."""
    where = f"{line['gpu']}, {line['model']}, {line['batch_size']} clips"
    rows = [
        [
            "prediction",
            "implementation",
            "bound ms",
            "clips/s at most",
            "against plain",
            "host ms",
            "against plain with it",
            "in products",
            "peak GiB",
            "of plain's",
            "TFLOP",
            "GB",
            "operations",
            "host waits",
            "host MB",
        ],
    ]
    rows.append(["---"] * len(rows[0]))
    plain_peak = line["implementations"]["plain"]["peak_memory_gib"]
    for name, row in (line["implementations"] | line["bounds"]).items():
        cells = [where, name, f"{row['bound_ms']:.1f}", f"{row['clips_per_s_at_most']:.0f}"]
        cells.append(f"{line['speed_against_plain'].get(name, 1):.2f}x")
        if "peak_memory_gib" in row:
            cells += [
                f"{row['host_ms']:.1f}",
                f"{line['speed_against_plain_with_host'].get(name, 1):.2f}x",
                f"{100 * row['share_of_matrix_products']:.0f}%",
                f"{row['peak_memory_gib']:.2f}",
                f"{100 * row['peak_memory_gib'] / plain_peak:.0f}%",
                f"{row['tflop']:.2f}",
                f"{row['gb']:.1f}",
                row["operations"],
                row["host_waits"],
                f"{row['host_mb']:.0f}",
            ]
        rows.append(["prediction: " + cells[0], *cells[1:], *[""] * (len(rows[0]) - len(cells))])
    for title, key in (("by bound", "most_ms"), ("by bytes", "most_gb")):
        if line[key]:
            rows += [
                [],
                [f"prediction: fast implementation, {title}", "place", "operation", "calls", "ms", "GB"],
                ["---"] * 6,
            ]
            rows += cells_of(line[key])
    text = ["| " + " | ".join(map(str, row)) + " |" if row else "" for row in rows]
    text += [
        "",
        f"prediction at {line['matmul_tflops']:.0f} TFLOP/s and {line['copy_gb_per_s']:.0f} GB/s "
        f"({line['rates']}): sum over operations of max(FLOPs / matmul rate, bytes / copy rate). Host ms assume "
        f"{1e6 * WAIT:.0f} µs for each wait, {PAGEABLE_RATE / 1e9:.0f} GB/s for copies within the step and "
        f"{line['pinned_gb_per_s']:.0f} GB/s for the clips. Not in it:",
    ]
    return "\n".join(text + [f"- {what}" for what in line["not_counted"]])


def main(
    model: Model = "b16",
    batch_size: int = 64,
    gpu: Literal["a100", "h100", "h200", "all"] = "all",
    matmul_tflops: float = 0.0,
    copy_gb_per_s: float = 0.0,
    measured: str = "",
    top: int = 10,
) -> None:
    """Predict a whole stage-1 step on a GPU from counted FLOPs and bytes; needs none. One JSON line for each GPU.

    Every operation of both is counted in bf16, and of the fast one with its teacher in 8 bits (fp8, on an A100 int8).
    The table on stderr says what such a prediction leaves out.

    Args:
        model: Student; the teacher is the official one of that size.
        batch_size: Clips per step.
        gpu: Whose datasheet gives the rates.
        matmul_tflops: bf16 TFLOP/s in place of the datasheet's; 8 bits count as twice as fast.
        copy_gb_per_s: GB/s read and written, likewise.
        measured: A rates.json of benchmarks/gpu.sh, for both: the rate is that of the model's own products together.
        top: How many of the fast implementation's most expensive operations to list.
    """
    check_request(batch_size, top)
    check_number("matmul_tflops", matmul_tflops)
    check_number("copy_gb_per_s", copy_gb_per_s)
    if matmul_tflops < 0 or copy_gb_per_s < 0:
        raise ConfigError(
            f"matmul_tflops is {matmul_tflops} and copy_gb_per_s is {copy_gb_per_s}; they must be positive, or 0 for the "
            "datasheet's"
        )
    if measured:
        if matmul_tflops or copy_gb_per_s:
            raise ConfigError("measured gives both rates; leave out matmul_tflops and copy_gb_per_s")
        matmul_tflops, copy_gb_per_s = measured_rates(measured, model)
    gpus = list(SHEETS) if gpu == "all" else [gpu]
    for line in predict(model, batch_size, gpus, matmul_tflops * 1e12, copy_gb_per_s * 1e9, top):
        print(table(line), file=sys.stderr)
        print(json.dumps(line))


if __name__ == "__main__":
    import tyro  # here, since what stands above is used where tyro is not installed

    try:
        tyro.cli(main)
    except ConfigError as error:
        sys.exit(f"benchmarks.predict: {error}")
