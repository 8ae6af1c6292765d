"""Which frames and pixels `eval` shows to a stage-2 model, and `train` in stage 2: those of the official readers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, Resize

from recipes import stage2
from umt_fast.__main__ import main
from umt_fast.config import Stage2Config
from umt_fast.data.decode.video import decode_frames
from umt_fast.data.loaders import reader as cpu
from umt_fast.models.video_text import VisionTower

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "thing"]


def test_stage_2_draws_from_intervals_by_default() -> None:
    assert {config.data.sampling for config in (Stage2Config(), stage2.b16(), stage2.l16())} == {"intervals"}


def test_eval_looks_at_the_middle_frames_of_the_first_seconds(tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 frames at 10 a second the first 7: intervals that begin at 0, 1, 3 and 5, and their middles, rounded down."""
    monkeypatch.chdir(REPOSITORY)
    folder = tiny_list.parent
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    entries = [{"video": f"video{number}.mp4", "caption": WORDS[-1 - number]} for number in range(2)]
    (folder / "captions.json").write_text(json.dumps(entries))
    run = ["--tokenizer", str(folder), "--run.out", str(folder / "run"), "--run.max_steps", "1"]
    assert main(["train", "tests/assets/tiny.py:captions", "--videos", str(folder / "captions.json"), *run]) == 0
    (checkpoint,) = (folder / "run").glob("checkpoint-*.pt")

    chosen, shown = [], []

    def remembering(path: str, choose: Callable[[int], np.ndarray], *rest: Any) -> np.ndarray:
        def remember(count: int) -> np.ndarray:
            chosen.append(choose(count).tolist())
            return choose(count)

        return decode_frames(path, remember, *rest)

    real = VisionTower.embed

    def seeing(self: VisionTower, video: torch.Tensor, *rest: Any, **more: Any) -> Any:
        shown.append(video)
        return real(self, video, *rest, **more)

    monkeypatch.setattr(cpu, "decode_frames", remembering)
    monkeypatch.setattr(VisionTower, "embed", seeing)
    options = ["--max_seconds", "0.7", "--workers", "0", "--batch_size", "2"]
    assert main(["eval", "retrieve", str(checkpoint), str(folder / "captions.json"), *options]) == 0
    assert chosen == [[0, 1, 3, 5]] * 2
    frames = decode_frames(folder / "video1.mp4", lambda count: np.array([0, 1, 3, 5]))
    pixels = Resize((32, 32), InterpolationMode.BICUBIC, antialias=False)(torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert len(shown) == 1 and torch.equal(shown[0][1], pixels.permute(0, 2, 3, 1))
