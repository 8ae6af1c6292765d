"""recipes/environment.sh: which Python the launchers use, and what they say of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def active(tmp_path: Path) -> Path:
    """An environment whose python is this one."""
    folder = tmp_path / "active"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder


def chosen(repository: Path, **environment: str) -> tuple[str, str]:
    """The python that is chosen, and what is said."""
    clean = {
        key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX", "UMT_PYTHON")
    }
    command = ["bash", "-c", f'source "{repository}/recipes/environment.sh"; echo "$PYTHON"']
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout whose own environment cannot be made, as its base is no python."""
    (tmp_path / "checkout" / "recipes").mkdir(parents=True)
    for name in ("recipes/environment.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / "checkout" / name).write_text((REPOSITORY / name).read_text())
    return tmp_path / "checkout"


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_with_what_is_needed(repository: Path, active: Path, variable: str) -> None:
    python, said = chosen(repository, NEEDS="torch pytest", **{variable: str(active)})
    assert python == str(active / "bin" / "python") and said == f"Using the active environment {active}\n"


def test_an_active_environment_that_lacks_something(repository: Path, active: Path) -> None:
    python, said = chosen(repository, NEEDS="torch no_such_module", VIRTUAL_ENV=str(active), PYTHON3="false")
    assert not python
    assert said.startswith(
        f"The active environment {active} lacks no_such_module; using {repository}/.venv in its place.\n"
    )


def test_a_python_that_is_named_comes_first(repository: Path, active: Path) -> None:
    assert chosen(repository, UMT_PYTHON="/some/python", VIRTUAL_ENV=str(active)) == ("/some/python", "")


def test_nothing_active(repository: Path) -> None:
    python, said = chosen(repository, PYTHON3="false")
    assert not python and "needs Python 3.11 or newer; false is" in said


COMMON = {"DATA": "d.csv", "INIT": "i.pth", "OUT": "o", "QUESTIONS": "q.json", "VIDEOS": "v.json", "MOVIES": "m"}


@pytest.mark.parametrize(
    ("launcher", "words", "given", "said"),
    [
        ("finetune", [], {"RECIPE": "k40"}, "no recipe page k40.py beside it; there are ava k400 k600"),
        ("finetune", [], {"RECIPE": "k600"}, "set LABEL_MAP to the official list of the head rows that k600 keeps"),
        ("finetune", [], {"RECIPE": ""}, "set RECIPE to k710, k400"),
        ("ava", [], {"MOVIES": ""}, "set MOVIES to the folder of the movies"),
        ("stage1_k710", [], {"DATA": ""}, "set DATA to a list of videos"),
        ("stage1_k710", [], {"NNODES": "2"}, "set MASTER_ADDR to the name of the first node"),
        ("answering", ["qa_msrvt"], {}, "no recipe page qa_msrvt.py beside it"),
        ("retrieval", ["ret_msrvt:l16_25m"], {}, "no recipe page ret_msrvt.py beside it"),
        ("quickstart_questions", ["no/such"], {}, "no/such has no stage 2; run bash recipes/quickstart.sh --stage2"),
        ("quickstart_captions", ["no/such"], {}, "no/such has no stage 2; run bash recipes/quickstart.sh --stage2"),
    ],
)
def test_launchers_say_what_is_missing_before_an_environment_is_made(
    launcher: str, words: list[str], given: dict[str, str], said: str
) -> None:
    names = ("VIRTUAL_ENV", "CONDA_PREFIX", "UMT_PYTHON", "SLURM_NNODES", "MASTER_ADDR", "NNODES")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    command = ["bash", str(REPOSITORY / "recipes" / f"{launcher}.sh"), *words]
    # A checkout whose environment would have to be made says so, as its base is no python.
    environment = clean | COMMON | {"PYTHON3": "false"} | given
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and said in done.stderr, done.stderr
    assert "Python" not in done.stderr
