"""The command line: `python -m umt_fast COMMAND ...`.

Commands:
  train RECIPE [--section.key value ...]   one training run; `train RECIPE --help` lists every key
  plan RECIPE --gpus N [--gpu h100] [...]  hours, clips/s and what bounds them, with every assumption
  scan LIST --out MANIFEST                 decode every clip once, write a manifest and a list of bad files
  prepare LIST --out DIR [--shard i/n]      pack candidate frames of every clip, for training that is not bound by decoding
  bench stage1|stage2 [...]                time a whole training step on random clips, one JSON line
  bench fidelity [...]                     how far an 8-bit teacher is from the exact one
  eval FILE LIST [--model NAME] [...]       accuracy of a classifier, or retrieval with a stage-2 model
  embed LIST|FOLDER|FILE --weights FILE --out FEATURES   one vector for each clip, of any trained model
  search TEXT --in FEATURES --weights FILE  the clips that are nearest to a text, or to a clip (--clip PATH)
  convert FILE OUT                         the weights of a checkpoint, in the official layout, as safetensors or .pth
  report RUN                               write RUN/report.html from a run's metrics and results
  quickstart [--out DIR] [--seed N] [--stage2 True]   the sample world from nothing to report

`python -m umt_fast COMMAND --help` explains each.
"""

from __future__ import annotations

from umt_fast import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the other imports

import contextlib
import difflib
import functools
import inspect
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from umt_fast.cli.outputs import check_output
from umt_fast.config import ConfigError, check_number, require


def _cli(function: Any, arguments: list[str], command: str, **keywords: Any) -> Any:
    """What `function` gives for the arguments. Raises ConfigError where they do not fit it."""
    said = io.StringIO()
    whole = contextlib.nullcontext() if {"-h", "--help"} & set(arguments) else _unbroken_lines()
    try:
        # tyro reports in a box on stderr; a command is run outside, where stderr is the user's.
        with contextlib.redirect_stderr(said), whole:
            result = tyro.cli(
                _deferred(function) if inspect.isfunction(function) else function,
                args=arguments,
                prog=f"python -m umt_fast {command}",
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                **keywords,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(f"{_in_one_line(said.getvalue())} (python -m umt_fast {command} --help)") from None
    sys.stderr.write(said.getvalue())
    return result() if inspect.isfunction(function) else result


@contextlib.contextmanager
def _unbroken_lines() -> Iterator[None]:
    """Makes tyro believe in a terminal wider than any message: words longer than a line would come in pieces."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(1 << 20)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _deferred(function: Any) -> Any:
    @functools.wraps(function)
    def call_later(*values: Any, **named: Any) -> Any:
        return functools.partial(_call, function, *values, **named)

    return call_later


def _call(function: Any, *values: Any, **named: Any) -> Any:
    """Runs a command with numbers that are finite, fit into 64 bits and are not negative: no command has others."""
    for name, value in inspect.signature(function).bind(*values, **named).arguments.items():
        check_number(f"--{name}", value)
        negative = isinstance(value, (int, float)) and value < 0
        require(not negative, f"--{name} is {value}; it must not be negative")
    interrupts.raise_again()
    return function(*values, **named)


def _in_one_line(box: str) -> str:
    """The message of tyro's box, which stands below the title and above the next rule, with the nearest option."""
    plain = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", "\n".join(box.splitlines()[1:]))
    parts = [" ".join(part.split()) for part in re.split(r"^[ ─-]+$", plain, flags=re.MULTILINE)]
    near = re.search(r"(?:Perhaps you meant|Arguments similar to \S+):\s+(--[\w.]+)", plain)
    message = next(filter(None, parts), box).removesuffix(".")
    return f"{message}; did you mean {near[1]}?" if near else message


def _train(arguments: list[str]) -> None:
    from umt_fast import recipe

    if not arguments or arguments[0].startswith("-"):
        if arguments in (["--help"], ["-h"]):
            print("usage: python -m umt_fast train RECIPE [--section.key value ...]")
            print(f"recipes: {', '.join(recipe.names())}, each with variants as NAME:VARIANT, or the path of a page")
            print("`python -m umt_fast train RECIPE --help` lists every key with its default.")
            return
        raise ConfigError(f"train needs a recipe first; known: {', '.join(recipe.names())}")
    base = recipe.load(arguments[0])
    config = _cli(type(base), arguments[1:], f"train {arguments[0]}", default=base)
    from umt_fast.train import train

    interrupts.raise_again()
    train(config)


def _plan(arguments: list[str]) -> None:
    from umt_fast import plan, recipe

    if not arguments or (arguments[0].startswith("-") and arguments not in (["--help"], ["-h"])):
        raise ConfigError(f"plan needs a recipe first; known: {', '.join(recipe.names())}")
    helped = arguments[0].startswith("-")
    options, rest = _cli(
        plan.PlanOptions,
        arguments if helped else arguments[1:],
        f"plan {'RECIPE' if helped else arguments[0]}",
        description="Hours of a run and what bounds them. Any key of the recipe may follow (--run.batch_size 32 ...).",
        return_unknown_args=True,
    )
    base = recipe.load(arguments[0])
    config = _cli(type(base), rest, f"plan {arguments[0]}", default=base)
    print(plan.report(arguments[0], config, options))


def _scan(arguments: list[str]) -> None:
    from umt_fast.config import DataConfig
    from umt_fast.data.prepare.scan import scan, verify

    def command(
        list_path: Annotated[Path, tyro.conf.Positional],
        /,
        out: Path | None = None,
        check: Annotated[bool, tyro.conf.arg(name="verify")] = False,
        workers: int = 4,
        separator: str = ",",
        root: str = "",
        frame_pattern: str = "img_{:05d}.jpg",
    ) -> None:
        """Decode every clip of a list once and write a manifest that training reads in its place; or verify a manifest.

        Args:
            list_path: The list: path and label per line, or frame folders (path, number of frames, label).
            out: Manifest to write; the bad files go beside it. An interrupted scan continues.
            check: Take the list as a manifest and read its files against their checksums; then without --out.
            workers: Decoding processes; 0 decodes in this one.
            separator: Field separator of the list.
            root: Folder put before relative paths; empty: the list's own folder.
            frame_pattern: File name of frame i (from 1) in a list of frame folders.
        """
        if (out is None) != check:
            raise ConfigError("scan needs either --out MANIFEST, to write one, or --verify True, to check one")
        data = DataConfig(separator=separator, root=root, frame_pattern=frame_pattern)
        if out is None:
            verify(list_path, workers=workers, data=data)
            return
        if out.parent.exists():  # else it is made
            check_output(out, list_path)
        scan(list_path, out, workers=workers, data=data)

    _cli(command, arguments, "scan")


def _prepare(arguments: list[str]) -> None:
    from umt_fast.config import DataConfig
    from umt_fast.data.prepare.shards import prepare, verify
    from umt_fast.data.sources.prepared import Settings

    def command(
        list_path: Annotated[Path, tyro.conf.Positional],
        /,
        out: Path,
        shard: str = "0/1",
        segments: int = 8,
        per_segment: int = 3,
        short_side: int = 256,
        quality: int = 90,
        seed: int = 0,
        sampling: Literal["sparse", "intervals"] = "sparse",
        max_seconds: float = 0.0,
        shard_mib: int = 1024,
        workers: int = 4,
        separator: str = ",",
        root: str = "",
        frame_pattern: str = "img_{:05d}.jpg",
        check: Annotated[bool, tyro.conf.arg(name="verify")] = False,
    ) -> None:
        """Pack candidate frames of every clip as JPEGs, for one kind of sampling: train with --data.train DIR.

        Args:
            list_path: A list with labels, a manifest, or a caption list (then train with --data.prepared DIR).
            out: Folder for the shards. The same command again continues, and tries the bad clips again.
            shard: i/n: every n-th clip from the i-th on, so that n machines share a list.
            segments: Segments of a clip; the frames a training run takes must divide segments x per_segment.
            per_segment: Random candidates of each segment; training draws one of them.
            short_side: Larger frames are shrunk to this short side, in pixels.
            quality: JPEG quality, 1 to 100.
            seed: Seed of the candidates.
            sampling: data.sampling of the training: sparse (stage 1) or intervals (stage 2).
            max_seconds: data.max_seconds of the training: candidates of the first so many seconds; 0: of the whole clip.
            shard_mib: Size of a shard file in MiB.
            workers: Decoding processes; 0 decodes in this one.
            separator: Field separator of the list.
            root: Folder put before relative paths; empty: the list's own folder.
            frame_pattern: File name of frame i (from 1) in a list of frame folders.
            check: Then read every record of the folder against its checksum.
        """
        parts = shard.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"--shard is {shard!r}; give i/n, as 0/4")
        settings = Settings(
            segments=segments,
            per_segment=per_segment,
            short_side=short_side,
            quality=quality,
            seed=seed,
            sampling=sampling,
            max_seconds=max_seconds,
        )
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; prepare writes a folder: give another --out")
        data = DataConfig(separator=separator, root=root, frame_pattern=frame_pattern)
        prepare(
            list_path,
            out,
            settings=settings,
            part=(int(parts[0]), int(parts[1])),
            shard_bytes=shard_mib << 20,
            workers=workers,
            data=data,
        )
        if check:
            verify(out)

    _cli(command, arguments, "prepare")


def _bench(arguments: list[str]) -> None:
    from umt_fast.bench import fidelity, stage1, stage2
    from umt_fast.engine.precision import room_for

    known = {"stage1": stage1.main, "stage2": stage2.main, "fidelity": fidelity.main}
    if arguments in (["--help"], ["-h"]):
        print(f"usage: python -m umt_fast bench {'|'.join(known)} [...]; each has --help")
        return
    if not arguments or arguments[0] not in known:
        given = f"unknown benchmark {arguments[0]!r}" if arguments else "bench needs the name of a benchmark"
        raise ConfigError(f"{given}; there are: {', '.join(known)}")
    with room_for(f"bench {' '.join(arguments)}"):
        _cli(known[arguments[0]], arguments[1:], f"bench {arguments[0]}")


def _eval(arguments: list[str]) -> None:
    from umt_fast.cli.evaluate import command

    _cli(command, arguments, "eval")


def _embed(arguments: list[str]) -> None:
    from umt_fast.cli.embed import command

    _cli(command, arguments, "embed")


def _search(arguments: list[str]) -> None:
    from umt_fast.cli.search import command

    _cli(command, arguments, "search")


def _convert(arguments: list[str]) -> None:
    from umt_fast.cli.convert import command

    _cli(command, arguments, "convert")


def _report(arguments: list[str]) -> None:
    from umt_fast.report import write_report

    def command(run: Annotated[Path, tyro.conf.Positional], /) -> None:
        """Write one self-contained report.html into a run's folder.

        Args:
            run: Folder of a run (or of a quickstart).
        """
        if not run.is_dir():
            raise ConfigError(f"no run folder at {run}")
        check_output(run / "report.html")
        print(write_report(run))

    _cli(command, arguments, "report")


def _quickstart(arguments: list[str]) -> None:
    from umt_fast.sample_world import quickstart

    def command(out: Path = Path("runs/quickstart"), seed: int = 0, stage2: bool = False) -> None:
        """Render the sample world, train its teacher, pre-train, compare, report.

        Args:
            out: Folder for everything; finished parts found there are not done again.
            seed: Seed of the world, the teacher and the training.
            stage2: Go on to captions and zero-shot retrieval.
        """
        quickstart.run(out, seed, stage2)

    _cli(command, arguments, "quickstart")


COMMANDS = {
    "train": _train,
    "plan": _plan,
    "scan": _scan,
    "prepare": _prepare,
    "bench": _bench,
    "eval": _eval,
    "embed": _embed,
    "search": _search,
    "convert": _convert,
    "report": _report,
    "quickstart": _quickstart,
}


def _user_errors() -> tuple[type[Exception], ...]:
    """What a user's input can cause, reported in one line. Anything else is our fault and keeps its stack."""
    from umt_fast.data.errors import DataError
    from umt_fast.engine.checkpoint import CheckpointError
    from umt_fast.engine.trainer import NonFiniteError
    from umt_fast.models.weights import WeightsError

    return (ConfigError, DataError, WeightsError, CheckpointError, NonFiniteError, OSError)


def _stopped() -> type[Exception]:
    from umt_fast.engine.trainer import Stopped

    return Stopped


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0, also of a run that SIGTERM told to save and stop; 2 with one line on stderr for input that cannot work; 130 with one
    line after Ctrl-C, as shells have it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    interrupts.end_at_once()
    try:
        return _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("umt_fast: interrupted", file=sys.stderr)
        return 130
    finally:
        interrupts.raise_again()


def _run(name: str, rest: list[str]) -> int:
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1, 0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown command {name!r}{hint} Commands: {', '.join(COMMANDS)}")
        COMMANDS[name](rest)
    except KeyboardInterrupt:  # the clauses below import what may have been interrupted
        raise
    except _stopped() as stop:
        print(f"umt_fast: {stop}", file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else 0
    except _user_errors() as error:
        print(f"umt_fast: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
