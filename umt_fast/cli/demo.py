"""`demo`: the page that searches a file of `embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from umt_fast.cli.command import call
from umt_fast.cli.embed import read_features
from umt_fast.config import ConfigError, require
from umt_fast.demo.gallery import Gallery, Index
from umt_fast.demo.server import Demo, serve
from umt_fast.hub import load_model


def main(arguments: list[str]) -> None:
    """`demo ...`."""
    call(command, arguments, "demo")


def command(
    features: Annotated[Path | None, tyro.conf.arg(aliases=("--in",))] = None,
    weights: str = "",
    model: str = "",
    num_frames: int = 0,
    image_size: int = 0,
    tokenizer: str = "",
    index: Index = "exact",
    host: str = "127.0.0.1",
    port: int = 7860,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
) -> None:
    """Serve a page that searches clips by a text, or by a clip, and plays what it finds; until Ctrl-C.

    A time line shows which part of a clip goes with the text. Clips are sent as small previews of their first minute.

    Args:
        features: The file that `embed` wrote. Its clips are played from where they were then.
        weights: The weights that it was made with.
        model: As it was given to `embed`.
        num_frames: Likewise.
        image_size: Likewise.
        tokenizer: Tokenizer of the model, by name or a folder with a vocab.txt; empty: as the run was given it, or the
            usual one of the named model.
        index: exact, or hnsw (package faiss): a graph of neighbors for millions of clips, kept beside the features.
        host: Address to listen on. Another than the loopback shows the clips to the network.
        port: 0: any free one.
        device: auto, cpu or cuda.
        dtype: As it was given to `embed`.
    """
    require(features is not None, "demo has nothing to show; give --features features.safetensors")
    require(bool(weights), "demo has no weights; give --weights FILE, those that `embed` was given")
    require(0 <= port < 65536, f"port is {port}; it must lie in [0, 65535]")
    vectors, names, of = read_features(features)
    loaded = load_model(
        model or None,
        weights=weights,
        device=device,
        dtype=None if dtype == "auto" else dtype,
        num_frames=num_frames or None,
        image_size=image_size or None,
        tokenizer=tokenizer or None,
    )
    if loaded.fingerprint() != of["fingerprint"] or loaded.description != of["model"]:
        raise ConfigError(f"{features} was made with other weights than {weights}; give those, or `embed` again")
    gallery = Gallery(vectors, names, index=index, beside=features)
    say = f"{len(names)} clips; Ctrl-C ends"
    serve(Demo(gallery, loaded), host=host, port=port, ready=lambda url: print(f"{url}  {say}", flush=True))
