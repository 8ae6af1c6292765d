"""What a run reports: metrics.jsonl (every step), TensorBoard, and one line per log step."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from umt_fast.extras import packages_of
from umt_fast.files import write_text

log = logging.getLogger("umt_fast")

VALIDATION = "val_"
"""What the names of figures on unseen clips begin with; a row of metrics.jsonl with one has no other scalars."""


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite where it is none, as a line cut short by a kill."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class MetricsLog:
    """metrics.jsonl with one object per optimizer step, and the same scalars for TensorBoard.

    Opened at a step, it first drops what was logged after that step: a resumed run leaves each step once.
    """

    def __init__(self, folder: Path, start_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if _step_of(line) <= start_step]
        self.validations = [json.loads(line) for line in kept if f'"{VALIDATION}' in line]
        # Replaced, not rewritten in place: a kill between the two would lose the record of all steps.
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.file = open(self.path, "a")
        self.writer = None
        if tensorboard:
            with packages_of("train"):
                from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(errors="replace").splitlines()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows, each with a `step`, as one block."""
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()
        if self.writer is not None:
            for row in rows:
                for key, value in row.items():
                    if key != "step" and isinstance(value, (int, float)):
                        self.writer.add_scalar(key, value, row["step"])
            self.writer.flush()

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def progress_line(row: dict[str, Any], total: int, seconds_left: float) -> str:
    """One line: bar, step, loss, rate, data wait, share of the matmul rate, memory, time left."""
    done = row["step"] / max(1, total)
    bar = "#" * int(20 * done)
    hours, rest = divmod(int(seconds_left), 3600)
    parts = [
        f"[{bar:.<20}] {row['step']}/{total}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"{row['clips_per_s']:.2f} clips/s",
        f"wait {100 * row['data_wait']:.0f}%",
        f"{100 * row['mfu']:.0f}% of matmul rate",
        f"{row['memory_gib']:.2f} GiB",
        f"left {hours}:{rest // 60:02d}:{rest % 60:02d}",
    ]
    return "  ".join(parts)
