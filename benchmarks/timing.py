"""How the phases of gpu.py time and write: events on a GPU, medians and spread, each line as soon as it is measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from benchmarks.gpu import commit, mend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
Row = dict[str, object]


class Lines:
    """A file of results to which each line is written as soon as it is measured, with the commit it is of."""

    def __init__(self, out: Path | str, name: str) -> None:
        self.path = Path(out) / name
        mend(self.path)
        self.commit = commit()

    def add(self, row: Row) -> Row:
        row = row | {"commit": self.commit}
        with open(self.path, "a") as file:
            print(json.dumps(row), file=file, flush=True)
        return row

    def known(self) -> list[Row]:
        """The lines of this commit that are no errors."""
        rows = map(json.loads, self.path.read_text().splitlines()) if self.path.exists() else ()
        return [row for row in rows if row.get("commit") == self.commit and "error" not in row]


def out_folder() -> Path:
    """$OUT, as gpu.py sets it."""
    return Path(os.environ["OUT"])


def seconds_left() -> float:
    """Until gpu.py ends this phase."""
    return float(os.environ.get("UMT_PHASE_UNTIL", "inf")) - time.time()


def short(error: Exception) -> str:
    """An error as one line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def spread(values: Sequence[float]) -> list[float]:
    """The tenth and the ninetieth percentile."""
    if len(values) < 2:
        return [values[0], values[0]]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return [cuts[0], cuts[-1]]


def back_to_back(step: Callable[[int], object], count: int) -> tuple[float, list[float], float]:
    """`count` steps without waiting in between: seconds in all, of each step, and until the host had issued the last.

    On a GPU by events, waiting once at the end; on a CPU by the clock. The device is idle when they begin.
    """
    if not GPU:
        marks = [time.perf_counter()]
        for number in range(count):
            step(number)
            marks.append(time.perf_counter())
        return marks[-1] - marks[0], [b - a for a, b in zip(marks, marks[1:], strict=False)], marks[-1] - marks[0]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    events[0].record()
    for number in range(count):
        step(number)
        events[number + 1].record()
    issued = time.perf_counter() - started
    torch.cuda.synchronize()
    each = [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]
    return events[0].elapsed_time(events[-1]) / 1e3, each, issued


class Clocks(contextlib.AbstractContextManager):
    """Reads a GPU's clocks, power and temperature twice a second during its block; reading changes no setting."""

    QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"

    def __enter__(self) -> Clocks:
        self.samples: list[list[float]] = []
        self.process = None
        if GPU:
            asked = [
                "nvidia-smi",
                "-i",
                "0",
                f"--query-gpu={self.QUERY}",
                "--format=csv,noheader,nounits",
                "-lms",
                "500",
            ]
            with contextlib.suppress(OSError):
                self.process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.samples.append([float(part) for part in line.split(",")])

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def row(self) -> Row:
        """Medians, and the slowest SM clock; empty where nothing could be read."""
        if not self.samples:
            return {}
        sm, memory, power, heat = zip(*self.samples, strict=True)
        return {
            "sm_mhz": statistics.median(sm),
            "sm_mhz_least": min(sm),
            "memory_mhz": statistics.median(memory),
            "power_w": statistics.median(power),
            "temperature_c": max(heat),
        }


def _smi(query: str) -> str:
    """One line of nvidia-smi, or nothing where it is absent."""
    try:
        asked = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def about() -> Row:
    """The device and the versions that figures are read beside."""
    if GPU:
        props = torch.cuda.get_device_properties(0)
        smi = dict(
            zip(
                ("driver", "clocks_max_sm", "power_limit"),
                _smi("driver_version,clocks.max.sm,power.limit").split(", "),
                strict=False,
            )
        )
        device: Row = {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "memory_gib": round(props.total_memory / 2**30, 1),
            "processors": props.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        } | smi
    else:
        names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if "model name" in line]
        device = {"device": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return device | versions | {"commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
