"""What a run that continues may change: other weights to begin from are refused, other settings are named."""

import logging
import shutil
from pathlib import Path

import pytest

from tests.assets import tiny
from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.train import train


def run(out: Path, table: Path, steps: int, **changes: object) -> Path:
    config = tiny.tiny()
    config.data.train, config.run.out, config.run.max_steps = str(table), str(out), steps
    for name, value in changes.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section) if key else config, key or section, value)
    return train(config)


def test_other_weights_to_begin_from_are_refused(tmp_path: Path, tiny_list: Path) -> None:
    first = run(tmp_path / "first", tiny_list, 1)
    weights = str(next(first.glob("checkpoint-*.pt")))
    with pytest.raises(
        CheckpointError, match="began from no weights .* leave init out to continue it, or start a new run.out"
    ):
        run(tmp_path / "first", tiny_list, 2, init=weights)
    run(tmp_path / "second", tiny_list, 1, init=weights)
    run(tmp_path / "second", tiny_list, 2)  # left out, the run goes on
    run(tmp_path / "second", tiny_list, 3, init=weights)  # and it is still known what it began from
    other = shutil.copy(weights, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"init is {other}, but the run of .* began from {weights}"):
        run(tmp_path / "second", tiny_list, 4, init=str(other))


def test_settings_that_changed_are_named(tmp_path: Path, tiny_list: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "run", tiny_list, 1)
    caplog.set_level(logging.INFO)
    run(tmp_path / "run", tiny_list, 2)
    assert "settings that are not those" not in caplog.text
    run(tmp_path / "run", tiny_list, 3, optim__lr=0.5)
    assert "settings that are not those of checkpoint-00000002.pt: optim.lr" in caplog.text
    assert "-> 0.5" in caplog.text
