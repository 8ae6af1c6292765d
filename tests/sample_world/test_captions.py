"""Choices of the sample world: one right text, the others wrong by a word; and what the command asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from umt_fast.sample_world import captions
from umt_fast.sample_world.world import draw_scene


def test_every_wrong_choice_is_wrong_by_one_word() -> None:
    rng, places = np.random.default_rng(0), set()
    for number in range(40):
        scene = draw_scene(3, number)
        texts, answer = captions.options_of(scene, rng)
        places.add(answer)
        assert texts[answer] == scene.caption and len(set(texts)) == 5
        right, wrong_at = scene.caption.split(), []
        for text in texts[:answer] + texts[answer + 1 :]:
            changed = [at for at, (one, other) in enumerate(zip(right, text.split(), strict=True)) if one != other]
            assert len(changed) == 1
            wrong_at += changed
        assert len(set(wrong_at)) == 4  # color, pattern, direction and background, each once
    assert places == set(range(5))


def test_the_command_asks_for_stage_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert captions.main([str(tmp_path)]) == 2
    assert "has no stage 2; run the quickstart" in capsys.readouterr().err
    assert captions.main([]) == 2 and "usage" in capsys.readouterr().out
