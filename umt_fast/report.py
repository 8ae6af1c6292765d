"""One self-contained HTML page about a run or a quickstart: figures, curves, speed, frames with their kept tokens.

A section appears only where its data does; nothing is fetched when the page is opened.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from umt_fast.config import ConfigError
from umt_fast.extras import packages_of
from umt_fast.files import write_text

with packages_of("video"):
    from PIL import Image

log = logging.getLogger("umt_fast")

_COLORS = ("#2563a8", "#c2571a", "#2f8f57", "#8a3fa0", "#b3202c", "#6b7280")
Points = tuple[list[float], list[float]]
Captioned = list[tuple[str, str]]
"""Captions with pictures as data URIs."""


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


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def require_packages() -> None:
    """Raises MissingPackageError where what draws the page is not installed."""
    with packages_of("report"):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401


def curve(lines: dict[str, Points], title: str) -> bytes:
    """An SVG of named (x, y) lines over steps; the same bytes for the same points. Each line is the group of its name."""
    import matplotlib
    from matplotlib.figure import Figure

    fixed = {
        "svg.hashsalt": title,
        "path.simplify": False,
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa1a9",
        "axes.prop_cycle": matplotlib.cycler(color=_COLORS),
    }
    with matplotlib.rc_context(fixed):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.subplots()
        for name, (xs, ys) in lines.items():
            axes.plot(xs, ys, linewidth=1.2, label=name, gid=name, marker="" if len(xs) > 1 else ".")
        axes.grid(axis="y", color="#e4e7eb")
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _drawn(rows: list[dict[str, Any]], keys: list[str], title: str, points: int = 150) -> Captioned:
    """The curves of some figures of a run in one picture of so many points each; none where no row has one."""
    lines = {key: line for key in keys if (line := _smoothed(rows, key, points))[0]}
    return [(title, _data_uri("svg+xml", curve(lines, title)))] if lines else []


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _smoothed(rows: list[dict[str, Any]], key: str, points: int = 150) -> Points:
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


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _data_uri("png", buffer.getvalue())


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


def _retrieval(path: Path) -> Captioned:
    with np.load(path) as found:
        captions, right, videos = found["caption"], found["right"], found["video"]
    found = zip(captions, right, videos, strict=True)
    return [(str(caption), _png(found_picture(clips, hits, 1))) for caption, hits, clips in found]


def _results(path: Path) -> dict[str, Any]:
    results, found = read_results(path), {}
    if "comparison" in results:
        scores = results["comparison"]
        names = {
            "pretrained": "student, pre-trained (stage 1)",
            "scratch": "the same student from scratch",
            "teacher": "the per-frame teacher",
        }
        found["comparison"] = [
            [text, 100 * scores["motion"][key], 100 * scores["scene"][key]] for key, text in names.items()
        ]
    if "foreground" in results:
        shares = results["foreground"]
        found["foreground"] = [[kind, 100 * shares[kind]] for kind in ("semantic", "random", "tube")]
        found["foreground_ratio"] = float(shares["ratio"])
    if "teacher" in results:
        found["teacher"] = float(100 * results["teacher"]["zero_shot"]), results["teacher"]["captions"]
    if "retrieval" in results:
        scores = results["retrieval"]
        found["retrieval"] = [
            [way, how, *(100 * scores[f"{head}_{side}_r{k}"] for k in (1, 5, 10)), scores[f"{head}_{side}_median_rank"]]
            for side, way in (("t2v", "captions search clips"), ("v2t", "clips search captions"))
            for head, how in (("dual", "embeddings"), ("match", "re-ranked by matching"), ("both", "re-ranked by both"))
            if f"{head}_{side}_r1" in scores
        ]
        found["gallery"], found["chance"] = (scores["clips"], scores["captions"]), 100 / scores["clips"]
    found["seconds"] = [[name, part.get("seconds", "")] for name, part in results.items() if isinstance(part, dict)]
    return found


def _unseen(row: dict[str, Any]) -> list[str]:
    """The figures on unseen clips in a row: those of a validation have them, those of a step have none."""
    return [key for key in row if key.startswith("val_")]


def _runs(runs: dict[str, list[dict[str, Any]]]) -> tuple[Captioned, list[list[Any]]]:
    """Curves and throughput of each run that has rows of steps."""
    curves, speeds = [], []
    for name, rows in runs.items():
        judged = [row for row in rows if _unseen(row)]
        rows = [row for row in rows if not _unseen(row)]
        if not rows:
            continue
        speeds.append(_speed(name, rows))
        layers = sorted(key for key in rows[-1] if key.startswith("loss_layer_"))
        curves += _drawn(rows, ["loss"], f"{name}, loss")
        curves += _drawn(rows, layers, f"{name}, loss of each aligned layer")
        curves += _drawn(rows, ["top1"], f"{name}, training accuracy")
        for key in sorted({key for row in judged for key in _unseen(row)}):
            curves += _drawn(judged, [key], f"{name}, {key.removeprefix('val_')} on unseen clips", len(judged))
    return curves, speeds


def _speed(name: str, rows: list[dict[str, Any]]) -> list[Any]:
    half = rows[len(rows) // 2 :]
    memory = max((row["memory_gib"] for row in rows if _number(row.get("memory_gib"))), default="not logged")
    means = [_mean(half, "clips_per_s"), _mean(half, "data_wait", 100), _mean(half, "mfu", 100)]
    return [name, rows[-1]["step"], *means, memory, rows[-1].get("bad_files", "not logged")]


def _masks(path: Path) -> Captioned:
    found = []
    with np.load(path) as masks:
        video, side = masks["video"], int(masks["side"])
        for number in range(len(video)):
            for kind in ("semantic", "random") if number < 2 else ("semantic",):
                picture = mask_picture(video[number], masks[kind][number], side)
                found.append((f"unseen clip {number}, {kind} mask", _png(picture)))
    return found


def _tune(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    rows = [
        [
            " ".join(f"{name} {value}" for name, value in row["candidate"].items()),
            *("" if row[key] is None else row[key] for key in ("ms", "peak_gib", "warm_up_s")),
            row["status"],
            row["detail"],
        ]
        for row in found["candidates"]
    ]
    return {"label": found["label"], "source": found["source"], "candidates": rows}


_SECTIONS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "results": ("results.json", _results),
    "masks": ("masks.npz", _masks),
    "retrieval": ("retrieval.npz", _retrieval),
    "tune": ("tune.json", _tune),
}


def _section(path: Path, read: Callable[[Path], Any]) -> Any:
    """What the page says about a file; nothing where there is none."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except ConfigError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, and the report goes without it"
        ) from error


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run's or a quickstart's folder and returns its path; equal files give equal bytes.

    Raises FileNotFoundError where the folder holds neither metrics nor results, ConfigError where a file of them is damaged or
    matplotlib is missing.
    """
    require_packages()
    import jinja2

    folder = Path(folder)
    found = sorted(folder.glob("metrics.jsonl")) + sorted(folder.glob("*/metrics.jsonl"))
    found = [path for path in found if path.is_file()]
    runs = {str(path.parent.relative_to(folder)): read_metrics(path) for path in found}
    runs = {folder.resolve().name if name == "." else name: rows for name, rows in runs.items() if rows}
    if not runs and not (folder / "results.json").exists():
        raise FileNotFoundError(f"nothing to report in {folder}: no metrics.jsonl with a step, and no results.json")
    content = {key: _section(folder / name, read) for key, (name, read) in _SECTIONS.items()}
    content["curves"], content["speeds"] = _runs(runs)
    loader = jinja2.PackageLoader("umt_fast", "")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.filters["cell"] = _cell
    page = pages.get_template("report.html.jinja").render(name=folder.resolve().name, **content)
    out = folder / "report.html"
    write_text(out, page + "\n")
    return out
