"""Files of a manifest against their checksums."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umt_fast.__main__ import main
from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.prepare.scan import scan, verify
from umt_fast.data.sources.lists import Clip, read_list


@pytest.fixture
def manifest(tiny_list: Path) -> Path:
    path = tiny_list.with_name("tiny.jsonl")
    scan(tiny_list, path, workers=0)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_one_changed_bit_is_found(workers: int, manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert verify(manifest, workers=workers) == 2
    damaged = manifest.with_name("video1.mp4")
    state = damaged.stat()
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    os.utime(damaged, ns=(state.st_atime_ns, state.st_mtime_ns))  # size and time tell nothing
    with pytest.raises(DataError, match=r"1 of the 2 clips .*video1.mp4: other bytes than scanned; fetch them again"):
        verify(manifest, workers=workers)
    assert "bad clip" in caplog.text and "video0.mp4" not in caplog.text
    manifest.with_name("video0.mp4").unlink()
    with pytest.raises(DataError, match=r"2 of the 2 clips .*video0.mp4: No such file"):
        verify(manifest, workers=workers)


def test_folders_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in (1, 2, 3):
        Image.fromarray(np.full((20, 30, 3), 50 * number, np.uint8)).save(tmp_path / "a" / f"{number}.png")
    (tmp_path / "list.csv").write_text("a,3,0\n")
    data = DataConfig(frame_pattern="{}.png")
    scan(tmp_path / "list.csv", tmp_path / "m.jsonl", workers=0, data=data)
    assert verify(tmp_path / "m.jsonl", workers=0, data=data) == 1
    Image.fromarray(np.full((20, 30, 3), 51, np.uint8)).save(tmp_path / "a" / "2.png")
    with pytest.raises(DataError, match="1 of the 1 clips"):
        verify(tmp_path / "m.jsonl", workers=0, data=data)


def test_what_has_no_checksums_is_refused(manifest: Path, tiny_list: Path) -> None:
    with pytest.raises(DataError, match="no checksum for 2 of 2 clips; write a manifest"):
        verify(tiny_list, workers=0)
    first, _ = read_list(manifest, DataConfig())
    manifest.write_text(first.to_json() + "\n" + Clip(path=first.path).to_json() + "\n")
    with pytest.raises(DataError, match="no checksum for 1 of 2 clips"):
        verify(manifest, workers=0)


def test_the_command(manifest: Path, tiny_list: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["scan", str(manifest), "--verify", "--workers", "0"]) == 0
    manifest.with_name("video1.mp4").write_bytes(b"")
    assert main(["scan", str(manifest), "--verify", "--workers", "0"]) == 2
    assert "1 of the 2 clips" in capsys.readouterr().err
    for arguments in ([], ["--verify", "--out", str(manifest.with_name("other"))]):
        assert main(["scan", str(tiny_list), *arguments]) == 2
        assert "scan needs either --out MANIFEST" in capsys.readouterr().err
