"""`convert`: the weights of a file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from umt_fast.cli.command import call
from umt_fast.cli.outputs import check_output
from umt_fast.config import Vocabulary
from umt_fast.data.loaders.tokens import load_vocabulary, vocabulary_of
from umt_fast.engine.sharded_checkpoint import read_weights as read_sharded
from umt_fast.hub import weights_path
from umt_fast.models.description import found_in, vit_config
from umt_fast.models.weights import WeightsError, WeightsFile, is_saved_folder, read_weights, save_state, vocabulary_in
from umt_fast.models.weights.finetune import deepspeed_file, is_deepspeed, with_positions


def command(
    file: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    averaged: bool = False,
) -> None:
    """Write the weights of a file alone, flat, under the official names.

    A classifier of other than 1568 tokens also gets the constant `pos_embed` that such official files hold.

    Args:
        file: A checkpoint of a run (.pt or .sharded), any weights file umt_fast reads (wrappers and prefixes are taken off),
            a folder of save_pretrained, or a released file by name.
        out: .safetensors, which keeps what a checkpoint says of its model, and its tokenizer whole, or any other suffix for a
            PyTorch file, which does not.
        averaged: Take the average of the weights (optim.ema_decay) that a checkpoint-*.pt of a run holds beside them.
    """
    check_output(out, file)
    path, _ = weights_path(file)
    source = deepspeed_file(path) if is_deepspeed(path) else path
    if source.is_dir() and not is_saved_folder(source):
        content = read_sharded(source)
        found = WeightsFile(content.pop("model"), content)
    else:
        found = read_weights(source)
    state, described = found.state, found_in(found.rest, file)
    if state.keys() <= {"pooled", "embedding"}:
        raise WeightsError(f"{file} holds features that `embed` wrote, no weights; give the weights themselves")
    if averaged:
        state = found.rest.get("model_ema")
        if not isinstance(state, dict):
            raise WeightsError(f"{file} holds no average of the weights (model_ema); leave out --averaged")
    if described is not None and described["task"] == "classification":
        state = with_positions(state, vit_config(described))
    words = vocabulary_in(found.rest)
    if not words.definition and words.name and Path(words.name).exists():
        # Named by an older file, or beside the weights: a path of this machine would be none elsewhere.
        words = vocabulary_of(load_vocabulary(words), words.name)
    save_state(state, out, described, words if words.name else None)
    values = sum(tensor.numel() for tensor in state.values())
    print(f"{out}: {len(state)} tensors, {values / 1e6:.1f} M values{_said(out, described, words)}")


def _said(out: Path, described: dict[str, Any] | None, words: Vocabulary) -> str:
    """What becomes of what the source says of its model and tokenizer."""
    if described is None:
        return ""
    named = f" and its tokenizer {words.name}" if words.name else ""
    if out.suffix == ".safetensors":
        carried = f" and carries its tokenizer {words.name}, {words.fingerprint}" if words.definition else named
        return f"; it names its model{carried}"
    needed = "--model and --tokenizer" if words.name else "--model"
    return f"; a flat file does not name its model{named}, so `eval` needs {needed} (.safetensors names them)"


def main(arguments: list[str]) -> None:
    """`convert ...`."""
    call(command, arguments, "convert")
