"""`eval`: figures of a checkpoint or weights file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from umt_fast import recipe
from umt_fast.cli.outputs import check_output
from umt_fast.config import ConfigError, DataConfig, RunConfig, require
from umt_fast.engine.distributed import distributed_run
from umt_fast.files import write_json
from umt_fast.models.description import MODELS, TOKENIZERS
from umt_fast.tasks import EvalOptions, task_of
from umt_fast.tasks.evaluate import evaluate_checkpoint


def command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    list_path: Annotated[Path, tyro.conf.Positional],
    /,
    model: str = "",
    num_frames: int = 0,
    image_size: int = 0,
    out: Path | None = None,
    scores: Path | None = None,
    batch_size: int = 16,
    top_k: int = 128,
    captions: Literal["each", "paragraph"] = "each",
    max_length: int = 0,
    max_seconds: float = 0.0,
    memory_gib: float = 8.0,
    workers: int = 4,
    separator: str = ",",
    root: str = "",
    frame_pattern: str = "img_{:05d}.jpg",
    tokenizer: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Judge a model on unseen clips. A checkpoint or converted file of umt_fast says by itself what it holds.

    One view of each clip: the centered square for accuracy, the whole frame for retrieval. Under torchrun the ranks share
    the clips and the first one reports.

    Args:
        checkpoint: A classifier (top-1 and top-5), or stage-2 weights (zero-shot retrieval): a run's checkpoint-*, or weights
            alone, ours or official, flat or under `model` or `module`.
        list_path: Labeled clips, or captions (.json, SQLite or tar files).
        model: What a file is of that does not say it: umt_b16 or umt_l16 (stage 2), umt_b16_ft or umt_l16_ft (classifiers),
            or the recipe it was trained with, as NAME:VARIANT or PAGE.py:VARIANT.
        num_frames: With --model: frames of a clip; 0: as the file's position table or the model says.
        image_size: With --model: pixels per side, likewise.
        out: JSON file to write the figures to, besides printing them.
        scores: JSON file for the ten best of every query, or the five best classes of every clip, with scores.
        batch_size: Clips per rank and step.
        top_k: Candidates that the matching head re-ranks (retrieval); 0: none; more than there is: all.
        captions: A list of captions in one entry is a query each (MSVD), or one paragraph (DiDeMo, ActivityNet).
        max_length: Tokens of a caption (DiDeMo 64, ActivityNet 150, LSMDC 96); 0: as in training (retrieval).
        max_seconds: Only the first so many seconds of a clip are looked at (DiDeMo 30); 0: all of it.
        memory_gib: Main memory of a rank for kept vision tokens and text outputs; beyond it a file in TMPDIR (retrieval).
        workers: Decoding processes.
        separator: Field separator of a list of labeled clips.
        root: Folder put before relative paths; empty: the list's own folder.
        frame_pattern: File name of frame i (from 1) in a list of frame folders.
        tokenizer: Tokenizer of a stage-2 model, by name or a folder with a vocab.txt; empty: as the run was given it, or the
            usual one of the named model.
        device: auto, cpu or cuda.
    """
    for path in (out, scores):
        check_output(path, checkpoint, list_path)
    if out is not None and scores is not None and out.resolve() == scores.resolve():
        raise ConfigError(f"--out and --scores are both {out}; give two files")
    described, usual_tokenizer = _named(model, num_frames, image_size)
    data = DataConfig(
        workers=workers, separator=separator, root=root, frame_pattern=frame_pattern, max_seconds=max_seconds
    )
    options = EvalOptions(
        batch_size=batch_size,
        top_k=top_k,
        joining=captions,
        max_length=max_length,
        memory_gib=memory_gib,
        scores=scores,
        tokenizer=tokenizer,
        usual_tokenizer=usual_tokenizer,
    )
    with distributed_run(RunConfig(device=device)) as ranks:
        figures = evaluate_checkpoint(checkpoint, list_path, data, ranks=ranks, options=options, model=described)
        if ranks.first:
            print(json.dumps(figures))
            if out is not None:
                write_json(out, figures)


def _named(model: str, num_frames: int, image_size: int) -> tuple[dict[str, Any] | None, str]:
    """The description of --model, with what was said of its clips, and its usual tokenizer."""
    if not model:
        for name, value in (("num_frames", num_frames), ("image_size", image_size)):
            require(value == 0, f"--{name} is for a file whose model is named; give --model, or leave it out")
        return None, ""
    if model in MODELS:
        described, tokenizer = MODELS[model](), TOKENIZERS.get(model, "")
    else:
        try:
            config = recipe.load(model)
        except ConfigError as error:
            raise ConfigError(f"--model {model} is none of {', '.join(MODELS)}, and no recipe: {error}") from error
        described = task_of(config).describe(config)
        tokenizer = getattr(config, "tokenizer", "")
    given = {"num_frames": num_frames, "image_size": image_size}
    described["vit"] |= {name: value for name, value in given.items() if value}
    return described, tokenizer
