"""Renders the figures of a results folder as Markdown tables: `python -m benchmarks.report benchmarks/results/NAME`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _rows(path: Path) -> list[dict[str, Any]]:
    return [
        entry["extra_info"] | {"median": entry["stats"]["median"]}
        for entry in json.loads(path.read_text())["benchmarks"]
    ]


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def kernel_table(path: Path) -> str:
    """Time of each provider, and what ours reaches of the copy rate."""
    rows = _rows(path)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        found = {row["provider"]: row for row in rows if row["kernel"] == kernel}
        ours = found["ours"]
        rate = f"{ours['tflops']:.0f} TFLOP/s" if ours["tflops"] else f"{ours['gb_per_s']:.0f} GB/s"
        share = "" if ours["tflops"] else f"{100 * ours['share_of_copy_rate']:.0f}%"
        times = [f"{found[name]['seconds'] * 1e6:.1f}" if name in found else "" for name in providers]
        lines.append([kernel, rate, share, *times])
    head = ["operation", "ours", "of the copy rate", *(f"{name}, µs" for name in providers)]
    return f"{path.stem}: copy rate {rows[0]['copy_gb_per_s']:.0f} GB/s\n\n" + _table(head, lines)


def step_table(paths: list[Path]) -> str:
    """Clips per second of the fast and the plain road, and their ratio, by size and batch."""
    lines = []
    for path in paths:
        entries = json.loads(path.read_text())["benchmarks"]
        rates = {entry["params"]["road"]: entry["extra_info"]["clips_per_s"] for entry in entries}
        tflops = entries[0]["extra_info"]["tflops"]
        if {"fast", "plain"} <= rates.keys():
            ratio = f"{rates['fast'] / rates['plain']:.2f}"
            lines.append([path.stem, f"{rates['fast']:.2f}", f"{rates['plain']:.2f}", ratio, f"{tflops:.2f}"])
    return _table(["step", "fast, clips/s", "plain, clips/s", "ratio", "fast, TFLOP/s"], lines)


def main(folder: Path) -> str:
    """All tables of a folder, the machine first."""
    machine = json.loads((folder / "machine.json").read_text())
    parts = [", ".join(f"{key} {value}" for key, value in machine.items())]
    parts += [kernel_table(path) for path in sorted(folder.glob("kernels_*.json"))]
    steps = sorted(folder.glob("step_*.json"))
    return "\n\n".join(parts + ([step_table(steps)] if steps else []))


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
