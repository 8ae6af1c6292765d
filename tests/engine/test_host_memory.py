"""A run on the CPU keeps the memory that a step frees."""

import subprocess
import sys

import pytest

from umt_fast.engine.host_memory import keep_freed_memory

REPEATED = """
import resource, torch
from umt_fast.config import RunConfig
from umt_fast.engine.distributed import distributed_run

with distributed_run(RunConfig(device="cpu")):
    counts = []
    for _ in range(16):  # the first eight find their place
        torch.ones(16 << 20)  # 64 MB, freed at once
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(counts[-1] - counts[8])
"""


@pytest.mark.process
def test_freed_blocks_are_not_mapped_again() -> None:
    """Seven blocks of 16384 pages take next to no page fault; by default each page takes one."""
    if not keep_freed_memory():
        pytest.skip("this C library is not glibc")
    done = subprocess.run([sys.executable, "-c", REPEATED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
