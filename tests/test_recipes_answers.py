"""The question-answering pages: the official numbers, written down a second time, and schedule and decay as officially."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.parity_files import parity_files, read_case
from umt_fast import recipe, zoo
from umt_fast.engine.optim import build_optimizer
from umt_fast.engine.schedule import warmup_cosine
from umt_fast.tasks import task_of

REPOSITORY = Path(__file__).resolve().parent.parent
# Rate, epochs, drop path of 5M, 17M, 25M; everything warms up for one epoch.
OFFICIAL = {
    ("anet", "b16"): ("4e-5 12 .2", "4e-5 12 .2", "4e-5 12 .2"),
    ("anet", "l16"): ("4e-5 10 .3", "4e-5 12 .3", "4e-5 10 .3"),
    ("msrvtt", "b16"): ("2e-5 8 .2", "2e-5 8 .2", "2e-5 8 .2"),
    ("msrvtt", "l16"): ("2e-5 8 .4", "2e-5 6 .4", "4e-5 5 .4"),
    ("msvd", "b16"): ("2e-5 15 .2", "2e-5 15 .2", "6e-5 6 .2"),
    ("msvd", "l16"): ("6e-5 6 .4", "6e-5 6 .4", "6e-5 6 .4"),
}
SCORES = {
    "anet": "43.5 44.9 44.8 45.1 47.3 47.9",
    "msrvtt": "44.3 44.9 44.9 45.5 46.4 47.1",
    "msvd": "49.1 48.9 49.5 51.3 53.4 55.2",
}
VARIANTS = [f"{size}_{corpus}" for size in ("b16", "l16") for corpus in ("5m", "17m", "25m")]
SCHEDULES = [
    (path, name)
    for path in parity_files("load_downstream")
    for name in read_case(path)[1]
    if name.startswith("schedule.") and name.endswith("floor_0.01")
]


@pytest.mark.parametrize(("data", "size"), OFFICIAL)
def test_variants_have_the_official_numbers(data: str, size: str) -> None:
    for corpus, expected in zip(("5m", "17m", "25m"), OFFICIAL[data, size], strict=True):
        config = recipe.load(f"qa_{data}:{size}_{corpus}")
        lr, epochs, drop_path = map(float, expected.split())
        assert (config.optim.lr, config.run.epochs, config.run.warmup_epochs) == (lr, epochs, 1)
        assert config.student.drop_path == drop_path
        assert (config.max_length, config.max_answer, config.student.num_frames, config.run.batch_size) == (
            25,
            5,
            12,
            32,
        )
        depth, layers, fusion = {"b16": (12, 12, 9), "l16": (24, 24, 19)}[size]
        assert (config.student.depth, config.text.depth, config.text.fusion_layer) == (depth, layers, fusion)
        assert config.student.checkpoint_blocks == depth and not config.student.position_grid
        assert config.data.sampling == "intervals" and config.data.augment == "random_resized_crop"
        assert config.tokenizer == f"bert-{'base' if size == 'b16' else 'large'}-uncased"
        assert not config.questions and task_of(config).name == "question_answering"


@pytest.mark.parametrize("data", SCORES)
def test_pages_print_the_published_scores(data: str) -> None:
    page = (REPOSITORY / "recipes" / f"qa_{data}.py").read_text()
    found = re.findall(r"^\| (\w+) +\| ([\d.]+) +\|$", page, re.MULTILINE)
    assert found == list(zip(VARIANTS, SCORES[data].split(), strict=True))
    for size in ("b16", "l16"):
        assert zoo.ZOO[f"qa_{data}_{size}_25m"].score == float(dict(found)[f"{size}_25m"])


@pytest.mark.parametrize(("path", "name"), SCHEDULES, ids=lambda value: getattr(value, "name", value))
def test_parity_of_the_schedule(path: Path, name: str) -> None:
    expected = read_case(path)[1][name]
    steps, warmup = map(int, re.fullmatch(r"schedule\.(\d+)_steps_(\d+)_warmup_.*", name).groups())
    optim = recipe.load("qa_msrvtt:l16_17m").optim
    rate = warmup_cosine(optim, global_batch=256, steps_per_epoch=1, epochs=steps, warmup_epochs=warmup)
    found = torch.tensor([rate(step) for step in range(steps)], dtype=torch.float64)
    torch.testing.assert_close(found / 2e-5, expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", parity_files("load_downstream"), ids=lambda path: path.name)
def test_parity_of_weight_decay(path: Path) -> None:
    expected = read_case(path)[0]["weight_decay"]["qa"]
    config = recipe.load("qa_anet:b16_5m")
    config.student.depth, config.text.depth, config.text.fusion_layer = 2, read_case(path)[0]["layers"], 2
    config.student.width, config.text.width, config.text.vocab_size = 24, 24, 30
    config.student.checkpoint_blocks = 0
    objective = task_of(config).untrained(config)
    optimizer = build_optimizer(objective.trainable, config.optim, lr=1.0, layer_of=None, num_layers=0)
    names = {parameter: name for name, parameter in objective.trainable.named_parameters()}
    found = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    shared = {name: value for name, value in found.items() if name in expected}
    assert len(shared) > 80 and all(expected[name] == value for name, value in shared.items())


def test_the_launcher_passes_everything_on(tmp_path: Path) -> None:
    """An interpreter that only prints its arguments stands in for Python."""
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    echo.chmod(0o755)
    given = {"QUESTIONS": "q.json=/data", "INIT": "b16_25m.pth", "OUT": "runs/x", "NGPU": "1"}
    environment = {**os.environ, "UMT_PYTHON": str(echo), **given}
    script = ["bash", str(REPOSITORY / "recipes" / "answering.sh")]

    def words(*arguments: str) -> list[str]:
        command = [*script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    expected = ["--questions", "q.json=/data", "--init", "b16_25m.pth", "--run.out", "runs/x"]
    found = words("qa_msvd:l16_5m", "--run.seed", "7")
    assert found[found.index("train") + 1 :] == [
        f"{REPOSITORY}/recipes/qa_msvd.py:l16_5m",
        *expected,
        "--run.seed",
        "7",
    ]
    found = words("qa_anet")
    assert found[found.index("train") + 1 :] == [f"{REPOSITORY}/recipes/qa_anet.py", *expected]
    for name in given:
        if name == "NGPU":
            continue
        less = {key: value for key, value in environment.items() if key != name}
        done = subprocess.run([*script, "qa_anet"], env=less, capture_output=True, text=True)
        assert done.returncode != 0 and f"set {name}" in done.stderr
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "name a page" in done.stderr
