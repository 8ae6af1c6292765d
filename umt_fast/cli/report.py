"""`report` and `quickstart`: a page about a run, and the sample world that makes one from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from umt_fast.cli.command import call
from umt_fast.cli.outputs import check_output
from umt_fast.config import ConfigError


def report(arguments: list[str]) -> None:
    """Writes a page about a run."""
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

    call(command, arguments, "report")


def quickstart(arguments: list[str]) -> None:
    """The sample world from nothing to a report."""
    from umt_fast.sample_world.quickstart import run

    def command(out: Path = Path("runs/quickstart"), seed: int = 0, stage2: bool = False) -> None:
        """Render the sample world, train its teacher, pre-train, compare, report.

        Args:
            out: Folder for everything; finished parts found there are not done again.
            seed: Seed of the world, the teacher and the training.
            stage2: Go on to captions and zero-shot retrieval.
        """
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out is {out}, which is a file; give the name of a folder")
        run(out, seed, stage2)

    call(command, arguments, "quickstart")
