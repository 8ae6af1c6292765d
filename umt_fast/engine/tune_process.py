"""One candidate of run.tune in a process of its own: a crash, a hang or a broken GPU context stays there.

The parent writes one JSON line to the child's stdin and keeps it open: its end tells the child that the parent is gone. The
child, `python -m umt_fast.engine.tune_process`, writes JSON lines: {"at": part} when a part begins, at last its result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from umt_fast.config import ConfigError, Dtype, RunConfig, from_dict

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "wrong", "refused", "crashed", "hung", "out of memory"]
COMMAND = (sys.executable, "-m", "umt_fast.engine.tune_process")
_MAX_DETAIL = 300


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a candidate; ms, peak_gib and warm_up_s are None unless status is `ok`."""

    candidate: dict[str, Any]
    status: Status
    detail: str = ""
    ms: float | None = None
    peak_gib: float | None = None
    warm_up_s: float | None = None


def _environment() -> dict[str, str]:
    """Ours, without torchrun's: the child is a run of one process."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))
    }
    root = str(Path(__file__).resolve().parents[2])
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))}


def run_candidate(request: dict[str, Any], deadline: float, command: tuple[str, ...] = COMMAND) -> Result:
    """Measures a candidate in a child, which is killed with all it started after `deadline` seconds.

    request: `candidate` {setting: value}, and what `measure` takes. Never raises for what the child does.
    """
    candidate = request["candidate"]
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=answers, stderr=errors, start_new_session=True, env=_environment()
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
            child.wait(deadline)
        except subprocess.TimeoutExpired:
            at = next((line["at"] for line in reversed(_lines(answers)) if "at" in line), "starting")
            return Result(candidate=candidate, status="hung", detail=f"no end within {deadline:g} s ({at})")
        finally:
            _kill(child)
        said = next(iter(reversed(_lines(answers))), {})
        if child.returncode == 0 and "status" in said:
            known = {entry.name for entry in dataclasses.fields(Result)} - {"candidate"}
            return Result(candidate=candidate, **{name: value for name, value in said.items() if name in known})
        return Result(candidate=candidate, status="crashed", detail=_why(child.returncode, errors))


def _lines(file: IO[bytes]) -> list[dict[str, Any]]:
    file.seek(0)
    found = []
    for line in file.read().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) else []
    return found


def _why(code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    last = f": {said[-1].strip()}" if said else ""
    if code == -signal.SIGKILL:
        return f"killed by signal 9; the host's memory may have run out{last}"[:_MAX_DETAIL]
    ended = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return f"{ended}{last}"[:_MAX_DETAIL]


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and the compilers it started: it leads a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the driver does not die
        child.wait(30)


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def measure(request: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The child's work: {status, detail} or {status, ms, peak_gib, warm_up_s}.

    Args:
        request: `builder`, "module:function" that makes a tune_measure.Case of (task, record, exact); `task`, its name;
            `record`, the candidate's configuration, and `reference`, the eager one, as to_dict gives them.
        say: takes the name of each part as it begins.
    """
    import torch

    from umt_fast.engine.distributed import current_ranks
    from umt_fast.engine.host_memory import keep_freed_memory
    from umt_fast.engine.numerics import numerics

    run = from_dict(RunConfig, request["record"]["run"])
    device = current_ranks(run).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    with numerics(run):
        return _measured(request, say, device, run.dtype)


def _measured(
    request: dict[str, Any], say: Callable[[str], None], device: torch.device, dtype: Dtype
) -> dict[str, Any]:
    import torch._inductor.config

    from umt_fast.engine import tune_measure

    build, task, record, reference = (request[key] for key in ("builder", "task", "record", "reference"))
    build = _imported(build)
    say("building")
    case = build(task, reference, exact=True)
    say("eager reference")
    expected = tune_measure.observe(case)
    wrong = tune_measure.not_finite(expected)
    if wrong:
        return {"status": "wrong", "detail": f"the eager reference's {wrong}"}
    del case
    if record != reference:
        tune_measure.forget(device)
        say("comparison with eager")
        case = build(task, record, exact=True)
        # Compiled code draws its random numbers otherwise than eager code does, unless it is told to.
        with torch._inductor.config.patch(fallback_random=True):
            found = tune_measure.observe(case)
        wrong = tune_measure.not_finite(found) or tune_measure.difference(expected, found, dtype)
        if wrong:
            return {"status": "wrong", "detail": wrong}
        del case, found
    del expected
    tune_measure.forget(device)
    say("timing")
    return {"status": "ok"} | tune_measure.time_steps(build(task, record, exact=False))


def failure(error: BaseException) -> dict[str, Any]:
    """status and detail of an error in the child."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, ConfigError):
        return {"status": "refused", "detail": text[:_MAX_DETAIL]}
    detail = f"{type(error).__name__}: {text}"[:_MAX_DETAIL]
    full = isinstance(error, MemoryError) or re.search("to allocate|allocate memory|out of memory", str(error), re.I)
    return {"status": "out of memory" if full else "crashed", "detail": detail}


def _end_with_parent() -> None:
    sys.stdin.read()
    # The compilers it started go with it. It leads their group, unless somebody runs it by hand.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Reads a request from stdin, measures, and writes the result to stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    logging.getLogger("umt_fast").setLevel(logging.ERROR)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = measure(request, lambda part: print(json.dumps({"at": part}), file=answers))
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = failure(error)
    print(json.dumps(result), file=answers)
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # threads of compilers and drivers are not waited for


if __name__ == "__main__":
    main()
