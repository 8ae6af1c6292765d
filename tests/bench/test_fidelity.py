"""`bench fidelity` on a list of videos."""

import json
from pathlib import Path

import pytest

from umt_fast.__main__ import main


def test_fidelity_on_videos(tiny_list: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["bench", "fidelity", "--model", "tiny", "--device", "cpu", "--batch_size", "1", "--batches", "1"]
    code = main([*arguments, "--videos", str(tiny_list)])
    captured = capsys.readouterr()
    if code == 2 and "VNNI" in captured.err:
        pytest.skip(captured.err)
    assert code == 0 and json.loads(captured.out)["mask_overlap"] > 0.5
    assert main([*arguments[:-1], "3", "--videos", str(tiny_list)]) == 2
    said = capsys.readouterr().err
    assert "batches is 3, but" in said and "fills 2 of batch_size 1" in said
