"""Everything only a GPU can show, most valuable first, within a deadline: `python -m benchmarks.gpu [--pack]`.

gpu.sh launches it. Each phase is a process with its own limit; a crash or a hang costs that phase alone. Figures are written
into the output folder line by line as they are measured, so that whatever ends a run leaves what it had:

    rates.json     the device, its versions, and the rates that bounds and plans hang on (`plan --measured`)
    rates.jsonl    each matrix product and attention timed for it
    checks.jsonl   kernel tests; attention by backend against float64; recorded and fused steps beside eager ones
    steps.jsonl    whole training steps in turns, where their time goes, the real Trainer, the official code
    kernels.jsonl  each operation beside the bound its bytes or FLOPs set
    phases.jsonl   how each phase ended, and why
    table.md       all of it as tables (plot.svg without --pack)

Run again on the same folder, a done phase is not repeated; one that failed or was cut comes first, then the rest.

    OUT            folder of results (default: benchmarks/results/<device>-<date>)
    UMT_PRIOR      folder of an earlier run to go on from, copied into OUT first; its cache.tar.gz too
    UMT_DEADLINE   seconds for all phases (560)
    UMT_PATIENCE   multiplies the phases' own limits, for machines without a GPU (1)
    UMT_SIZES      "b16 l16"; "tiny" tries everything on any machine
    UMT_PHASES     names of phases to run, others left out; e.g. "rates steps-b16"
    UMT_BATCHES    clips of a step by size, e.g. "b16=64 l16=32"
    UMT_CACHE      folder of compiled code (default: one under the temporary folder)
    UMT_OFFICIAL   folder of the official code, whose step is then timed in the same run

--pack also writes cache.tar.gz, compiled code for the next call, and leaves eight files in all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# What a lent machine gives back of one file, less some room.
MAX_PACKED = 15 << 20
STOPPED = "the whole run was stopped by a signal"
# The native kernel tests, without fuzzing: a process for each file, since most of their time is Triton compiling.
TESTS = {
    "tests/kernels/test_patch_gather.py": "uint8 or folded",
    "tests/kernels/test_kernels.py": "token_gather_value or test_gather_norm or mask_scores or "
    "both_backends or equal_keys or drawn_zero or impossible_tokens or is_its_formula or compiles_without",
    "tests/kernels/test_layer_norm.py": "(value_and_gradients and kinds1 and shape3) or stream_comes_back",
    "tests/kernels/test_linear.py": "(mlp_value and 150 and pre and dtype1) or (rows_of_an_mlp and dtype1 and shape0)",
    "tests/kernels/test_scaled_linear.py": "two_layers",
    "tests/kernels/test_quantized.py": "int8_product or fp8_product or quantizes_views or product_within",
    "tests/kernels/test_sampling.py": "at_196 or exact_probability",
    "tests/kernels/test_attention.py": "attention_backends or packed_attention or masked_keys",
    "tests/objectives/test_one_graph.py": "real_gpu or recorded_run",
}


@dataclass(frozen=True)
class Phase:
    """A process of its own. limit: seconds it may take; least: seconds without which it is not begun."""

    name: str
    command: Sequence[str]
    limit: float
    least: float = 10.0
    always: bool = False
    """Run even where it was done before: it looks at the machine."""


def phases_of(sizes: Sequence[str], out: str, official: str = "") -> list[Phase]:
    """All phases in order of value."""

    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments]

    found = [
        Phase("machine", module("rates", "machine"), 45, always=True),
        Phase("rates", module("rates", "products", *sizes), 80),
        Phase("tests", module("checks", "tests"), 110),
        Phase("checks", module("checks", "values"), 60),
    ]
    for number, size in enumerate(sizes):
        found.append(Phase(f"steps-{size}", module("steps", size), 200 if size == "b16" else 180, least=45))
        if official and not number:
            found.append(Phase(f"official-{size}", module("steps", "official", size, official), 70, least=30))
    found += [
        Phase(f"kernels-{size}", ["env", f"UMT_BENCH={size}", *module("bench_kernels", out)], 70, least=15)
        for size in sizes
    ]
    tiles = [sys.executable, "-m", "kernels.tune", f"{out}/tiles.json", "--sizes", sizes[0], "--seconds", "90"]
    found.append(Phase("trainer", module("trainer_run", sizes[0]), 80, least=30))
    # Last: it finds tiles for later runs, and can use whatever time is left.
    return found + ([Phase("tiles", tiles, 120, least=60)] if sizes[0] in ("b16", "l16") else [])


def last_states(out: Path) -> dict[str, str]:
    """How each phase ended when it was last tried."""
    found: dict[str, str] = {}
    path = out / "phases.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # cut short
            continue
        if line["state"] != "no time":
            found[line["phase"]] = line["state"]
    return found


def order(phases: Sequence[Phase], states: dict[str, str]) -> list[Phase]:
    """What is left to run: what looks at the machine, what failed or was cut, the rest; the done ones left out."""
    left = [phase for phase in phases if phase.always or states.get(phase.name) != "done"]
    return sorted(left, key=lambda phase: 0 if phase.always else 1 if phase.name in states else 2)


def _end(child: subprocess.Popen) -> None:
    """Ends a phase with everything it started."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


def run_phase(phase: Phase, seconds: float, environment: dict[str, str]) -> dict[str, object]:
    """Runs a phase for at most so many seconds; its line of phases.jsonl. Its output is passed on as it comes."""
    started, last = time.monotonic(), deque(maxlen=40)
    environment = environment | {"UMT_PHASE_UNTIL": str(time.time() + seconds)}
    child = subprocess.Popen(
        phase.command,
        cwd=REPOSITORY,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def pass_on() -> None:
        for line in child.stdout:
            last.append(line)
            print(f"{phase.name}: {line}", end="", flush=True)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    state, reason = "done", ""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        whole = seconds >= phase.limit
        state, reason = (
            "timed out" if whole else "cut",
            f"took over {seconds:.0f} s" + (", its limit" if whole else ", all that the deadline left"),
        )
    except KeyboardInterrupt:
        state, reason = "cut", STOPPED
    finally:  # also what a phase that ended well or a signal to this process left running
        _end(child)
    reader.join(2.0)
    if state == "done" and child.returncode:
        code = child.returncode
        said = next((line.strip() for line in reversed(last) if line.strip()), "no output")
        state, reason = "failed", (f"signal {-code}" if code < 0 else f"exit status {code}") + f": {said[:300]}"
    line: dict[str, object] = {
        "phase": phase.name,
        "state": state,
        "reason": reason,
        "exit_status": child.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "limit_s": round(seconds, 1),
    }
    return line | ({} if state == "done" else {"tail": "".join(last)[-3000:]})


def run(phases: Sequence[Phase], out: Path, deadline: float, environment: dict[str, str]) -> list[dict[str, object]]:
    """Runs phases in turn within `deadline` seconds; writes and returns their lines.

    A phase that looks at the machine and fails ends the run: the others' figures would not be of this folder's machine.
    """
    started, lines = time.monotonic(), []
    mend(out / "phases.jsonl")
    with open(out / "phases.jsonl", "a") as file:
        for phase in order(phases, last_states(out)):
            left = deadline - (time.monotonic() - started)
            if left < phase.least:
                line = {"phase": phase.name, "state": "no time", "reason": f"{max(0, left):.0f} s were left"}
            else:
                print(f"{phase.name}: begins, {left:.0f} s left", flush=True)
                line = run_phase(phase, min(phase.limit, left), environment)
            lines.append(line)
            stamp = {"commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            print(json.dumps(line | stamp), file=file, flush=True)
            print(f"{phase.name}: {line['state']} {line['reason']}", flush=True)
            if line["reason"] == STOPPED:
                raise KeyboardInterrupt
            if phase.always and line["state"] != "done":
                break
    return lines


def mend(path: Path) -> None:
    """Takes the half line off a file whose writer was killed, so that the next line begins on its own."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


def commit() -> str:
    """The repository's commit, marked where files differ from it; UMT_COMMIT, or empty, outside a repository."""
    asked = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("UMT_COMMIT", "")


def default_out() -> Path:
    """benchmarks/results/<device>-<date>."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        name = "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
    return REPOSITORY / "benchmarks" / "results" / f"{name}-{time.strftime('%Y-%m-%d', time.gmtime())}"


def unpack(out: Path, cache: Path) -> None:
    """Compiled code of an earlier call, where there is none yet."""
    packed = out / "cache.tar.gz"
    if packed.exists() and not any(cache.iterdir()):
        with tarfile.open(packed) as archive:
            archive.extractall(cache, filter="data")


def pack(out: Path, cache: Path) -> None:
    """Compiled code as one file; left out, and said so, where it is too large to come back."""
    packed = out / "cache.tar.gz"
    with tarfile.open(packed, "w:gz", compresslevel=6) as archive:
        archive.add(cache, arcname=".")
    if packed.stat().st_size > MAX_PACKED:
        print(f"cache.tar.gz is left out: {packed.stat().st_size >> 20} MiB, over {MAX_PACKED >> 20}", flush=True)
        packed.unlink()


def _number(name: str, default: float) -> float:
    """A positive number from the environment."""
    try:
        value = float(os.environ.get(name, default))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        sys.exit(f"benchmarks.gpu: {name} is {os.environ[name]!r}; give a positive number")
    return value


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(*arguments: str) -> int:
    """Runs what is left of all phases; 0 where every one of them is done."""
    if set(arguments) - {"--pack"}:
        sys.exit(f"usage: python -m benchmarks.gpu [--pack]\n\n{__doc__}")
    given = os.environ
    deadline, patience = (_number(name, default) for name, default in (("UMT_DEADLINE", 560.0), ("UMT_PATIENCE", 1.0)))
    out = Path(given.get("OUT") or default_out()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    prior = given.get("UMT_PRIOR", "")
    if prior and Path(prior).resolve() != out:
        if not Path(prior).is_dir():
            sys.exit(f"benchmarks.gpu: UMT_PRIOR is {prior}, which is no folder")
        shutil.copytree(prior, out, dirs_exist_ok=True)
    cache = Path(given.get("UMT_CACHE") or f"{tempfile.gettempdir()}/umt_fast-compiled-{os.getuid()}")
    cache.mkdir(parents=True, exist_ok=True)
    unpack(out, cache)
    sizes = given.get("UMT_SIZES", "b16 l16").split()
    phases = phases_of(sizes, str(out), given.get("UMT_OFFICIAL", ""))
    phases = [replace(phase, limit=patience * phase.limit) for phase in phases]
    names = [phase.name for phase in phases]
    wanted = given.get("UMT_PHASES", " ".join(names)).split()
    if set(wanted) - set(names):
        sys.exit(
            f"benchmarks.gpu: UMT_PHASES names {' '.join(sorted(set(wanted) - set(names)))}; known: {' '.join(names)}"
        )
    environment = dict(given) | {"OUT": str(out), "PYTHONUNBUFFERED": "1", "UMT_COMMIT": commit()}
    for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        environment.setdefault(variable, str(cache / folder))
    signal.signal(signal.SIGTERM, _stop)
    stopped = False
    try:
        run([phase for phase in phases if phase.name in wanted or phase.always], out, deadline, environment)
    except KeyboardInterrupt:
        stopped = True  # the table of what is there is worth the last seconds
    if "--pack" in arguments:
        pack(out, cache)
    table = [sys.executable, "-m", "benchmarks.report", str(out), *(["--no-plot"] if "--pack" in arguments else [])]
    try:
        subprocess.run(table, cwd=REPOSITORY, timeout=30)
    except subprocess.TimeoutExpired:
        print(f"no table: `python -m benchmarks.report {out}` writes it", flush=True)
    states = last_states(out)
    return 1 if stopped else int(any(states.get(name) != "done" for name in wanted))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
