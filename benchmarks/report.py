"""The figures of a results folder as Markdown tables and a plot: `python -m benchmarks.report [FOLDER]`.

Without FOLDER the newest one under benchmarks/results. Prints the tables, and writes table.md and, of steps on a GPU,
plot.svg beside the figures (not with --no-plot). gpu.sh leaves a rates.json (gpu_tables.py), cpu.sh a machine.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_tables
from benchmarks.gpu_tables import table as _table
from umt_fast.bench import profile

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """The lines of a file; a last line cut short is left out."""
    lines, found = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                sys.exit(f"benchmarks.report: {path}, line {number} is no JSON; measure that part again")
    return found


def cpu_step_table(paths: list[Path]) -> str:
    """Steps on a CPU, every round of them; ratios to the plain implementation and to the official code, round by round."""
    found: dict[tuple, dict[str, list[Row]]] = {}
    for row in (row for path in paths for row in rows_of(path)):
        eight = row["teacher_precision"] != "native"
        name = f"{row['implementation']}, {row['teacher_precision']} teacher" if eight else row["implementation"]
        about = (row["bench"], row["model"], row["batch_size"], row["computed_in"])
        found.setdefault(about, {}).setdefault(name, []).append(row)
    table = []
    for (bench, model, batch, dtype), implementations in found.items():
        for name, rows in implementations.items():
            rates = [row["clips_per_s"] for row in rows]
            cells = [f"{bench}, {model}, {batch} clips", name, dtype, ", ".join(f"{rate:.3f}" for rate in rates)]
            for baseline in ("plain", "official"):
                ratios = [a / b["clips_per_s"] for a, b in zip(rates, implementations.get(baseline, []), strict=False)]
                cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
            cells.append(f"{statistics.median(row['share_of_matmul_rate'] for row in rows):.0%}")
            table.append([*cells, f"{max(row['peak_memory_gib'] for row in rows):.2f}"])
    head = [
        "step",
        "implementation",
        "dtype",
        "clips/s, each round",
        "against plain",
        "against official",
        "of the matmul rate",
    ]
    return _table([*head, "peak GiB"], table)


def parts_table(path: Path) -> str:
    """Each profile of a file: the parts of a step beside their bounds."""
    texts = []
    for row in rows_of(path):
        stage = f", {row['stage']}" if "stage" in row else ""  # older lines are all of stage 1
        what = f"{row['model']}{stage}, {row['batch_size']} clips, {row['computed_in']}, {row['teacher_precision']} teacher"
        texts.append(f"{what}\n\n{profile.table(row)}")
    return "\n\n".join(texts)


def input_table(path: Path) -> str:
    """Clips per second of processor time of each reader, and against decord where it was there."""
    rows = rows_of(path)
    readers = list(rows[0]["clips_per_cpu_s"]) if rows else []
    lines = []
    for row in rows:
        against = row.get("against_decord", {})
        cells = [
            f"{row['clips_per_cpu_s'][r]:.1f}" + (f" ({against[r]:.2f}x)" if r in against else "") for r in readers
        ]
        lines.append([row["file"], *cells])
    if len(rows) > 1:
        # As many clips of each file: rates add up as their inverses do.
        mean = {r: len(rows) / sum(1 / row["clips_per_cpu_s"][r] for row in rows) for r in readers}
        cells = [
            f"{mean[r]:.1f}" + (f" ({mean[r] / mean['decord']:.2f}x)" if "decord" in mean else "") for r in readers
        ]
        lines.append(["together", *cells])
    return _table(["clips/s and core of the loader (against decord)", *readers], lines)


def soak_table(path: Path) -> str:
    """Memory of the loader at the first, the middle and the last line."""
    rows = rows_of(path)
    chosen = [rows[number] for number in sorted({0, len(rows) // 2, len(rows) - 1})] if rows else []
    lines = [[str(row["clips"]), f"{row['mib']['main']:.1f}", f"{row['mib']['children']:.1f}"] for row in chosen]
    return _table(["clips read", "main, MiB", "workers, MiB"], lines)


def _machine(path: Path) -> Row:
    try:
        return json.loads(path.read_text())
    except ValueError:
        sys.exit(f"benchmarks.report: {path} is no JSON; measure again")


def tables(folder: Path) -> str:
    """All tables of a folder, the machine first."""
    if (folder / "rates.json").exists():
        return "\n\n".join(gpu_tables.tables(folder, rows_of)) + "\n"
    machine = _machine(folder / "machine.json")
    parts = [", ".join(f"{key} {value}" for key, value in machine.items() if value)]
    cpu_steps = sorted(folder.glob("cpu_steps_*.jsonl"))
    parts += [cpu_step_table(cpu_steps)] if cpu_steps else []
    for pattern, render in (("parts_*.jsonl", parts_table), ("input.jsonl", input_table), ("soak.jsonl", soak_table)):
        parts += [render(path) for path in sorted(folder.glob(pattern))]
    return "\n\n".join(parts) + "\n"


def newest() -> Path:
    """The folder under benchmarks/results whose figures are the latest."""
    found = [path for name in ("machine.json", "rates.json") for path in RESULTS.glob(f"*/{name}")]
    found.sort(key=lambda path: _machine(path).get("date", ""))
    if not found:
        sys.exit(f"benchmarks.report: no results under {RESULTS}; benchmarks/gpu.sh and benchmarks/cpu.sh write them")
    return found[-1].parent


def main(folder: Path, plot: bool = True) -> None:
    if not any((folder / name).is_file() for name in ("machine.json", "rates.json")):
        sys.exit(
            f"benchmarks.report: {folder} holds no machine.json and no rates.json, which benchmarks/cpu.sh and "
            "benchmarks/gpu.sh write into OUT"
        )
    text = tables(folder)
    (folder / "table.md").write_text(text)
    steps = folder / "steps.jsonl"
    if plot and steps.exists():
        (folder / "plot.svg").write_text(gpu_tables.plot(rows_of(steps)))
    print(text, end="")


if __name__ == "__main__":
    given = [value for value in sys.argv[1:] if value != "--no-plot"]
    if len(given) > 1 or given in (["-h"], ["--help"]):
        sys.exit(f"usage: python -m benchmarks.report [FOLDER] [--no-plot]\n\n{__doc__}")
    main(Path(given[0]) if given else newest(), plot="--no-plot" not in sys.argv)
