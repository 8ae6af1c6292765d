"""One self-contained HTML page about a run or a quickstart: figures, curves, speed, frames with their kept tokens.

A section appears only where its data does; nothing is fetched when the page is opened.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from umt_fast.config import ConfigError
from umt_fast.extras import packages_of

with packages_of("video"):
    from PIL import Image

log = logging.getLogger("umt_fast")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d5d9de; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #e4e7eb;
       text-align: left; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
figcaption, .note { color: #5b636d; font-size: .87rem; max-width: 56rem; }
img { image-rendering: pixelated; max-width: 100%; }
"""
_COLORS = ("#2563a8", "#c2571a", "#2f8f57", "#8a3fa0", "#b3202c", "#6b7280")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are no row of a step, as a last one cut short, are left out and counted."""
    lines, rows = path.read_text(errors="replace").splitlines(), []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _number(row.get("step")):
            rows.append(row)
    if len(rows) < len(lines):
        log.warning("%s: left out %d lines that are no row of a step", path, len(lines) - len(rows))
    return rows


def read_results(path: Path) -> dict[str, Any]:
    """What a quickstart's results.json holds. Raises ConfigError where it is damaged."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is damaged; delete it, and the quickstart does its parts again (trainings go on from their checkpoints)"
        )
    return values


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 2**63  # not so for NaN


def _mean(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> float | str:
    values = [row[key] for row in rows if _number(row.get(key))]
    return scale * sum(values) / len(values) if values else "not logged"


def _table(rows: list[list[Any]], head: list[str]) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, (int, float))
        text = f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))
        return f'<td class="n">{text}</td>' if number else f"<td>{text}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def curve(lines: dict[str, tuple[list[float], list[float]]], title: str, width: int = 420, height: int = 220) -> str:
    """An SVG figure of named (x, y) lines over common axes; nothing where no line has a point."""
    lines = {name: points for name, points in lines.items() if points[0]}
    if not lines:
        return ""
    every_x = [x for xs, _ in lines.values() for x in xs]
    every_y = [y for _, ys in lines.values() for y in ys]
    left, bottom, top = 52, 24, 8
    low_x, high_x, low_y, high_y = min(every_x), max(every_x), min(every_y), max(every_y)
    span_x, span_y = (high_x - low_x) or 1, (high_y - low_y) or 1

    def place(x: float, y: float) -> str:
        px = left + (x - low_x) / span_x * (width - left - 8)
        py = top + (high_y - y) / span_y * (height - top - bottom)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">']
    for share in (0, 0.5, 1):
        y = low_y + share * span_y
        py = top + (1 - share) * (height - top - bottom)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{py:.1f}" y2="{py:.1f}" stroke="#e4e7eb"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end" font-size="11">{y:.3g}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}" font-size="11">step {low_x:g}</text>')
    parts.append(f'<text x="{width - 8}" y="{height - 6}" text-anchor="end" font-size="11">{high_x:g}</text>')
    for (_, (xs, ys)), color in zip(lines.items(), _COLORS * len(lines), strict=False):
        points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    parts.append("</svg>")
    legend = " ".join(
        f'<span style="color:{color}">{html.escape(name)}</span>'
        for name, color in zip(lines, _COLORS * len(lines), strict=False)
    )
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(title)}: {legend}</figcaption></figure>"


def _smoothed(rows: list[dict[str, Any]], key: str, points: int = 150) -> tuple[list[float], list[float]]:
    """At most `points` means of consecutive steps."""
    values = [(row["step"], row[key]) for row in rows if _number(row.get(key))]
    size = max(1, len(values) // points)
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [group[-1][0] for group in groups], [sum(v for _, v in group) / len(group) for group in groups]


def mask_picture(video: np.ndarray, kept: np.ndarray, side: int, scale: int = 2) -> Image.Image:
    """Two rows for one clip: its frames, and the same with hidden patches darkened and kept ones framed.

    video: uint8 (T, S, S, 3). kept: flat indices of visible tokens in a (T, side, side) grid.
    """
    frames, size = video.shape[:2]
    visible = np.zeros(frames * side * side, bool)
    visible[kept] = True
    patch = size // side
    cells = visible.reshape(frames, side, side).repeat(patch, 1).repeat(patch, 2)[..., None]
    dim = (video * 0.22 + 190).astype(np.uint8)
    masked = np.where(cells, video, dim)
    gap = np.full((size, 2, 3), 255, np.uint8)
    rows = [np.concatenate([np.concatenate([frame, gap], 1) for frame in clip], 1) for clip in (video, masked)]
    picture = np.concatenate([rows[0], np.full((2, rows[0].shape[1], 3), 255, np.uint8), rows[1]])
    return Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1))


def _embedded(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def found_picture(videos: np.ndarray, right: np.ndarray, scale: int = 2) -> Image.Image:
    """The clips a query found, best first, side by side: green frames around right ones, red around wrong ones.

    videos: uint8 (clips, T, S, S, 3). right: bool (clips,).
    """
    rows = []
    for video, hit in zip(videos, right, strict=True):
        strip = np.concatenate(list(video), 1)
        color = np.array((47, 143, 87) if hit else (179, 32, 44), np.uint8)
        framed = np.broadcast_to(color, (strip.shape[0] + 4, strip.shape[1] + 4, 3)).copy()
        framed[2:-2, 2:-2] = strip
        rows += [framed, np.full((framed.shape[0], 4, 3), 255, np.uint8)]
    return Image.fromarray(np.concatenate(rows[:-1], 1).repeat(scale, 0).repeat(scale, 1))


def _retrieval_section(path: Path) -> str:
    with np.load(path) as found:
        captions, right, videos = found["caption"], found["right"], found["video"]
    parts = [
        "<h2>Captions and the clips they found</h2>",
        '<p class="note">The three best of all unseen clips after re-ranking; green: the caption\'s own clip.</p>',
    ]
    parts += [
        _embedded(found_picture(clips, hits, 1), str(caption))
        for caption, hits, clips in zip(captions, right, videos, strict=True)
    ]
    return "".join(parts)


def _results_section(path: Path) -> str:
    results = read_results(path)
    parts = ["<h2>What pre-training gave</h2>"]
    if "comparison" in results:
        scores = results["comparison"]
        names = {
            "pretrained": "student, pre-trained (stage 1)",
            "scratch": "the same student from scratch",
            "teacher": "the per-frame teacher",
        }
        rows = [[text, 100 * scores["motion"][key], 100 * scores["scene"][key]] for key, text in names.items()]
        parts.append(_table(rows, ["after the same short training", "motion labels, %", "scene labels (probe), %"]))
        parts.append(
            '<p class="note">Accuracy on unseen clips. Motion (4 classes, chance 25%) is what single frames do not show; '
            "frames without their order can reach 50% at best. Scene has 24 classes, chance 4.2%.</p>"
        )
    if "foreground" in results:
        shares = results["foreground"]
        rows = [[kind, 100 * shares[kind]] for kind in ("semantic", "random", "tube")]
        parts.append(_table(rows, ["mask", "shape pixels among kept patches, %"]))
        parts.append(
            f'<p class="note">The semantic mask keeps {shares["ratio"]:.2f} times the foreground of a random one.</p>'
        )
    if "teacher" in results:
        teacher = results["teacher"]
        parts.append(
            f"<p>The teacher names {100 * teacher['zero_shot']:.1f}% of unseen frames right among "
            f"{teacher['captions']} captions.</p>"
        )
    if "retrieval" in results:
        found = results["retrieval"]
        rows = [
            [way, how, *(100 * found[f"{head}_{side}_r{k}"] for k in (1, 5, 10)), found[f"{head}_{side}_median_rank"]]
            for side, way in (("t2v", "captions search clips"), ("v2t", "clips search captions"))
            for head, how in (("dual", "embeddings"), ("match", "re-ranked by matching"), ("both", "re-ranked by both"))
            if f"{head}_{side}_r1" in found
        ]
        parts.append(_table(rows, ["zero-shot, unseen clips", "by", "R@1, %", "R@5, %", "R@10, %", "median rank"]))
        parts.append(
            f'<p class="note">{found["clips"]} clips, {found["captions"]} captions. '
            f"Chance at R@1 is {100 / found['clips']:.2f}%.</p>"
        )
    seconds = [[name, part.get("seconds", "")] for name, part in results.items() if isinstance(part, dict)]
    parts.append("<h2>Time</h2>" + _table(seconds, ["part", "seconds"]))
    if "comparison" in results:
        parts.append(
            '<p class="note">The comparison runs beside the other parts; its seconds are the wait for its end.</p>'
        )
    return "".join(parts)


def _unseen(row: dict[str, Any]) -> list[str]:
    """The figures on unseen clips in a row: those of a validation have them, those of a step have none."""
    return [key for key in row if key.startswith("val_")]


def _runs_section(runs: dict[str, list[dict[str, Any]]]) -> str:
    parts = ["<h2>Curves</h2>"]
    judged = {name: [row for row in rows if _unseen(row)] for name, rows in runs.items()}
    runs = {name: kept for name, rows in runs.items() if (kept := [row for row in rows if not _unseen(row)])}
    for name, rows in runs.items():
        parts.append(curve({"loss": _smoothed(rows, "loss")}, f"{name}, loss"))
        layers = sorted(key for key in rows[-1] if key.startswith("loss_layer_"))
        if layers:
            parts.append(curve({key: _smoothed(rows, key) for key in layers}, f"{name}, loss of each aligned layer"))
        if "top1" in rows[-1]:
            parts.append(curve({"top1": _smoothed(rows, "top1")}, f"{name}, training accuracy"))
        for key in sorted({key for row in judged[name] for key in _unseen(row)}):
            points = _smoothed(judged[name], key, len(judged[name]))
            parts.append(curve({key: points}, f"{name}, {key.removeprefix('val_')} on unseen clips"))
    speeds = []
    for name, rows in runs.items():
        half = rows[len(rows) // 2 :]
        memory = max((row["memory_gib"] for row in rows if _number(row.get("memory_gib"))), default="not logged")
        speeds.append(
            [
                name,
                rows[-1]["step"],
                _mean(half, "clips_per_s"),
                _mean(half, "data_wait", 100),
                _mean(half, "mfu", 100),
                memory,
                rows[-1].get("bad_files", "not logged"),
            ]
        )
    head = ["run", "steps", "clips/s", "waiting for data, %", "of matmul rate, %", "peak memory, GiB", "bad files"]
    parts.append("<h2>Throughput</h2>" + _table(speeds, head))
    parts.append(
        '<p class="note">Means over the second half of each run, as it was with everything else on the machine.</p>'
    )
    return "".join(parts)


def _masks_section(path: Path) -> str:
    with np.load(path) as masks:
        video, side = masks["video"], int(masks["side"])
        parts = ["<h2>Kept tokens</h2>"]
        parts.append('<p class="note">Above the frames the teacher sees, below what the student sees of them.</p>')
        for number in range(len(video)):
            for kind in ("semantic", "random") if number < 2 else ("semantic",):
                picture = mask_picture(video[number], masks[kind][number], side)
                parts.append(_embedded(picture, f"unseen clip {number}, {kind} mask"))
    return "".join(parts)


def _tune_section(path: Path) -> str:
    found = json.loads(path.read_text())
    parts = [
        f"<h2>Way of computing</h2><p>run.tune chose: {html.escape(found['label'])} ({html.escape(found['source'])}).</p>"
    ]
    rows = [
        [
            " ".join(f"{name} {value}" for name, value in row["candidate"].items()),
            *("" if row[key] is None else row[key] for key in ("ms", "peak_gib", "warm_up_s")),
            row["status"],
            row["detail"],
        ]
        for row in found["candidates"]
    ]
    head = ["candidate", "ms per step", "peak memory, GiB", "first steps, s", "verdict", "why"]
    return "".join([*parts, _table(rows, head)])


def _section(make: Callable[[Path], str], path: Path) -> str:
    try:
        return make(path)
    except ConfigError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, and the report goes without it"
        ) from error


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run's or a quickstart's folder and returns its path.

    Raises FileNotFoundError where the folder holds neither metrics nor results, ConfigError where a file of them is damaged.
    """
    folder = Path(folder)
    found = sorted(folder.glob("metrics.jsonl")) + sorted(folder.glob("*/metrics.jsonl"))
    found = [path for path in found if path.is_file()]
    runs = {str(path.parent.relative_to(folder)): read_metrics(path) for path in found}
    runs = {folder.resolve().name if name == "." else name: rows for name, rows in runs.items() if rows}
    results = folder / "results.json"
    if not runs and not results.exists():
        raise FileNotFoundError(f"nothing to report in {folder}: no metrics.jsonl with a step, and no results.json")
    parts = [f"<h1>umt_fast: {html.escape(folder.resolve().name)}</h1>"]
    sections = {
        "results.json": _results_section,
        "masks.npz": _masks_section,
        "retrieval.npz": _retrieval_section,
        "tune.json": _tune_section,
    }
    parts += [_section(make, folder / name) for name, make in sections.items() if (folder / name).is_file()]
    if runs:
        parts.append(_runs_section(runs))
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>umt_fast</title><style>{_STYLE}</style>'
    out = folder / "report.html"
    temporary = out.with_name("report.html.partial")
    temporary.write_text(page + "".join(parts) + "</html>\n", encoding="utf-8")
    os.replace(temporary, out)
    return out
