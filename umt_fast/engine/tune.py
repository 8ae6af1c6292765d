"""run.tune: which way of computing a step is the fastest here? The device is asked, once, and the answer is kept.

A candidate is {setting: value} for the settings that may be chosen: `compile`, `cuda_graph`, `attention`, `precision`. Each
is measured in a process of its own (tune_process.py) behind a gate (tune_measure.py); what fails is named in a line and left
out. The fastest of the rest wins; where none is left the run computes as it was configured.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from umt_fast.config import ConfigError
from umt_fast.engine import tune_store
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.engine.tune_process import Result
from umt_fast.files import write_json

log = logging.getLogger("umt_fast")

Candidate = dict[str, Any]
Mode = Literal["fast", "full"]
T = TypeVar("T")

MAX_FAST = 4
# A lead below this is noise: the candidate listed earlier, which is the simpler one, stays.
LEAD = 0.02
FILE = "tune.json"


def label(candidate: Candidate) -> str:
    """A candidate's name in tables and lines."""
    ways = [name for key, name in (("compile", "compiled"), ("cuda_graph", "CUDA graph")) if candidate.get(key)]
    parts = [" + ".join(ways) or "eager"]
    if candidate.get("attention", "auto") != "auto":
        parts.append(f"attention {candidate['attention']}")
    if candidate.get("linear", "library") != "library":
        parts.append(f"{candidate['linear']} linear layers")
    if candidate.get("precision", "native") != "native":
        parts.append(f"teacher {candidate['precision']}")
    return ", ".join(parts)


def shortlist(space: list[Candidate], given: Candidate, mode: Mode) -> list[Candidate]:
    """The candidates to measure, the given one first.

    space: all that is possible, `given` (what the configuration says) among them. `full` takes it all; `fast` at most
    MAX_FAST: compiled, that with a CUDA graph, its other teacher precisions, its fused linear layers, a CUDA graph alone, its
    other attention backends.
    """
    rest = [candidate for candidate in space if candidate != given]
    if mode == "full":
        return [given, *rest]

    def other(candidate: Candidate) -> set[str]:
        return {name for name, value in candidate.items() if value != given[name]}

    def way(candidate: Candidate) -> int:
        return 2 * bool(candidate.get("compile")) + bool(candidate.get("cuda_graph"))

    last = max(map(way, space))

    def turn(candidate: Candidate) -> float | None:
        changed = other(candidate)
        if changed <= {"compile", "cuda_graph"}:
            return {2: 1, 3: 2, 1: 4}.get(way(candidate), 0)
        if way(candidate) == last and len(changed - {"compile", "cuda_graph"}) == 1:
            return 3 if "precision" in changed else 3.5 if "linear" in changed else 5
        return None

    listed = [candidate for candidate in rest if turn(candidate) is not None]
    return [given, *sorted(listed, key=turn)][:MAX_FAST]


def best(results: list[Result]) -> Result | None:
    """The fastest that passed; of two within LEAD of each other the earlier one."""
    winner = None
    for result in results:
        if result.status == "ok" and (winner is None or result.ms < winner.ms * (1 - LEAD)):
            winner = result
    return winner


def table(results: list[Result], choice: Candidate) -> str:
    """A line for each candidate: ms per step, peak memory, seconds of its first steps, verdict."""
    width = max(len(label(result.candidate)) for result in results)
    lines = [f"  {'candidate':<{width}}  ms/step  peak GiB  warm-up s  verdict"]
    for result in results:
        figures = "      -         -          -"
        if result.status == "ok":
            figures = f"{result.ms:7.2f}  {result.peak_gib:8.2f}  {result.warm_up_s:9.1f}"
        verdict = "chosen" if result.candidate == choice and result.status == "ok" else result.status
        lines.append(f"  {label(result.candidate):<{width}}  {figures}  {verdict}")
    return "\n".join(lines)


def _measured(candidates: list[Candidate], ask: Callable[[Candidate], Result]) -> list[Result]:
    results = []
    for candidate in candidates:
        result = ask(candidate)
        results.append(result)
        if result.status == "ok":
            log.info("run.tune: %s takes %.2f ms per step", label(candidate), result.ms)
        else:
            log.warning("WARNING: run.tune leaves out %s, %s: %s", label(candidate), result.status, result.detail)
    return results


def _said(results: list[Result], choice: Candidate, source: str) -> str:
    found = {label(result.candidate): result for result in results if result.status == "ok"}
    winner, first = found.get(label(choice)), results[0] if results else None
    if winner is None:
        return f"run.tune: {label(choice)}, as configured: no candidate passed"
    compared = ""
    if first is not None and first.status == "ok" and first is not winner:
        compared = f"; {label(first.candidate)}, as configured, {first.ms:.2f} ms"
    return f"run.tune chose {label(choice)}: {winner.ms:.2f} ms per step{compared} ({source})"


def choose(
    candidates: list[Candidate], key: dict[str, Any], folder: Path, ask: Callable[[Candidate], Result]
) -> Candidate:
    """The candidate to train with: the one found before under this key, else the fastest of those that pass.

    Writes the table to the log and to tune.json in the run's folder; a new result also to the cache, unless nothing passed.

    Args:
        candidates: to measure, in the order of shortlist: the given one first, which is taken where none passes.
        key: what the result depends on, plain values.
        folder: of the run.
        ask: measures a candidate; see tune_process.run_candidate.
    """
    known = tune_store.read(key)
    if known is not None and known["choice"] in candidates:
        choice, source = known["choice"], "measured earlier"
        fields = {entry.name for entry in dataclasses.fields(Result)}
        rows = [row for row in known["candidates"] if isinstance(row, dict) and row.keys() <= fields]
        results = [Result(**row) for row in rows if {"candidate", "status"} <= row.keys()]
        log.info("run.tune: found in %s; delete it to measure anew", tune_store.path_of(key))
    else:
        log.info("run.tune: timing %d candidates on %s", len(candidates), key["machine"]["device"])
        results, source = _measured(candidates, ask), "measured now"
        winner = best(results)
        choice = candidates[0] if winner is None else winner.candidate
        if winner is not None:
            tune_store.write(key, choice, [dataclasses.asdict(result) for result in results])
    if results:
        log.info("%s", table(results, choice))
    log.info("%s", _said(results, choice, source))
    rows = [dataclasses.asdict(result) for result in results]
    content = {"choice": choice, "label": label(choice), "source": source, "candidates": rows, "key": key}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, content, indent=1)
    return choice


def same_devices(name: str) -> None:
    """Raises ConfigError, on every rank, where ranks have devices of different names: one is measured for all."""
    names = sorted(set(gather(name)))
    if len(names) > 1:
        raise ConfigError(
            f"run.tune measures one device for all ranks, and these have {', '.join(names)}; set --run.tune off and choose "
            "run.compile and run.attention by hand"
        )


def _portable(error: BaseException) -> Exception:
    """The error, or one that says the same, which other ranks can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def on_first_rank(work: Callable[[], T], ranks: Ranks, pause: float = 5.0) -> T:
    """What work() gives on the first rank, on every rank; its error too.

    The ranks meet every `pause` seconds: one that waited for minutes in a collective operation would be taken for dead.
    """
    if not dist.is_initialized():
        return work()
    answer: list[tuple[T | None, Exception | None]] = []

    def run() -> None:
        try:
            answer.append((work(), None))
        except BaseException as error:  # whatever it is, the others wait to hear of it
            answer.append((None, _portable(error)))

    # A daemon: a run that is interrupted does not wait for it. What it started ends with this process.
    thread = threading.Thread(target=run, daemon=True)
    if ranks.first:
        thread.start()
    while True:
        if ranks.first:
            thread.join(pause)
        done = gather(answer[0] if answer else None)[0]
        if done is not None:
            value, error = done
            if error is not None:
                raise error
            return value
