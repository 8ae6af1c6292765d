"""`bench`: whole training steps on random clips, and how far an 8-bit teacher is from the exact one."""

from __future__ import annotations

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
        given = f"unknown benchmark {arguments[0]!r}" if arguments else "bench needs the name of a benchmark"
        raise ConfigError(f"{given}; there are: {', '.join(known)}")
    with room_for(f"bench {' '.join(arguments)}"):
        call(known[arguments[0]], arguments[1:], f"bench {arguments[0]}")
