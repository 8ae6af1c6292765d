"""`eval NAME`: figures of a checkpoint or weights file, by one of the evaluations that tasks have registered."""

# Annotations are read by tyro while the command is built, so they must not be strings.
import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import umt_fast.probing  # noqa: F401, makes its evaluation known
from umt_fast import recipe
from umt_fast.cli.command import call
from umt_fast.cli.outputs import check_output
from umt_fast.config import ConfigError, RunConfig, require, to_dict
from umt_fast.engine.distributed import distributed_run
from umt_fast.files import write_json
from umt_fast.hub import weights_path
from umt_fast.models.description import MODELS, STAGE1_MODELS, TOKENIZERS
from umt_fast.tasks import EVALUATIONS, Evaluation, evaluation_named, task_of
from umt_fast.tasks.evaluate import evaluate_checkpoint


def main(arguments: list[str]) -> None:
    """`eval NAME FILE LIST ...`. Raises ConfigError: no such evaluation."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [
            f"  {name:10s} {(type(each).__doc__ or '').strip().splitlines()[0]}" for name, each in EVALUATIONS.items()
        ]
        usage = "\n".join(
            ["usage: python -m umt_fast eval NAME FILE LIST [...]; `eval NAME --help` has the options", *lines]
        )
        if not arguments:
            raise ConfigError(f"eval needs the name of an evaluation: {', '.join(EVALUATIONS)}")
        print(usage)
        return
    evaluation = evaluation_named(arguments[0])
    call(_command_of(evaluation), arguments[1:], f"eval {evaluation.name}", description=_description(evaluation))


def _description(evaluation: Evaluation) -> str:
    return (
        f"{inspect.getdoc(type(evaluation)) or ''} Under torchrun the ranks share the clips and the first one reports."
    )


def _command_of(judge: Evaluation) -> Callable[..., None]:
    def command(
        checkpoint: Annotated[Path, tyro.conf.Positional],
        list_path: Annotated[Path, tyro.conf.Positional],
        /,
        evaluation: Annotated[judge.Options, tyro.conf.OmitArgPrefixes],
        model: str = "",
        num_frames: int = 0,
        image_size: int = 0,
        out: Path | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        """One evaluation.

        Args:
            checkpoint: A run's checkpoint-*, a folder of save_pretrained, or weights alone, ours or official, flat or under
                `model` or `module`; official ones also by released name.
            list_path: The clips.
            evaluation: Options of its own.
            model: What a file is of that does not say it: a name of `umt_fast.list_models()`, or the recipe it was trained
                with, as NAME:VARIANT or PAGE.py:VARIANT.
            num_frames: With --model: frames of a clip; 0: as the file's position table or the model says.
            image_size: With --model: pixels per side, likewise.
            out: JSON file to write the figures to, besides printing them.
            device: auto, cpu or cuda.
        """
        scores = evaluation.scores
        own = (getattr(evaluation, entry.name) for entry in dataclasses.fields(evaluation) if entry.name != "scores")
        read = [value for value in own if isinstance(value, Path)]
        for path in (out, scores):
            check_output(path, checkpoint, list_path, *read)
        if out is not None and scores is not None and out.resolve() == scores.resolve():
            raise ConfigError(f"--out and --scores are both {out}; give two files")
        described, settings = _named(model, num_frames, image_size)
        with distributed_run(RunConfig(device=device)) as ranks:
            path, released = weights_path(checkpoint)
            if released is not None and described is None:
                described, settings = _named(released.model, released.frames, released.image_size)
            figures = evaluate_checkpoint(
                judge.name,
                path,
                list_path,
                ranks=ranks,
                options=evaluation,
                model=described,
                settings=settings,
            )
            if ranks.first:
                print(json.dumps(figures))
                if out is not None:
                    write_json(out, figures)

    return command


def _named(model: str, num_frames: int, image_size: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The description of --model, with what was said of its clips, and its settings, as far as they are known."""
    if not model:
        for name, value in (("num_frames", num_frames), ("image_size", image_size)):
            require(value == 0, f"--{name} is for a file whose model is named; give --model, or leave it out")
        return None, {}
    known = MODELS | STAGE1_MODELS
    if model in known:
        described, settings = known[model](), {"tokenizer": TOKENIZERS.get(model, "")}
    else:
        try:
            config = recipe.load(model)
        except ConfigError as error:
            raise ConfigError(f"--model {model} is none of {', '.join(known)}, and no recipe: {error}") from error
        described, settings = task_of(config).describe(config), to_dict(config)
    given = {"num_frames": num_frames, "image_size": image_size}
    described["vit"] |= {name: value for name, value in given.items() if value}
    return described, settings
