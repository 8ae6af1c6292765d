"""A stage-2 run that goes on with other weights of its losses: they are named, as other rates are."""

import json
from pathlib import Path

import pytest

from umt_fast.__main__ import main

TINY = f"{Path(__file__).resolve().parents[1]}/assets/tiny.py"


@pytest.fixture
def captions(tiny_list: Path) -> Path:
    folder = tiny_list.parent
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]
    (folder / "vocab.txt").write_text("\n".join(words))
    rows = [{"video": f"video{number}.mp4", "caption": text} for number, text in enumerate(("a red thing", "a thing"))]
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def go(folder: Path, steps: int, *more: object) -> int:
    given = ["--videos", folder / "captions.json", "--tokenizer", folder, "--run.out", folder / "run"]
    return main([str(word) for word in ("train", f"{TINY}:captions", *given, "--run.max_steps", steps, *more)])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.5), (1.0, 0.0), (0.0, 1.0)], ids=["another weight", "off", "on"])
@pytest.mark.parametrize("loss", ["mlm", "uta"])
def test_weights_of_losses_may_change(
    loss: str, before: float, after: float, captions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert go(captions, 2, f"--losses.{loss}", before) == 0
    assert go(captions, 3, f"--losses.{loss}", after) == 0
    assert f"settings that are not those of checkpoint-00000002.pt: losses.{loss} {before} -> {after}" in caplog.text
    first, _, last = rows(captions)
    assert (loss in first, loss in last) == (before > 0, after > 0) and last["step"] == 3
