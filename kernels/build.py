"""Builds every kernel ahead of time, without a GPU, at the shapes of B/16 and L/16: `python -m kernels.build [80 90]`.

Prints registers, spilled bytes and shared memory of each, read from the cubin by the cuobjdump that Triton carries, how its
machine code moves and multiplies, and what of that it does not as promised. The times are bounds: what its bytes alone would
take at a GPU's peak bandwidth, and its instructions alone at one a scheduler and clock. One JSON line per kernel and
architecture, or with --table the table of kernels/README.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels._launch import interpreted
from kernels.build_case import Case, Promise
from kernels.build_cases import cases

# Peak memory bandwidth in bytes per second. Instructions of warps per second: SMs, 4 schedulers each, clock under load.
BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}
ISSUE = {80: {"A100": 108 * 4 * 1.41e9}, 90: dict.fromkeys(("H100", "H200"), 132 * 4 * 1.755e9)}
# Columns of the table.
ISSUED = {"issue A100": "A100", "issue H100": "H100"}


def source_of(case: Case) -> ASTSource:
    """A kernel with the specializations a launch would make: ones become constants, multiples of 16 are known as such."""
    kernel, pointers, numbers = case.kernel, case.pointers, case.numbers
    signature, attributes = {}, {}
    constants = case.constants | {name: 1 for name, value in numbers.items() if value == 1}
    for position, name in enumerate(kernel.arg_names):
        value = numbers.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name) or ("fp32" if isinstance(value, float) else "i32")
        descriptor = pointers.get(name, "").startswith("tensordesc")
        if (name in pointers and not descriptor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=places, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, spilled (local) and stack bytes per thread, shared bytes of a cubin's kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {
        "registers": int(fields["REG"]),
        "spilled_bytes": int(fields["LOCAL"]) + int(fields["STACK"]),
        "shared_bytes": int(fields["SHARED"]),
    }


# Instructions that move numbers, by the memory: their names end in the bits of a thread where these are not 32.
MOVES = {"LDG": "global loads", "STG": "global stores", "LDGSTS": "copies to shared memory"}
# The matrix instructions of the architectures; spilled numbers; atomics on global memory.
MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
LOCAL, ATOMICS = ("LDL", "STL"), ("ATOM", "ATOMG", "RED", "REDG")


def listing(cubin: bytes) -> str:
    """A cubin's code as nvdisasm writes it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def count_instructions(text: str) -> dict[str, int]:
    """How often a listing holds the instructions named above, those of MOVES by bits a thread: {"LDG.128": 2}."""
    counts: Counter[str] = Counter()
    for found in filter(None, map(_INSTRUCTION.match, text.splitlines())):
        # Modifiers may stand between a name and its width: LDG.E.EL.128 is a load of 128 bits too.
        name, *modifiers = found[1].split(".")
        if name in MOVES:
            widths = [int(re.sub("^[US]", "", m)) for m in modifiers if re.fullmatch("64|128|256|[US](8|16)", m)]
            counts[f"{name}.{widths[0] if widths else 32}"] += 1
        elif name in (*MATRIX, *LOCAL, *ATOMICS, "UTMALDG"):
            counts[name] += 1
    return dict(counts)


def issued(text: str, trips: int) -> int:
    """Instructions that a warp issues, of a listing with one loop at most, `trips` times.

    An upper bound: all branches are counted. What lies behind the last EXIT is not: there are the slow ways of divisions.
    """
    places, inside, number = {}, 0, 0
    lines = text.splitlines()
    ends = [place for place, line in enumerate(lines) if (found := _INSTRUCTION.match(line)) and found[1] == "EXIT"]
    for line in lines[: ends[-1] + 1] if ends else lines:
        if label := re.match(r"^(\.L_x_\d+):", line):
            places[label[1]] = number
        elif found := _INSTRUCTION.match(line):
            number += found[1] != "NOP"
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in places:
                inside += number - places[back[1]]
    return number + inside * (trips - 1)


def broken_promises(promise: Promise, found: dict[str, int]) -> list[str]:
    """What the instructions of a kernel lack of its promise, or have beside it; empty where it is kept."""
    broken = [f"{name} {found[name]} times" for name in (*LOCAL, *ATOMICS) if name in found]
    matrix = {name for name in MATRIX if name in found}
    if matrix != ({promise.matrix} - {None}):
        broken.append(f"matrix products by {', '.join(sorted(matrix)) or 'none'}, not {promise.matrix or 'none'}")
    copies = {"tma"} if "UTMALDG" in found else set()
    copies |= {"cp.async"} if any(name.startswith("LDGSTS.") for name in found) else set()
    if copies != ({promise.copies} - {None}):
        broken.append(f"copies by {', '.join(sorted(copies)) or 'none'}, not {promise.copies or 'none'}")
    wanted = {"LDG": (promise.loads, promise.narrow_loads), "STG": (promise.stores, promise.narrow_stores)}
    wanted["LDGSTS"] = (128 if promise.copies == "cp.async" else None, promise.narrow_copies)
    for name, (bits, most) in wanted.items():
        widths = {int(key.split(".")[1]): count for key, count in found.items() if key.startswith(f"{name}.")}
        narrow = sum(count for width, count in widths.items() if bits is None or width < bits)
        if bits is not None and max(widths, default=0) != bits:
            broken.append(f"{MOVES[name]} of {max(widths, default=0)} bits, not {bits}")
        if most is not None and narrow > most:
            broken.append(f"{narrow} {MOVES[name]} below {bits or 'any'} bits, not {most}: {widths}")
    return broken


def build(architecture: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Compiles every case whose name starts with `only` for one architecture (80: A100, 90: H100 and H200, 100: B200) and
    yields its resources."""
    for case in cases(architecture):
        if case.oldest > architecture or not case.name.startswith(only):
            continue
        stages = {} if case.stages is None else {"num_stages": case.stages}
        compiled = triton.compile(
            source_of(case),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": case.warps} | stages | case.options,
        )
        found = resources(compiled.asm["cubin"])
        found["shared_bytes"] += compiled.metadata.shared
        microseconds = {name: round(case.bytes_moved / rate * 1e6, 1) for name, rate in BANDWIDTH.items()}
        text = listing(compiled.asm["cubin"])
        found_instructions = count_instructions(text)
        work = case.programs * case.warps * issued(text, case.trips)
        yield {
            "kernel": case.name,
            "sm": architecture,
            "warps": case.warps,
            "bytes": int(case.bytes_moved),
            "bound_us": microseconds,
            "issue_us": {
                name: round(work / rate * 1e6, 1) for name, rate in ISSUE.get(architecture, {}).items() if work
            },
            "instructions": found_instructions,
            "broken_promises": broken_promises(case.promise, found_instructions),
        } | found


def table(architectures: list[int]) -> str:
    """The resources of all kernels and the times their bytes alone would take, as a Markdown table."""
    found = [{row["kernel"]: row for row in build(number)} for number in architectures]
    head = ["kernel", "MB moved", *(f"µs {name}" for name in BANDWIDTH), *ISSUED, "warps"]
    head += [f"{what} sm_{number}" for number in architectures for what in ("registers", "shared")]
    lines = [head, ["---"] * len(head)]
    for case in cases():
        rows = [built.get(case.name, {}) for built in found]
        first = next(filter(None, rows), None)
        if first:
            issue = {name: us for row in rows for name, us in row.get("issue_us", {}).items()}
            line = [case.name, f"{first['bytes'] / 1e6:.1f}", *map(str, first["bound_us"].values())]
            line += [*(issue.get(name, "-") for name in ISSUED.values()), first["warps"]]
            lines.append(line + [row.get(what, "-") for row in rows for what in ("registers", "shared_bytes")])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    unknown = [text for text in arguments if text != "--table" and not (text.isdigit() and int(text) >= 80)]
    if unknown:
        sys.exit(
            "python -m kernels.build [--table] [80] [90] [100]: architectures from 80 (A100) on; --table makes the README's "
            f"table. {' '.join(unknown)} is not that"
        )
    if interpreted():
        sys.exit("TRITON_INTERPRET is 1, which rules compiling out; unset it")
    chosen = [int(text) for text in arguments if text.isdigit()] or [80, 90]
    if "--table" in arguments:
        print(table(chosen))
        return
    for number in chosen:
        for row in build(number):
            print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1:])
