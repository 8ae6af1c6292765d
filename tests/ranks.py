"""Programs of tests that run on several ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run_ranks(
    script: Path, program: str, *arguments: object, ranks: int = 2, timeout: float = 900, succeeds: bool = True
) -> subprocess.CompletedProcess:
    """Writes a program to a file and runs it under torchrun, on the CPU with a thread each, from the repository's root.

    Args:
        program: Python; it may import `tests`, and finds the arguments in sys.argv[1:].
        succeeds: whether every rank must end well; the test fails otherwise.
    """
    script.write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*launch, str(script), *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-4000:]
    return done
