"""Stage 2 on real files, killed without warning and run again: clips and images in turn, and packed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.process, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def caption_lists(tiny_list: Path) -> list[str]:
    """Arguments: eight captioned clips, six captioned images, a vocabulary."""
    folder = tiny_list.parent
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing", "moves"]
    (folder / "vocab.txt").write_text("\n".join(words))
    for number in range(3):
        Image.new("RGB", (50, 40), (200, 40 * number, 0)).save(folder / f"{number}.png")
    captions = ["a thing", "red", "a red thing moves", "thing moves"]
    videos = [{"video": f"video{n % 2}.mp4", "caption": captions[n % 4]} for n in range(8)]
    images = [{"image": f"{n % 3}.png", "caption": captions[n % 3]} for n in range(6)]
    for name, entries in (("videos", videos), ("images", images)):
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return ["--videos", f"{folder}/videos.json", "--images", f"{folder}/images.json", "--tokenizer", str(folder)]


def rows(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    names = ("step", "epoch", "loss", "vtc", "vtm", "mlm", "uta", "grad_norm")
    return [{name: row[name] for name in names} for row in found]


@pytest.mark.parametrize("co_training", ["alternating", "packed"])
def test_kill_and_resume_is_bit_exact(co_training: str, tmp_path: Path, caption_lists: list[str]) -> None:
    def run(out: Path) -> subprocess.Popen:
        train = [sys.executable, "-m", "umt_fast", "train", "tests/assets/tiny.py:long_captions", *caption_lists]
        train += ["--run.keep", "24"]
        return subprocess.Popen(
            [*train, "--co_training", co_training, "--run.out", str(out)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(out: Path) -> list[dict]:
        with run(out) as process:
            _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error[-3000:]
        return rows(out)

    whole = finish(tmp_path / "whole")
    killed = tmp_path / "killed"
    with run(killed) as process:
        end = time.monotonic() + 240
        while process.poll() is None and len(rows(killed)) < 7 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and 7 <= len(rows(killed)) < 24, "it ended before the kill"
    # Step 6 lies within an epoch, of four steps or of seven; what was saved later might not.
    for path in killed.glob("checkpoint-*.pt"):
        if int(path.stem[-8:]) > 6:
            path.unlink()
    assert finish(killed) == whole
    assert [row["step"] for row in whole] == list(range(1, 25))
    saved = torch.load(killed / "checkpoint-00000024.pt", weights_only=True)["trainer"]
    # Batches of two: four of clips and three of images in turn, or four of both.
    packed = co_training == "packed"
    assert (saved["clips_per_step"], saved["steps_per_epoch"]) == ((4, 4) if packed else (2, 7))
