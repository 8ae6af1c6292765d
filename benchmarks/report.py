"""The figures of a results folder as Markdown tables and a plot: `python -m benchmarks.report [FOLDER]`.

Without FOLDER the newest one under benchmarks/results. Prints the tables, and writes table.md and, of steps on a GPU,
plot.svg beside the figures. What gpu.sh and what cpu.sh wrote is told by the files' names.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

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


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _microseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return "failed" if "error" in row else f"{row['seconds'] * 1e6:.1f}"


def kernel_table(path: Path) -> str:
    """Time of each provider, and what ours reaches of the copy rate."""
    rows = rows_of(path)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        found = {row["provider"]: row for row in rows if row["kernel"] == kernel}
        times = [_microseconds(found.get(name)) for name in providers]
        ours, plain = found["ours"], found.get("plain", {})
        if "error" in ours:
            lines.append([kernel, ours["error"], "", "", *times])
            continue
        rate = f"{ours['tflops']:.1f} TFLOP/s" if ours["tflops"] else f"{ours['gb_per_s']:.0f} GB/s"
        share = "" if ours["tflops"] else f"{100 * ours['share_of_copy_rate']:.0f}%"
        gain = f"{plain['seconds'] / ours['seconds']:.2f}" if "seconds" in plain else ""
        lines.append([kernel, rate, share, gain, *times])
    head = ["operation", "ours", "of the copy rate", "plain / ours", *(f"{name}, µs" for name in providers)]
    return f"{path.stem}: copy rate {rows[0]['copy_gb_per_s']:.0f} GB/s in this run\n\n" + _table(head, lines)


def steps_by_batch(path: Path) -> dict[int, dict[str, Row]]:
    """Batch size -> road -> its line."""
    found: dict[int, dict[str, Row]] = {}
    for row in rows_of(path):
        found.setdefault(row["batch_size"], {})[row["name"]] = row
    return found


def step_table(paths: list[Path]) -> str:
    """Clips per second of each road as it is and as a ratio to the plain one, shares of the matmul rate, peak memory."""

    def value(row: Row | None, key: str, scale: float = 1.0, unit: str = "") -> str:
        if row is None:
            return ""
        return row["error"] if "error" in row else f"{scale * row[key]:.{0 if unit else 2}f}{unit}"

    def ratio(above: Row | None, below: Row | None) -> str:
        known = above and below and "error" not in above and "error" not in below
        return f"{above['clips_per_s'] / below['clips_per_s']:.2f}" if known else ""

    lines = []
    for path in paths:
        for batch, roads in steps_by_batch(path).items():
            fast, compiled, plain = (roads.get(name) for name in ("fast", "compiled", "plain"))
            lines.append(
                [path.stem.removeprefix("steps_"), str(batch)]
                + [value(row, "clips_per_s") for row in (fast, compiled, plain)]
                + [ratio(fast, plain), ratio(compiled, plain)]
                + [value(row, "share_of_matmul_rate", 100, "%") for row in (fast, compiled)]
                + [value(row, "peak_memory_gib") for row in (fast, compiled, plain)]
            )
    head = ["step", "clips", "fast, clips/s", "compiled", "plain", "fast / plain", "compiled / plain"]
    head += ["fast, of the matmul rate", "compiled", "fast, peak GiB", "compiled", "plain"]
    return _table(head, lines)


def teacher_table(path: Path) -> str:
    """Each precision of the teacher beside the first."""
    rows, lines = rows_of(path), []
    for row in rows:
        if "error" in row:
            lines.append([row["precision"], row["error"], "", "", ""])
            continue
        rate = row["batch_size"] / row["seconds"]
        ratio = rows[0]["seconds"] / row["seconds"] if "seconds" in rows[0] else float("nan")
        memory, cosine = f"{row['peak_memory_gib']:.2f}", f"{row['cosine_to_first']:.5f}"
        lines.append([row["precision"], f"{rate:.2f}", f"{ratio:.2f}", memory, cosine])
    head = [path.stem, "clips/s", f"against {rows[0]['precision']}", "peak GiB", "cosine of the targets"]
    return _table(head, lines)


def profile_table(paths: list[Path]) -> str:
    """Shares of a fast step's time by kind of work."""
    found = [json.loads(path.read_text()) for path in paths]
    kinds = sorted({kind for entry in found for kind in entry["shares"]}, key=lambda k: -found[0]["shares"].get(k, 0))
    lines = [
        [f"{entry['model']}, {entry['batch_size']} clips", *(f"{100 * entry['shares'].get(k, 0):.0f}%" for k in kinds)]
        for entry in found
    ]
    return _table(["share of a step", *kinds], lines)


def cpu_step_table(paths: list[Path]) -> str:
    """Steps on a CPU, every round of them; ratios to the plain road and to the official code, round by round."""
    found: dict[tuple, dict[str, list[Row]]] = {}
    for row in (row for path in paths for row in rows_of(path)):
        eight = row["teacher_precision"] != "native"
        name = f"{row['road']}, {row['teacher_precision']} teacher" if eight else row["road"]
        about = (row["bench"], row["model"], row["batch_size"], row["computed_in"])
        found.setdefault(about, {}).setdefault(name, []).append(row)
    table = []
    for (bench, model, batch, dtype), roads in found.items():
        for name, rows in roads.items():
            rates = [row["clips_per_s"] for row in rows]
            cells = [f"{bench}, {model}, {batch} clips", name, dtype, ", ".join(f"{rate:.3f}" for rate in rates)]
            for baseline in ("plain", "official"):
                ratios = [a / b["clips_per_s"] for a, b in zip(rates, roads.get(baseline, []), strict=False)]
                cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
            cells.append(f"{statistics.median(row['share_of_matmul_rate'] for row in rows):.0%}")
            table.append([*cells, f"{max(row['peak_memory_gib'] for row in rows):.2f}"])
    head = ["step", "road", "dtype", "clips/s, each round", "against plain", "against official", "of the matmul rate"]
    return _table([*head, "peak GiB"], table)


def parts_table(path: Path) -> str:
    """Each profile of a file: the parts of a step beside their floors."""
    texts = []
    for row in rows_of(path):
        what = f"{row['model']}, {row['batch_size']} clips, {row['computed_in']}, {row['teacher_precision']} teacher"
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


def step_plot(paths: list[Path]) -> str:
    """Clips per second of each road by batch size as an SVG of bars, one panel for each model."""
    colours = {"plain": "#9aa5b1", "fast": "#3b7dd8", "compiled": "#1d3f72"}
    bar, gap, high, left = 34, 26, 220, 60
    parts, x = [], left
    for path in paths:
        steps = steps_by_batch(path)
        known = {(b, n): r["clips_per_s"] for b, roads in steps.items() for n, r in roads.items() if "error" not in r}
        top = max(known.values(), default=1.0)
        start = x
        for batch, roads in steps.items():
            first = x
            for name in (name for name in colours if name in roads):
                rate = known.get((batch, name), 0.0)
                tall = high * rate / top
                label = f"{rate:.3g}" if rate else roads[name]["error"]
                parts.append(
                    f'<rect x="{x}" y="{40 + high - tall:.1f}" width="{bar - 4}" height="{tall:.1f}" fill="{colours[name]}"/>'
                    f'<text x="{x + bar / 2 - 2}" y="{34 + high - tall:.1f}" text-anchor="middle">{label}</text>'
                )
                x += bar
            parts.append(f'<text x="{(first + x) / 2}" y="{high + 58}" text-anchor="middle">{batch} clips</text>')
            x += gap
        title = f"{path.stem.removeprefix('steps_')}, clips/s"
        parts.append(f'<text x="{start}" y="16" font-weight="bold">{title}</text>')
        x += gap
    for number, (name, colour) in enumerate(colours.items()):
        at = left + 110 * number
        parts.append(f'<rect x="{at}" y="{high + 72}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 18}" y="{high + 82}">{name}</text>')
    size = f'width="{max(x, left + 340)}" height="{high + 96}"'
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>\n'


def _machine(path: Path) -> Row:
    try:
        return json.loads(path.read_text())
    except ValueError:
        sys.exit(f"benchmarks.report: {path} is no JSON; measure again")


def tables(folder: Path) -> str:
    """All tables of a folder, the machine first."""
    machine = _machine(folder / "machine.json")
    parts = [", ".join(f"{key} {value}" for key, value in machine.items() if value)]
    steps, profiles = sorted(folder.glob("steps_*.jsonl")), sorted(folder.glob("profile_*.json"))
    parts += [step_table(steps)] if steps else []
    parts += [
        kernel_table(path) for kind in ("kernels", "attention") for path in sorted(folder.glob(f"{kind}_*.jsonl"))
    ]
    parts += [teacher_table(path) for path in sorted(folder.glob("teacher_*.jsonl"))]
    parts += [profile_table(profiles)] if profiles else []
    cpu_steps = sorted(folder.glob("cpu_steps_*.jsonl"))
    parts += [cpu_step_table(cpu_steps)] if cpu_steps else []
    for pattern, render in (("parts_*.jsonl", parts_table), ("input.jsonl", input_table), ("soak.jsonl", soak_table)):
        parts += [render(path) for path in sorted(folder.glob(pattern))]
    return "\n\n".join(parts) + "\n"


def newest() -> Path:
    """The folder under benchmarks/results whose figures are the latest."""
    found = sorted(RESULTS.glob("*/machine.json"), key=lambda path: _machine(path).get("date", ""))
    if not found:
        sys.exit(f"benchmarks.report: no results under {RESULTS}; benchmarks/gpu.sh and benchmarks/cpu.sh write them")
    return found[-1].parent


def main(folder: Path) -> None:
    if not (folder / "machine.json").is_file():
        sys.exit(
            f"benchmarks.report: {folder} holds no machine.json, which benchmarks/gpu.sh and benchmarks/cpu.sh write into OUT"
        )
    text = tables(folder)
    (folder / "table.md").write_text(text)
    steps = sorted(folder.glob("steps_*.jsonl"))
    if steps:
        (folder / "plot.svg").write_text(step_plot(steps))
    print(text, end="")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(f"usage: python -m benchmarks.report [FOLDER]\n\n{__doc__}")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else newest())
