"""`search`: the clips of a file of `embed` that are nearest to a text or to a clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from umt_fast.cli.command import call
from umt_fast.cli.embed import read_features
from umt_fast.config import ConfigError, require
from umt_fast.data.loaders.tokens import warn_of_unknown
from umt_fast.data.sources.captions import clean_caption
from umt_fast.hub import load_model
from umt_fast.pretrained import PretrainedModel, VideoTextModel
from umt_fast.tasks.ranking import nearest


def command(
    text: Annotated[str, tyro.conf.Positional] = "",
    /,
    features: Annotated[Path | None, tyro.conf.arg(name="in")] = None,
    weights: str = "",
    clip: Path | None = None,
    top: int = 10,
    model: str = "",
    num_frames: int = 0,
    image_size: int = 0,
    tokenizer: str = "",
    lines: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
) -> None:
    """Print the nearest clips of a file that `embed` wrote, best first: rank, score, name.

    A text is compared by the embeddings of a stage-2 model, as zero-shot retrieval does first. A clip is compared by the cosine
    of embeddings, or of pooled features where the model has no embeddings.

    Args:
        text: What is searched for.
        features: The file that `embed` wrote.
        weights: The weights that it was made with.
        clip: A video to search for, in place of a text.
        top: Clips to print; more than there is: all.
        model: As it was given to `embed`.
        num_frames: Likewise.
        image_size: Likewise.
        tokenizer: Tokenizer of the model, by name or a folder with a vocab.txt; empty: as the run was given it, or the
            usual one of the named model.
        lines: Print a JSON object a line: rank, score, name.
        device: auto, cpu or cuda.
        dtype: As it was given to `embed`.
    """
    require(features is not None, "search has nothing to search; give --in features.safetensors")
    require(bool(weights), "search has no weights; give --weights FILE, those that `embed` was given")
    require(bool(text) != (clip is not None), "give a text or --clip PATH, one of the two")
    require(clip is None or not tokenizer, "--tokenizer is for texts, and --clip is given; leave it out")
    require(top >= 1, f"top is {top}; it must be at least 1")
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
    if clip is None:
        query, kind = text_query(loaded, text), "embedding"
    else:
        query, kind = clip_query(loaded, clip)
    numbers, scores = nearest(query, vectors[kind], top, device=loaded.device, cosine=clip is not None)
    for rank, (score, row) in enumerate(zip(scores[0].tolist(), numbers[0].tolist(), strict=True), 1):
        if lines:
            print(json.dumps({"rank": rank, "score": round(score, 5), "name": names[row]}))
        else:
            print(f"{rank:4d}  {score:8.5f}  {names[row]}")


def text_query(model: PretrainedModel, text: str) -> Tensor:
    """(1, E), a text's embedding. Raises ConfigError: the model reads no texts."""
    if not isinstance(model, VideoTextModel):
        raise ConfigError(f"the model is of task {model.task!r}, which reads no texts; search with --clip PATH")
    found = model.encode_text([text])
    warn_of_unknown(model.tokenizer, {"texts": [clean_caption(text)]})
    return found


@torch.no_grad()
def clip_query(model: PretrainedModel, clip: Path) -> tuple[Tensor, str]:
    """(1, E) or (1, C), a clip's vector, and of which kind it is. Raises DataError: it cannot be read."""
    found = model.vectors(clip)
    kind = "embedding" if "embedding" in found else "pooled"
    return found[kind], kind


def main(arguments: list[str]) -> None:
    """`search ...`."""
    call(command, arguments, "search")
