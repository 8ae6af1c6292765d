"""`bench`: whole training steps on random clips, and how far an 8-bit teacher is from the exact one."""

from __future__ import annotations

import difflib

from umt_fast.cli.command import call
from umt_fast.config import ConfigError


def bench(arguments: list[str]) -> None:
    """Times a whole training step on random clips."""
    from umt_fast.bench import fidelity, finetune, stage1, stage2
    from umt_fast.engine.precision import room_for

    known = {"stage1": stage1.main, "stage2": stage2.main, "finetune": finetune.main, "fidelity": fidelity.main}
    if arguments in (["--help"], ["-h"]):
        print(f"usage: python -m umt_fast bench {'|'.join(known)} [...]; each has --help")
        return
    if not arguments or arguments[0] not in known:
        if not arguments:
            raise ConfigError(f"bench needs the name of a benchmark; there are: {', '.join(known)}")
        near = difflib.get_close_matches(arguments[0], known, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ConfigError(f"unknown benchmark {arguments[0]!r}{hint} There are: {', '.join(known)}")
    with room_for(f"bench {' '.join(arguments)}"):
        call(known[arguments[0]], arguments[1:], f"bench {arguments[0]}")
