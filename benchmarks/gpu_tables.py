"""The figures that gpu.py writes, as Markdown tables and an SVG; report.py calls it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Rows of cells as Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def by(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows grouped by some of their values, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def good(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def header(about: Row) -> str:
    """The scalars of rates.json, and the clocks while its rates were measured."""
    said = [f"{key} {value}" for key, value in about.items() if value and not isinstance(value, dict)]
    for name in ("clocks", "clocks_of_rates"):
        if about.get(name):
            said.append(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in about[name].items()))
    return ", ".join(said)


def phase_table(rows: list[Row]) -> str:
    """How each phase ended when it was last tried."""
    last = {row["phase"]: row for row in rows}
    lines = [
        [
            row["phase"],
            row["state"],
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            row["reason"].replace("|", "/"),
        ]
        for row in last.values()
    ]
    return table(["phase", "state", "s", "why"], lines)


def check_tables(rows: list[Row]) -> list[str]:
    """Tests by file; attention's largest error by backend and case; ways of a step."""
    parts = []
    tests = {row["file"]: row for row in rows if row["bench"] == "tests"}
    if tests:
        lines = [
            [
                name,
                "ok" if row["ok"] else "FAILED",
                *(str(row.get(key, 0)) for key in ("passed", "skipped", "failed")),
                ", ".join(row["failed_tests"])[:300].replace("|", "/"),
            ]
            for name, row in tests.items()
        ]
        parts.append(table(["tests", "", "passed", "skipped", "failed", "which"], lines))
    values = [row for row in rows if row["bench"] == "attention values"]
    lines = []
    for (case, tokens, queries), group in by(values, "case", "tokens", "queries").items():
        cells = {row["backend"]: row["error"][:40] if "error" in row else _worst(row) for row in group}
        lines.append([f"{case}, {queries} x {tokens}", *(cells.get(name, "") for name in _backends(values))])
    if lines:
        head = ["attention: largest relative error of output, dq, dk, dv", *_backends(values)]
        parts.append(table(head, lines))
    for row in {row["way"]: row for row in rows if row["bench"] == "way of a step"}.values():
        said = row.get("error") or f"largest relative gap of losses {row['largest_relative_gap']:.2g}"
        parts.append(f"A step beside an eager one, {row['way']}: {said}")
    for row in {row["precision"]: row for row in rows if row["bench"] == "fidelity"}.values():
        said = row.get("error") or (
            f"lowest mean cosine of a layer {min(row['cosine_per_layer']):.4f}, same visible tokens {row['mask_overlap']:.0%} "
            f"(of chance {row['mask_overlap_of_chance']:.0%})"
        )
        parts.append(f"Targets of the {row['precision']} teacher beside the exact one's, random weights: {said}")
    return parts


def _backends(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in rows))


def _worst(row: Row) -> str:
    return f"{max(row['errors'].values()):.2g}" + ("" if row.get("ok", True) else " WRONG")


def _rate(row: Row | None) -> str:
    return "" if row is None else "failed" if "error" in row else f"{row['tflops']:.4g}"


def rate_tables(rows: list[Row]) -> list[str]:
    """TFLOP/s of each product and attention; what failed is said below."""
    products = [row for row in rows if row["bench"] == "product"]
    attention = [row for row in rows if row["bench"] == "attention"]
    parts = []
    for group, what, column in (
        (
            products,
            "TFLOP/s of a product",
            lambda r: f"{r['kind']} {r['pass']}" + (f" + {_short(r['epilogue'])}" if r["epilogue"] else ""),
        ),
        (attention, "TFLOP/s of attention", lambda r: f"{r['backend']} {r['pass']}"),
    ):
        if not group:
            continue
        columns = list(dict.fromkeys(map(column, group)))
        lines = []
        for keys, same in by(group, "model", "shape").items():
            first, cells = same[0], {column(row): row for row in same}
            size = (
                f"{first['rows']} x {first['inputs']} to {first['outputs']}"
                if "rows" in first
                else f"{first['batch']} x {first['tokens']}, torch takes {first['torch_takes']}"
            )
            lines.append([" ".join(keys), size, *(_rate(cells.get(name)) for name in columns)])
        parts.append(table([what, "size", *columns], lines))
        failed = {row["error"] for row in group if "error" in row}
        parts += ["Failed: " + "; ".join(sorted(failed)).replace("|", "/")] if failed else []
    return parts


def _short(epilogue: str) -> str:
    return "epilogue" if epilogue != "quantize, bias" else epilogue


def medians(rows: list[Row]) -> dict[str, Row]:
    """Variant -> its line with the median clips/s of all turns, or its error where it never ran."""
    found = {}
    for (name,), group in by(rows, "variant").items():
        ran = good(group)
        if not ran:
            found[name] = group[-1]
            continue
        rates = [row["clips_per_s"] for row in ran]
        first = next((row for row in ran if row.get("turn") == 0), ran[0])
        found[name] = first | {"clips_per_s": statistics.median(rates), "all": rates, "turns": ran}
    return found


def step_table(rows: list[Row], bound_of: Callable[[str, int], float | None]) -> str:
    """Whole steps; bound_of(model, clips): clips/s at most at this machine's rates."""
    lines = []
    for (model, clips), group in by([r for r in rows if r["bench"] == "step"], "model", "batch_size").items():
        found, bound = medians(group), bound_of(model, clips)
        plain = found.get("plain", {}).get("clips_per_s")
        for name, row in found.items():
            if "error" in row:
                lines.append([f"{model}, {clips} clips", name, row["error"].replace("|", "/"), *[""] * 8])
                continue
            turns, rate = row["turns"], row["clips_per_s"]
            ms = [
                f"{statistics.median(turn[key] for turn in turns):.2f}" for key in ("ms_per_step", "host_ms_per_step")
            ]
            low, high = min(t["ms_spread"][0] for t in turns), max(t["ms_spread"][1] for t in turns)
            share, peak, clocks = (
                row.get("share_of_matmul_rate"),
                row.get("peak_memory_gib"),
                turns[-1].get("clocks") or {},
            )
            exact = name != "plain" and "teacher" not in name
            lines.append(
                [
                    f"{model}, {clips} clips",
                    name,
                    f"{rate:.4g} ({', '.join(f'{value:.4g}' for value in row['all'])})",
                    f"{rate / plain:.2f}" if plain else "",
                    f"{ms[0]} ({low:.2f} to {high:.2f})",
                    ms[1],
                    f"{share:.0%}" if share else "",
                    f"{bound:.4g}, {rate / bound:.0%}" if bound and exact else "",
                    f"{peak:.2f}" if peak is not None else "",
                    f"{clocks['sm_mhz']:.0f} MHz, {clocks['power_w']:.0f} W" if clocks else "",
                ]
            )
    head = [
        "step",
        "variant",
        "clips/s, median (each turn)",
        "against plain",
        "ms a step (10 to 90%)",
        "ms to issue it",
    ]
    return table([*head, "of the matmul rate", "bound in clips/s, reached", "peak GiB", "clocks"], lines)


def profile_tables(rows: list[Row]) -> list[str]:
    """Shares of kinds of work, the busy share, the costliest kernels."""
    parts = []
    for row in (row for row in rows if row["bench"] == "profile"):
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in row["shares"].items())
        busy = (
            f"; busy {row['busy_share']:.0%}, {row['kernels_per_step']:.0f} kernels a step"
            if "busy_share" in row
            else ""
        )
        lines = [
            [
                f"`{top['name'].replace('|', '/')}`",
                f"{top['share']:.1%}",
                f"{top['calls_per_step']:g}",
                f"{top['us_per_step']:.0f}",
            ]
            for top in row["top"][:10]
        ]
        title = f"{row['model']}, {row['batch_size']} clips, {row['variant']}, {row['of']}: {kinds}{busy}"
        parts.append(f"{title}\n\n" + table(["costliest", "share", "calls a step", "µs a step"], lines))
    return parts


def trainer_table(rows: list[Row]) -> list[str]:
    """The Trainer's clips/s beside the bench's of the same variant, its losses, and the official code."""
    lines, parts = [], []
    trained = {(row["model"], row["variant"]): row for row in rows if row["bench"] == "trainer"}
    for row in trained.values():
        if "error" in row:
            lines.append([row["model"], row["variant"], row["error"].replace("|", "/"), "", "", ""])
            continue
        same = [
            r for r in rows if r["bench"] == "step" and r["model"] == row["model"] and r["variant"] == row["variant"]
        ]
        bench = medians(same).get(row["variant"], {}).get("clips_per_s")
        lines.append(
            [
                row["model"],
                row["variant"],
                f"{row['clips_per_s']:.4g}",
                f"{bench:.4g}" if bench else "",
                f"{row['clips_per_s'] / bench:.0%}" if bench else "",
                f"{row['data_wait']:.0%}",
            ]
        )
    if lines:
        parts.append(table(["Trainer", "variant", "clips/s", "bench", "of it", "waits for data"], lines))
    for row in {row["model"]: row for row in rows if row["bench"] == "trainer losses"}.values():
        names = " and ".join(row["losses"])
        parts.append(
            f"{row['model']}: losses of the Trainer, {names}, differ by at most {row['largest_relative_gap']:.2g}"
        )
    for row in (row for row in rows if row["bench"] == "official"):
        ours = medians([r for r in rows if r["bench"] == "step" and r["model"] == row["model"]])
        best = max(good(ours.values()), key=lambda r: r["clips_per_s"], default=None)
        told = (
            f"; ours, {best['variant']}, is {best['clips_per_s'] / row['clips_per_s']:.2f} times as fast"
            if best
            else ""
        )
        parts.append(
            f"The official code, {row['model']}, {row['batch_size']} clips: {row['clips_per_s']:.4g} clips/s{told}"
        )
    return parts


def kernel_table(rows: list[Row]) -> str:
    """Time of each provider, and what ours reaches of the bound."""
    last = {(row["size"], row["kernel"], row["provider"]): row for row in rows}
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for (size, kernel), group in by(last.values(), "size", "kernel").items():
        found = {row["provider"]: row for row in group}
        ours, plain = found.get("ours", {"error": "cut"}), found.get("plain", {})
        times = [_microseconds(found.get(name)) for name in providers]
        if "error" in ours:
            lines.append([f"{size}, {kernel}", ours["error"].replace("|", "/"), "", "", "", *times])
            continue
        rate = f"{ours['tflops']:.4g} TFLOP/s" if ours["tflops"] else f"{ours['gb_per_s']:.4g} GB/s"
        bound = [f"{ours['bound_s'] * 1e6:.1f}", f"{ours['share_of_bound']:.0%}"] if "bound_s" in ours else ["", ""]
        gain = f"{plain['seconds'] / ours['seconds']:.2f}" if "seconds" in plain else ""
        lines.append([f"{size}, {kernel}", rate, *bound, gain, *times])
    head = ["operation", "ours", "bound, µs", "reached", "plain / ours", *(f"{name}, µs" for name in providers)]
    copy = f"Copy rate in this run: {rows[0]['copy_gb_per_s']:.0f} GB/s; a bound is bytes over it or FLOPs over the matmul rate"
    return f"{copy}\n\n" + table(head, lines)


def _microseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return "failed" if "error" in row else f"{row['seconds'] * 1e6:.1f}"


def bound_at(about: Row) -> Callable[[str, int], float | None]:
    """(model, clips) -> clips/s at most: every elementwise pass fused, at the measured rates of the model's own products."""

    def bound(model: str, clips: int) -> float | None:
        from umt_fast.bench.stage1 import costs, stage1_config
        from umt_fast.plan import work_of

        rate = next(iter(about.get("products", {}).get(model, {}).values()), about.get("matmul_tflops"))
        if not rate or not about.get("copy_gb_per_s"):
            return None
        config = stage1_config(model, clips, "bf16")
        parts = costs(config, work_of(config).trained).values()
        return clips / sum(max(cost.flops / rate / 1e12, cost.bytes / about["copy_gb_per_s"] / 1e9) for cost in parts)

    return bound


def tables(folder: Path, read: Callable[[Path], list[Row]]) -> list[str]:
    """All tables of a folder of gpu.py; read: the lines of a file."""
    about = json.loads((folder / "rates.json").read_text())
    rows = {
        name: read(path) if (path := folder / f"{name}.jsonl").exists() else []
        for name in ("phases", "rates", "checks", "steps", "kernels")
    }
    parts = [header(about)] + ([phase_table(rows["phases"])] if rows["phases"] else [])
    if any(row["bench"] == "step" for row in rows["steps"]):
        parts.append(step_table(rows["steps"], bound_at(about)))
    parts += trainer_table(rows["steps"]) + check_tables(rows["checks"]) + rate_tables(rows["rates"])
    parts += [kernel_table(rows["kernels"])] if rows["kernels"] else []
    return parts + profile_tables(rows["steps"])


def plot(rows: list[Row]) -> str:
    """Clips/s of each variant as an SVG of bars, models one below the other."""
    bars, y = [], 10
    for (model, clips), group in by([r for r in rows if r["bench"] == "step"], "model", "batch_size").items():
        found = good(medians(group).values())
        top = max((row["clips_per_s"] for row in found), default=1.0)
        bars.append(f'<text x="10" y="{y + 12}" font-weight="bold">{model}, {clips} clips, clips/s</text>')
        y += 20
        for row in found:
            wide = 380 * row["clips_per_s"] / top
            bars.append(
                f'<text x="10" y="{y + 12}">{escape(row["variant"])}</text>'
                f'<rect x="190" y="{y}" width="{wide:.1f}" height="16" fill="#3b7dd8"/>'
                f'<text x="{195 + wide:.1f}" y="{y + 12}">{row["clips_per_s"]:.4g}</text>'
            )
            y += 22
        y += 14
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" {style}>{"".join(bars)}</svg>\n'
