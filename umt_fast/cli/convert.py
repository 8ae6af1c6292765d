"""`convert`: the weights of a file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from umt_fast.cli.command import call
from umt_fast.cli.outputs import check_output
from umt_fast.engine.sharded_checkpoint import read_weights as read_sharded
from umt_fast.models.description import found_in
from umt_fast.models.weights import WeightsFile, read_weights, save_state


def command(file: Annotated[Path, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Write the weights of a file alone, flat, under the official names.

    Args:
        file: A checkpoint of a run (.pt or .sharded), or any weights file umt_fast reads (wrappers and prefixes are
            taken off).
        out: .safetensors, which keeps what a checkpoint says of its model, or any other suffix for a PyTorch file.
    """
    check_output(out, file)
    if file.is_dir():
        content = read_sharded(file)
        found = WeightsFile(content.pop("model"), content)
    else:
        found = read_weights(file)
    save_state(found.state, out, found_in(found.rest, file))
    values = sum(tensor.numel() for tensor in found.state.values())
    print(f"{out}: {len(found.state)} tensors, {values / 1e6:.1f} M values")


def main(arguments: list[str]) -> None:
    """`convert ...`."""
    call(command, arguments, "convert")
