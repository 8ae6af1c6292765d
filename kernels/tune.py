"""Measures which tiles the products of a step are fastest with on this GPU: `python -m kernels.tune FILE [options]`.

    python -m kernels.tune tiles.json --sizes b16 l16 --clips 64 --seconds 600

Every form of product that a step of kernels.linear launches is timed with the rule's tiles and with others, the largest
products first. Tiles whose numbers differ from the rule's are left out. `kernels.use_tiles(FILE)`, or UMT_KERNELS_TILES=FILE,
takes the table. `tune_tiles` does the same for the products of any function.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import kernels
from kernels.build_case import FRAMES, KEPT, SIZES
from kernels.linear import tiles as choice
from kernels.linear.product import product
from kernels.linear.tiles import Form

log = logging.getLogger("kernels")

Timer = Callable[[Callable[[], object]], float]
# A lead below this is noise: the rule's tiles stay.
LEAD = 0.02
# 8-bit results share a scale over so many columns of a tile.
_SCALED_COLUMNS = 128


def candidates(form: Form, device: torch.device, *, quantizes: bool = False) -> Iterator[dict[str, int]]:
    """Tiles that fit the device, those nearest to the rule's first; the rule's own are not among them."""
    rule, (_, _, shared) = choice.by_rule(form, device), choice.limits(device)
    depth = rule["BLOCK_K"]
    found = []
    for high, across, warps, parts, stages in itertools.product(
        (64, 128, 256), (64, 128, 256), (4, 8), (1, 2, 4), (2, 3, 4, 5)
    ):
        sums = high * across // (32 * warps)
        fits = stages * (high + across) * depth * form.dtype.itemsize + (8 << 10) <= shared
        # Fewer sums a thread do not feed the tensor cores, more do not fit its registers.
        if not fits or not 32 <= sums <= 128 or across // parts < (_SCALED_COLUMNS if quantizes else 32):
            continue
        numbers = dict(zip(choice.FIELDS, (high, across, depth, parts, warps, stages), strict=True))
        if numbers != rule:
            found.append((sum(numbers[name] != rule[name] for name in choice.FIELDS), -stages, numbers))
    yield from (numbers for _, _, numbers in sorted(found, key=lambda entry: entry[:2]))


def _launch(recorded: tuple[Tensor, Tensor, Tensor, dict[str, Any]], tiles: dict[str, int]) -> Callable[[], None]:
    """The launch with other tiles, into memory of its own."""
    out, a, b, options = recorded
    options = dict(options)
    if options.get("sums") is not None:
        rows = triton.cdiv(out.shape[-2], tiles["BLOCK_M"])
        options["sums"] = torch.empty(rows, out.shape[-1], dtype=torch.float32, device=out.device)
    return lambda: product(out, a, b, **options, tiles=tiles)


def _same(recorded: tuple[Tensor, Tensor, Tensor, dict[str, Any]], tiles: dict[str, int], expected: Tensor) -> bool:
    """Whether the tiles give the rule's numbers, but for the order of sums."""
    out = recorded[0].zero_()
    _launch(recorded, tiles)()
    found, expected = out.float(), expected.float()
    step = 1.0 if out.dtype == torch.int8 else torch.finfo(out.dtype).eps * 4 * expected.abs().max().item()
    return bool(((found - expected).abs() <= step).all())


def _fastest(
    form: Form, recorded: tuple[Tensor, Tensor, Tensor, dict[str, Any]], timer: Timer, left: Callable[[], float]
) -> dict[str, Any]:
    """The entry of a table: the fastest tiles, their microseconds and the rule's, and how many were tried and left out."""
    device = recorded[0].device
    rule = choice.by_rule(form, device)
    recorded[0].zero_()
    _launch(recorded, rule)()
    expected = recorded[0].clone()
    rule_us = 1000 * timer(_launch(recorded, rule))
    best, best_us, tried, wrong, failed = rule, rule_us, 1, 0, 0
    for tiles in candidates(form, device, quantizes=recorded[3].get("out_scale") is not None):
        if left() <= 0:
            break
        tried += 1
        try:
            if not _same(recorded, tiles, expected):
                wrong += 1
                continue
            us = 1000 * timer(_launch(recorded, tiles))
        except Exception as error:  # what does not compile or fit fails in many ways, and others may still be faster
            failed += 1
            log.debug("%s with %s: %s", form.name, tiles, error)
            continue
        if us < best_us and us < rule_us * (1 - LEAD):
            best, best_us = tiles, us
    counts = {"tried": tried, "wrong": wrong, "failed": failed}
    return {"tiles": best, "us": round(best_us, 2), "rule_us": round(rule_us, 2)} | counts


def tune_tiles(
    run: Callable[[], object], path: str | os.PathLike[str], *, seconds: float = 600, timer: Timer | None = None
) -> dict[str, Any]:
    """Measures the products that a function launches, and writes the table of their fastest tiles.

    Args:
        run: calls kernels.linear, mlp, scaled_linear or their backward passes; it is called once.
        path: of the table, which is replaced when every form was measured.
        seconds: that may pass; forms not begun then keep the rule's tiles, and are not in the table.
        timer: milliseconds of a function; triton.testing.do_bench by default.

    Returns:
        The table.

    Raises:
        ValueError: nothing was launched.
    """
    timer = timer or (lambda fn: triton.testing.do_bench(fn, return_mode="median"))
    start = time.monotonic()
    before, choice.recorded = choice.recorded, {}
    try:
        run()
        launches = choice.recorded
    finally:
        choice.recorded = before
    if not launches:
        raise ValueError("run launched no product of kernels.linear; pass a function that does, with backend='triton'")
    forms = {}
    device = next(iter(launches.values()))[0].device
    for form, recorded in sorted(launches.items(), key=lambda entry: -entry[0].M * entry[0].N * entry[0].K):
        if time.monotonic() - start > seconds:
            log.warning("WARNING: %d forms were not measured within %g seconds", len(launches) - len(forms), seconds)
            break
        forms[form.name] = entry = _fastest(form, recorded, timer, lambda: seconds - (time.monotonic() - start))
        log.info(
            "%s: %.1f us, by the rule %.1f us (%d tried)", form.name, entry["us"], entry["rule_us"], entry["tried"]
        )
    table = {
        "format": choice.FORMAT,
        "device": choice.device_name(device),
        "triton": triton.__version__,
        "forms": forms,
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(table, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return table


def step_products(size: str, clips: int, device: torch.device, dtype: torch.dtype) -> None:
    """The products of a stage-1 step, forward and backward: of the student, and of a teacher in `dtype` and in 8 bits."""
    width = SIZES[size][0]
    rows, frozen = clips * FRAMES * KEPT, clips * FRAMES * (1 + SIZES[size][2])

    def numbers(*shape: int, trained: bool = False) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5).requires_grad_(trained)

    x = numbers(rows, width, trained=True)
    stream = torch.randn(rows, width, device=device)
    square, wide = numbers(width, width, trained=True), numbers(3 * width, width, trained=True)
    first, second = numbers(4 * width, width, trained=True), numbers(width, 4 * width, trained=True)
    options = {"backend": "triton"}
    (kernels.linear(x, wide, **options).sum() + kernels.linear(x, square, **options).sum()).backward()
    scale = torch.ones(rows, 1, device=device)
    kernels.mlp(x, first, None, second, None, residual=stream, branch_scale=scale, **options).sum().backward()
    del x, stream
    with torch.no_grad():
        x = numbers(frozen, width)
        one, zero = torch.ones(width, device=device), torch.zeros(width, device=device)
        for matrix, activation in ((wide, "none"), (first, "quick_gelu")):
            weight, bias, norm = kernels.defer_norm(matrix, None, one, zero, dtype=dtype)
            hidden = kernels.linear(x, weight, bias, activation=activation, norm=norm, **options)
        kernels.linear(x, square, residual=x, **options)
        kernels.linear(hidden, second, residual=x, **options)
        eight = "fp8" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) else "int8"
        values, scales = kernels.norm_quantize(x, one, zero, eight, **options)
        kernels.scaled_linear(values, scales, *kernels.quantize_weight(wide, eight), dtype=dtype, **options)
        hidden, blocks = kernels.scaled_linear(
            values,
            scales,
            *kernels.quantize_weight(first, eight),
            activation="quick_gelu",
            dtype=values.dtype,
            **options,
        )
        kernels.scaled_linear(
            hidden, blocks, *kernels.quantize_weight(second, eight), residual=x, dtype=dtype, **options
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where there is no GPU."""
    parser = argparse.ArgumentParser("python -m kernels.tune", description=__doc__.splitlines()[0].split(":")[0] + ".")
    parser.add_argument("file", type=Path, help="of the table that is written")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["b16"], help="models (default: b16)")
    parser.add_argument("--clips", type=int, default=64, help="clips of a step on this GPU (default: 64)")
    parser.add_argument("--seconds", type=float, default=600, help="that may pass (default: 600)")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; tiles are measured where they are used", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda")

    def run() -> None:
        for size in given.sizes:
            step_products(size, given.clips, device, torch.bfloat16)

    tune_tiles(run, given.file, seconds=given.seconds)
    print(f"{given.file}: use it by kernels.use_tiles, or by {choice.VARIABLE}={given.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
