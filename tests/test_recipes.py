"""The recipes' shell scripts: what they pass on and what they ask for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from umt_fast import recipe

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def at_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_stage1_recipe_script_reaches_the_trainer_without_a_gpu(tmp_path: Path) -> None:
    """The launcher itself must not stop at a missing nvidia-smi; the list's absence is then the trainer's to report."""
    environment = {**os.environ, "UMT_PYTHON": sys.executable, "DATA": str(tmp_path / "no.csv"), "OUT": str(tmp_path)}
    environment.pop("NGPU", None)
    done = subprocess.run(
        ["bash", "recipes/stage1_k710.sh", "--run.device", "cpu"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no list at" in done.stderr, (done.returncode, done.stderr)
    del environment["DATA"]
    done = subprocess.run(["bash", "recipes/stage1_k710.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "set DATA" in done.stderr


@pytest.mark.parametrize("corpus", ["5m", "17m", "25m"])
def test_stage_2_recipe_scripts_pass_every_corpus_on(corpus: str, tmp_path: Path) -> None:
    """An interpreter that only prints its arguments stands in for Python."""
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    echo.chmod(0o755)
    names = {"5m": ["WEBVID2M", "CC3M"]}
    names["17m"] = [*names["5m"], "COCO", "VG", "SBU", "CC12M"]
    names["25m"] = ["WEBVID10M", *names["17m"][1:]]
    lists = {name: f"{name.lower()}.json=/data/{name}" for name in names[corpus]}
    environment = {**os.environ, "UMT_PYTHON": str(echo), "INIT": "stage1.pth", "OUT": "runs/x", "NGPU": "1", **lists}
    script = ["bash", f"recipes/stage2_{corpus}.sh", "--run.seed", "7"]
    words = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.split()
    videos, images = words.index("--videos"), words.index("--images")
    assert words[videos + 1 : images] == [lists[names[corpus][0]]]
    assert words[images + 1 : words.index("--init")] == [lists[name] for name in names[corpus][1:]]
    assert words[-2:] == ["--run.seed", "7"] and words[words.index("train") + 1].endswith("recipes/stage2.py:b16")
    del environment[names[corpus][-1]]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and f"set {names[corpus][-1]}" in done.stderr


def test_the_detection_recipe_script_names_what_it_needs(tmp_path: Path) -> None:
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    echo.chmod(0o755)
    given = {"DATA": "train.csv", "MOVIES": "/data/movies", "INIT": "k710.pth", "OUT": "runs/ava"}
    environment = {**os.environ, "UMT_PYTHON": str(echo), "NGPU": "1", "MODEL": "l16", **given}
    script = ["bash", "recipes/ava.sh", "--run.seed", "7"]
    words = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.split()
    passed = {words[n]: words[n + 1] for n in range(len(words)) if words[n].startswith("--")}
    expected = {
        "--data.train": "train.csv",
        "--data.root": "/data/movies",
        "--init": "k710.pth",
        "--run.out": "runs/ava",
    }
    assert passed == expected | {"--run.seed": "7"}
    assert words[words.index("train") + 1].endswith("recipes/ava.py:l16")
    for name in given:
        missing = {key: value for key, value in environment.items() if key != name}
        done = subprocess.run(script, env=missing, capture_output=True, text=True)
        assert done.returncode != 0 and f"set {name}" in done.stderr


def test_the_published_detection_settings() -> None:
    """The official scripts' numbers that differ between the variants."""
    found = {}
    for name in ("b16", "l16", "b16_k400", "l16_k400"):
        config = recipe.load(f"ava:{name}")
        run, optim = config.run, config.optim
        found[name] = (run.batch_size, run.epochs, run.dtype, run.seed, optim.layer_decay, config.student.drop_path)
        assert (run.warmup_epochs, optim.lr, optim.weight_decay, config.num_classes) == (5, 2.5e-4, 0.05, 80)
    assert found["b16"] == found["b16_k400"] == (8, 30, "bf16", 0, 0.75, 0.2)
    assert found["l16"] == found["l16_k400"] == (4, 25, "fp32", 6666, 0.85, 0.4)
