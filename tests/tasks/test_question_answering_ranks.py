"""Two ranks train and answer what one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.test_question_answering import configured, written
from tests.tasks.test_question_answering import world as world  # a fixture
from umt_fast.config import RunConfig
from umt_fast.engine.distributed import distributed_run
from umt_fast.tasks.answer import AnswerOptions
from umt_fast.tasks.evaluate import evaluate_checkpoint
from umt_fast.train import train

REPOSITORY = Path(__file__).resolve().parents[2]


def trained(folder: Path, name: str, batch_size: int, parallel: str) -> None:
    """Three steps of four questions over all ranks, judged after each."""
    config = configured(folder, answers=str(folder / "answers.json"))
    config.run.out, config.run.batch_size, config.run.parallel = str(folder / name), batch_size, parallel
    config.run.epochs, config.optim.lr, config.student.drop_path = 3, 1e-2, 0.0
    config.text.hidden_dropout = config.text.attention_dropout = 0.0
    config.data.validation = str(folder / "train.json")
    train(config)


def answered(folder: Path, name: str) -> None:
    """Writes figures and predictions of each list and way to FOLDER/NAME.json; one list has fewer clips than ranks."""
    found, scores = [], folder / f"{name}_scores.json"
    with distributed_run(RunConfig(device="cpu")) as ranks:
        for asked in ("train.json", "one_clip.json"):
            for way in ({"answers": folder / "answers.json"}, {"free": True}):
                figures = evaluate_checkpoint(
                    "answer",
                    folder / "one" / "checkpoint-00000003.pt",
                    folder / asked,
                    ranks=ranks,
                    options=AnswerOptions(workers=0, scores=scores, batch_size=1, **way),
                )
                if ranks.first:
                    found.append([figures, json.loads(scores.read_text())])
        if ranks.first:
            written(folder / f"{name}.json", found)


@pytest.mark.slow
def test_two_ranks_give_the_result_of_one_process(world: Path) -> None:  # noqa: F811
    """The weights after three steps, replicated or sharded, what validation says of them, and every prediction."""
    written(world / "one_clip.json", json.loads((world / "train.json").read_text())[:2])
    trained(world, "one", 4, "ddp")
    answered(world, "alone")
    script = world / "ranks.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.tasks.test_question_answering_ranks import answered, trained\n"
        "folder, name = Path(sys.argv[2]), sys.argv[3]\n"
        "ways = {'two': 'ddp', 'sharded': 'fsdp'}\n"
        "trained(folder, name, 2, ways[name]) if name in ways else answered(folder, name)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for name in ("two", "sharded", "together"):
        done = subprocess.run([*command, str(REPOSITORY), str(world), name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def saved(name: str, step: int) -> dict[str, Any]:
        return torch.load(world / name / f"checkpoint-{step:08d}.pt", weights_only=True)["model"]

    def judged(name: str) -> list[float]:
        rows = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
        return [row["val_accuracy"] for row in rows if "val_accuracy" in row]

    expected, before = saved("one", 3), saved("one", 2)
    for name in ("two", "sharded"):
        for key, value in saved(name, 3).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        assert judged(name) == judged("one") and len(judged("one")) == 3
    key = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"
    assert (expected[key] - before[key]).abs().max() > 1e-3, "a step moves weights further than the tolerance"
    assert json.loads((world / "together.json").read_text()) == json.loads((world / "alone.json").read_text())
