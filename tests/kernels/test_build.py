"""Every kernel builds ahead of time for A100, H100 and B200 at the official shapes, and its machine code is as promised."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.build import broken_promises, count_instructions, issued
from kernels.build_case import Promise

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
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
    # Six of them quantize to fp8 and six multiply it, which A100 does not have.
    assert len(rows) == {"80": 53, "90": 65, "100": 65}[architecture]
    assert all(row["sm"] == int(architecture) for row in rows)
    spilled = {row["kernel"]: row["spilled_bytes"] for row in rows if row["spilled_bytes"]}
    assert not spilled, spilled
    assert all(0 < row["registers"] <= 255 for row in rows)
    products = [row for row in rows if row["kernel"].startswith("linear ") and "row_statistics" not in row["kernel"]]
    assert len(products) == {"80": 20}.get(architecture, 26)
    for row in rows:
        # What a program of any supported GPU may have (compute capability 8.6); a product asks its GPU how much it has.
        assert row["shared_bytes"] <= ((227 if architecture != "80" else 163) if row in products else 99) << 10
    broken = {row["kernel"]: row["broken_promises"] for row in rows if row["broken_promises"]}
    assert not broken, broken
    # What waits for instructions cannot wait for memory alone. A mask's sort takes microseconds, whatever its bytes; an H200
    # has a third more bandwidth for as many instructions.
    late = {
        (row["kernel"], gpu): (us, row["bound_us"][gpu])
        for row in rows
        for gpu, us in row["issue_us"].items()
        if us > row["bound_us"][gpu] * (1.3 if gpu == "H200" else 0.9) and "sample_visible" not in row["kernel"]
    }
    assert not late, late
    assert sum(bool(row["issue_us"]) for row in rows) == {"80": 28, "90": 34, "100": 0}[architecture]


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0  LDG.E.EL.128 R4, [R2.64] ;
        /*0020*/             @!P1  LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R219], [R8.64], !P0 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
        /*0050*/         @!UP0     STG.E [R2.64], R4 ;
        /*0060*/                   STG.E.64 [R2.64+0x10], R4 ;
        /*0070*/                   STG.E.128 [R2.64+0x10], R4 ;
"""
KEPT = Promise(narrow_loads=1, narrow_stores=2, matrix="HMMA", copies="cp.async")


LOOP = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @P0  LDG.E R4, [R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/              @P0  BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
        /*0060*/                   NOP;
"""


def test_a_loop_issues_its_instructions_at_each_trip() -> None:
    assert [issued(LOOP, trips) for trips in (1, 2, 10)] == [5, 8, 32]
    assert issued(LISTING, 5) == 8


def test_instructions_are_counted_by_width() -> None:
    assert count_instructions(LISTING) == {
        "LDG.128": 1,
        "LDG.16": 1,
        "LDGSTS.128": 1,
        "HMMA": 1,
        "STG.32": 1,
        "STG.64": 1,
        "STG.128": 1,
    }


@pytest.mark.parametrize(
    ("promise", "code", "told"),
    [
        ({}, "", []),
        ({"narrow_loads": 0}, "", ["1 global loads below 128 bits, not 0"]),
        ({"narrow_stores": 1}, "", ["2 global stores below 128 bits, not 1"]),
        ({"loads": 64}, "", ["global loads of 128 bits, not 64"]),
        ({"loads": None}, "", ["2 global loads below any bits, not 1"]),
        ({}, "STG.E.128", ["global stores of 64 bits, not 128", "3 global stores below 128 bits, not 2"]),
        ({}, "BYPASS.128", ["copies to shared memory of 32 bits, not 128", "1 copies to shared memory below"]),
        ({"matrix": "HGMMA"}, "", ["matrix products by HMMA, not HGMMA"]),
        ({"matrix": None}, "", ["matrix products by HMMA, not none"]),
        ({"copies": "tma"}, "", ["copies by cp.async, not tma"]),
        ({}, "LDC", ["STL 1 times"]),
        ({}, "LDC R1", ["RED 1 times"]),
    ],
)
def test_a_broken_promise_is_told(promise: dict[str, object], code: str, told: list[str]) -> None:
    swapped = {"STG.E.128": "STG.E.64", "BYPASS.128": "BYPASS", "LDC": "STL.64", "LDC R1": "RED.E.ADD.F32 R1"}.get(code)
    text = LISTING if swapped is None else LISTING.replace(code, swapped)
    found = broken_promises(dataclasses.replace(KEPT, **promise), count_instructions(text))
    if promise.get("copies") == "tma":
        # Without a promise of copies by threads their width is none.
        told = [*told, "1 copies to shared memory below any bits"]
    assert len(found) == len(told), found
    for broken, expected in zip(found, told, strict=True):
        assert broken.startswith(expected), found
