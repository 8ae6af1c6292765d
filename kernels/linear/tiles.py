"""The tiles that products run with: those measured on this machine's GPU where they are known, else a rule.

    python -m kernels.tune tiles.json               measures, on a GPU
    kernels.use_tiles("tiles.json")                 from then on; or UMT_KERNELS_TILES=tiles.json

A table holds tiles by the form of a product: its sizes, dtype, and what its epilogue holds. Other forms go by the rule. The
numbers computed do not depend on tiles, but for the order of the sums of a bias' gradient.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Programs of the interpreter, which runs them one after the other: two show that each takes more than one tile.
INTERPRETED_SMS = 2
VARIABLE = "UMT_KERNELS_TILES"
FORMAT = "umt_kernels tiles 1"
FIELDS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages")
# Launches by their form, while kernels.tune records them: result, operands and options of product.
recorded: dict[Form, tuple[Tensor, Tensor, Tensor, dict[str, Any]]] | None = None
# The tiles in use by the names of forms, and where they are from; None: UMT_KERNELS_TILES was not read yet.
_tuned: dict[str, dict[str, int]] | None = None


class Form(NamedTuple):
    """What the best tiles of a product depend on."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    """Of the operands."""
    layout: str
    """"n" or "t" for each operand: as stored, or transposed."""
    wide: bool
    """The epilogue or loop holds a second tile of numbers, which halves the tile that registers allow."""
    saves: bool
    """The pre-activation is stored too."""

    @property
    def name(self) -> str:
        """In a table."""
        kinds = " wide" * self.wide + " saves" * self.saves
        return f"{self.M}x{self.N}x{self.K} {str(self.dtype).removeprefix('torch.')} {self.layout}{kinds}"


def form_of(
    out: Tensor, a: Tensor, operands: dict[str, Tensor | None], backward: bool, *, a_t: bool = False, b_t: bool = False
) -> Form:
    """The form of a product of `a` with another operand into `out`."""
    scale = operands.get("a_scale")
    by_blocks = scale is not None and scale.ndim == 2 and scale.shape[1] > 1
    wide = backward or by_blocks or operands.get("out_scale") is not None
    layout = ("t" if a_t else "n") + ("t" if b_t else "n")
    K = a.shape[0] if a_t else a.shape[1]
    return Form(*out.shape[-2:], K, a.dtype, layout, wide, not backward and operands.get("pre") is not None)


@functools.cache
def limits(device: torch.device) -> tuple[int, int, int]:
    """Compute capability (90 is 9.0), SMs and shared bytes of a program. The interpreter's: an old and small GPU."""
    if device.type != "cuda":
        return 80, INTERPRETED_SMS, 99 << 10
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin


def tiling(
    M: int, N: int, itemsize: int, capability: int, sms: int, shared: int, *, wide: bool = False, saves: bool = False
) -> dict[str, int]:
    """Tile, warps and stages for an (M, N) result of operands of this many bytes a number.

    wide: the epilogue or loop holds a second tile of numbers, which halves the tile that registers allow.
    saves: the pre-activation is stored too.
    """
    depth = 128 // itemsize
    high, across, warps = 128, 128, 8
    # Instructions of four warps, whose operands stay in shared memory; 12.0 (consumer Blackwell) has those of 8.0.
    grouped = 90 <= capability < 120
    if grouped and not wide and itemsize < 4 and N % 256 == 0:
        across = 256
    if -(-M // high) * -(-N // across) < sms:
        across = 128
    if -(-M // high) * -(-N // across) < sms // 2:
        high, warps = 64, 4
    if not grouped and wide and itemsize == 2:
        # 64 sums a thread beside as many pre-activations would spill.
        high, warps = 64, 8
    stage = (high + across) * depth * itemsize
    # Of the rest the epilogue takes its part, to bring tiles into the order of memory.
    stages = max(2, min(4, (shared - (8 << 10)) // stage))
    # What the registers of an epilogue beside the sums of such a tile allow, without spilling any.
    parts = 1
    if across == 256 or grouped and wide and itemsize == 2:
        parts = 4 if across == 256 and saves else 2
    return {
        "BLOCK_M": high,
        "BLOCK_N": across,
        "BLOCK_K": depth,
        "PARTS": parts,
        "num_warps": warps,
        "num_stages": stages,
    }


def device_name(device: torch.device) -> str:
    """Of the GPU that a table is for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def use_tiles(path: str | os.PathLike[str] | None) -> None:
    """Runs products with the tiles of a table that kernels.tune made, where it has their form; None: by the rule alone.

    Raises ValueError for a file that is no such table, or one of another GPU than the current.
    """
    global _tuned
    _tuned = {} if path is None else _read(Path(path))


def _read(path: Path) -> dict[str, dict[str, int]]:
    remedy = f"make one with python -m kernels.tune {path}"
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"its format is {table['format']!r}, not {FORMAT!r}")
        tiles = {
            name: {field: int(entry["tiles"][field]) for field in FIELDS} for name, entry in table["forms"].items()
        }
        made_for = table["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of tiles: {type(error).__name__}: {error}; {remedy}") from error
    here = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if made_for != here:
        raise ValueError(f"{path} is for {made_for}, but this is {here}; {remedy}")
    return tiles


def tiles_of(form: Form, device: torch.device) -> dict[str, int]:
    """Tile, warps and stages of a product."""
    if _tuned is None:
        use_tiles(os.environ.get(VARIABLE) or None)
    known = _tuned.get(form.name) if _tuned else None
    return dict(known) if known else by_rule(form, device)


def by_rule(form: Form, device: torch.device) -> dict[str, int]:
    """tiling() of a form on a device."""
    return tiling(form.M, form.N, form.dtype.itemsize, *limits(device), wide=form.wide, saves=form.saves)
