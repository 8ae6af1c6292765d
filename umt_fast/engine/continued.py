"""A run that continues: what it may not change, and what it says of the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umt_fast.engine.checkpoint import CheckpointError

log = logging.getLogger("umt_fast")

# Where a run is, and how far it goes, are not how it trains.
_UNTOLD = {"run.out", "run.max_steps", "run.resume"}


def _leaves(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def check_vocabulary(saved: Any, now: dict[str, str] | None, path: Path) -> None:
    """Compares the tokenizer that a checkpoint carries with that of the run that continues; see config.Vocabulary.

    Raises CheckpointError: other tokens. Checkpoints of older versions carry none.
    """
    if isinstance(saved, dict) and now is not None and saved["fingerprint"] != now["fingerprint"]:
        raise CheckpointError(
            f"{path} was trained with the tokenizer {saved['name']} ({saved['fingerprint']}), and {now['name']} has other "
            f"tokens ({now['fingerprint']}): words would become other words. Continue with that one, or start a new run.out"
        )


def check_settings(saved: Any, now: dict[str, Any], path: Path, *, say: bool) -> dict[str, Any]:
    """Compares the settings stored in a checkpoint with those of the run that continues from it.

    saved, now: configurations as nested dictionaries; of a checkpoint that has none, or of another version, what both have is
    compared. say: log the settings that changed, in one line.

    Returns `now`, with the `init` that the run began with where none is given.

    Raises CheckpointError: another `init`, which a run that continues would not read.
    """
    if not isinstance(saved, dict):
        return now
    began, given = saved.get("init", ""), now.get("init", "")
    if given and given != began:
        started = f"began from {began}" if began else "began from no weights (init was empty)"
        raise CheckpointError(
            f"init is {given}, but the run of {path} {started} and would go on from its own checkpoint: leave init out to "
            "continue it, or start a new run.out from these weights"
        )
    before, after = dict(_leaves(saved)), dict(_leaves(now | {"init": began} if "init" in now else now))
    changed = [
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in after.items()
        if name in before and before[name] != value and name not in _UNTOLD
    ]
    if changed and say:
        log.info("settings that are not those of %s: %s", path.name, ", ".join(changed))
    return now | {"init": began} if "init" in now else now
