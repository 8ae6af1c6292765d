"""Every kernel builds ahead of time for A100 and H100 at the official shapes, without spilling a register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_kernels_build_without_spills(architecture: str) -> None:
    # A process of its own: here the kernels may be interpreted, which rules compiling out.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.build", architecture],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    # Four of them quantise to fp8, which A100 does not have.
    assert len(rows) == {"80": 23, "90": 27}[architecture] and all(row["sm"] == int(architecture) for row in rows)
    assert not [row["kernel"] for row in rows if row["spilled_bytes"]], rows
    assert all(0 < row["registers"] <= 255 for row in rows)
    # What a program of any supported GPU may have (compute capability 8.6).
    assert all(row["shared_bytes"] <= 99 << 10 for row in rows)
