"""The command line: `python -m umt_fast COMMAND ...`.

Commands:
  train RECIPE [--section.key value ...]   one training run; `train RECIPE --help` lists every key
  plan RECIPE --gpus N [--gpu h100] [...]  hours, clips/s and what bounds them, with every assumption
  scan LIST --out MANIFEST                 decode every clip once, write a manifest and a list of bad files
  prepare LIST --out DIR [--shard i/n]      pack candidate frames of every clip, for training that is not bound by decoding
  bench stage1|stage2|finetune [...]       time a whole training step on random clips, one JSON line
  bench fidelity [...]                     how far an 8-bit teacher is from the exact one
  eval NAME FILE LIST [...]                figures of a model on unseen clips: `eval --help` lists the evaluations
  embed LIST|FOLDER|FILE --weights FILE --out FEATURES   one vector for each clip, of any trained model
  search TEXT --in FEATURES --weights FILE  the clips that are nearest to a text, or to a clip (--clip PATH)
  demo --features FEATURES --weights FILE   a page that searches those clips and plays what it finds
  convert FILE OUT                         the weights of a checkpoint, in the official layout, as safetensors or .pth
  report RUN                               write RUN/report.html from a run's metrics and results
  quickstart [--out DIR] [--seed N] [--stage2]   the sample world from nothing to report

`python -m umt_fast COMMAND --help` explains each.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import signal
import sys

from umt_fast import interrupts
from umt_fast.config import ConfigError
from umt_fast.extras import packages_of

# The module of this folder, imported when it is asked for, and the function in it that takes the arguments.
COMMANDS = {
    "train": "train.train",
    "plan": "train.plan",
    "scan": "data.scan",
    "prepare": "data.prepare",
    "bench": "bench.bench",
    "eval": "eval.main",
    "embed": "embed.main",
    "search": "search.main",
    "demo": "demo.main",
    "convert": "convert.main",
    "report": "report.report",
    "quickstart": "report.quickstart",
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

    0, also of a run that SIGTERM told to save and stop; 2 for input that cannot work, with one line on stderr (tyro's box
    where an option is unknown or no value of its type); 130 with one line after Ctrl-C, as shells have it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    before = signal.getsignal(signal.SIGINT)
    interrupts.end_at_once()
    try:
        return _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        interrupts.say()
        return 130
    finally:
        interrupts.restore(before)


def _run(name: str, rest: list[str]) -> int:
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown command {name!r}{hint} Commands: {', '.join(COMMANDS)}")
        with packages_of("cli"):
            import tyro  # noqa: F401  by the command's module, which is not where a reader learns what to install
        module, _, function = COMMANDS[name].partition(".")
        getattr(importlib.import_module(f"umt_fast.cli.{module}"), function)(rest)
    except SystemExit as stop:  # tyro has said why
        return stop.code or 0
    except KeyboardInterrupt:  # the clauses below import what may have been interrupted
        raise
    except _stopped() as stop:
        print(f"umt_fast: {stop}", file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else 0
    except _user_errors() as error:
        # Of the system's own errors the file comes first, as in ours.
        system = isinstance(error, OSError) and error.strerror and error.filename
        print(f"umt_fast: error: {f'{error.filename}: {error.strerror}' if system else error}", file=sys.stderr)
        return 2
    return 0
