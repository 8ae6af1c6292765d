"""What retrieval and multiple choice are judged by between epochs, and the best weights that are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from umt_fast.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = f"{REPOSITORY}/tests/assets/tiny.py:pairs"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "thing", "moves"]


@pytest.fixture
def lists(tiny_list: Path) -> Path:
    """A folder with two clips, captions to train on, and both kinds of lists to be judged by: three entries each."""
    folder = tiny_list.parent
    captions = [(0, "a red thing"), (1, "a blue thing"), (0, "red moves")]
    entries = [{"video": f"video{number}.mp4", "caption": text} for number, text in captions]
    (folder / "captions.json").write_text(json.dumps(entries))
    choices = [{"video": f"video{n % 2}.mp4", "caption": ["red", "blue", "thing"], "answer": n % 2} for n in range(3)]
    (folder / "choices.json").write_text(json.dumps(choices))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def arguments(lists: Path, out: Path, *more: object) -> list[str]:
    words = ["train", PAIRS, "--videos", lists / "captions.json", "--tokenizer", lists, "--run.out", out]
    # Three epochs of one step.
    words += ["--run.batch_size", 3, "--run.epochs", 3, "--run.warmup_epochs", 0, "--optim.lr", 1e-2, *more]
    return [str(word) for word in words]


def judgments(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith("val") for name in row)]


@pytest.mark.parametrize(
    ("validate", "table", "best", "name"),
    [("retrieval", "captions.json", "match_r_mean", "retrieve"), ("choices", "choices.json", "accuracy", "choose")],
)
def test_the_best_epoch_is_kept_and_judged_alike_by_eval(
    validate: str, table: str, best: str, name: str, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, more = tmp_path / "run", ("--validate", validate, "--data.validation", lists / table)
    assert main(arguments(lists, out, *more)) == 0
    rows = judgments(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    kept = torch.load(out / "checkpoint-best.pt", weights_only=True)
    figures = kept["validation"]["figures"]
    (key,) = {key for key in rows[0] if key.endswith(best)}
    assert figures[best] == max(row[key] for row in rows)
    assert kept["model_config"]["task"] == "retrieval"
    capsys.readouterr()
    words = ["eval", name, out / "checkpoint-best.pt", lists / table, "--workers", 0, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert figures == pytest.approx({key: found[key] for key in figures})
    # The official choice by its own name does the same.
    other = tmp_path / "official"
    assert main(arguments(lists, other, "--validate", validate, "--select_on_test", f"{lists / table}={lists}")) == 0
    assert torch.load(other / "checkpoint-best.pt", weights_only=True)["validation"]["figures"] == figures


def test_what_cannot_be_judged_is_refused(lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*more: object) -> str:
        capsys.readouterr()
        assert main(arguments(lists, tmp_path / "run", *more)) == 2
        return capsys.readouterr().err

    table = lists / "captions.json"
    both = ("--data.validation", table, "--select_on_test", table)
    assert "the best weights are chosen by one of them: leave the other out" in " ".join(said(*both).split())
    assert "select_on_test is" in said("--select_on_test", table, "--run.validate_epochs", 0)
    assert "no caption list at" in said("--data.validation", lists / "none.json")
    assert "expected" in said("--data.validation", table, "--validate", "choices")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("validate", "table"), [("retrieval", "captions.json"), ("choices", "choices.json")])
def test_two_ranks_are_judged_as_one_sharded_too(validate: str, table: str, lists: Path, tmp_path: Path) -> None:
    """Three entries on two ranks, one a step: the second has a turn without any. The weights stay where they start."""
    more = ["--validate", validate, "--data.validation", lists / table, "--optim.lr", 1e-30, "--run.epochs", 1]
    assert main(arguments(lists, tmp_path / "one", *more)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "umt_fast"]
    command += arguments(
        lists, tmp_path / "two", *more, "--run.parallel", "fsdp", "--run.batch_size", 1, "--losses.vtm", 0
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        {k: v for k, v in judgments(tmp_path / name)[-1].items() if k.startswith("val")} for name in ("one", "two")
    )
    assert one and two == pytest.approx(one)
