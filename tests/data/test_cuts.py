"""Videos that are cut in the middle are read as far as they go, and named."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.videos import write_video
from umt_fast.data.decode import cuts
from umt_fast.data.decode.video import announced_frames, decode_frames
from umt_fast.data.errors import DataError
from umt_fast.data.prepare import scan as scanning
from umt_fast.data.prepare.scan import scan
from umt_fast.data.prepare.shards import prepare, verify


def cut_video(path: Path, share: float = 0.6) -> Path:
    """A download that broke off: 40 frames in its head, and fewer behind it."""
    rng = np.random.default_rng(0)
    write_video(path, [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(40)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def spread(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, 4).astype(int)


def test_what_is_cut_off_is_told(tmp_path: Path) -> None:
    path = cut_video(tmp_path / "a.mkv")
    announced, held = announced_frames(path)
    assert announced == 40 and 10 < held < 35
    with cuts.noted() as found:
        decode_frames(path, spread)
    assert found == [f"{path}: {held} of 40 frames decode"]
    decode_frames(path, spread)  # nobody asks
    whole = cut_video(tmp_path / "b.mkv", 1.0)
    with cuts.noted() as found:
        decode_frames(whole, spread)
    assert not found and announced_frames(whole) == (40, 40)


def test_a_header_that_says_more_than_decodes(shared: Path) -> None:
    path = shared / "videos" / "corrupted.mp4"
    with cuts.noted() as found:
        decode_frames(path, spread)
    assert found[-1] == f"{path}: 28 of 50 frames decode"


def test_whole_files_of_every_kind_are_not_taken_for_cut(shared: Path, tmp_path: Path) -> None:
    """Other codecs, odd time stamps, rotated, trimmed: the one that is cut is told from all of these."""
    names = [path.name for path in sorted((shared / "videos").iterdir())]
    (tmp_path / "list.csv").write_text("".join(f"{shared}/videos/{name},0\n" for name in names))
    assert scan(tmp_path / "list.csv", tmp_path / "m.jsonl", workers=0)["cut"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_counts_and_names_them(
    workers: int, tmp_path: Path, tiny_list: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut_video(tmp_path / "cut.mkv")
    tiny_list.write_text(tiny_list.read_text().rstrip() + "\ncut.mkv,0\n")
    caplog.set_level("INFO")
    found = scan(tiny_list, tmp_path / "m.jsonl", workers=workers)
    assert found == {"good": 3, "bad": 0, "cut": 1, "resumed": 0}
    held = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[2])["num_frames"]
    assert f"cut clip: {tmp_path / 'cut.mkv'}: {held} of 40 frames decode" in caplog.text
    assert "1 of the good clips are cut in the middle" in caplog.text


def test_a_scan_that_goes_on_knows_them(tmp_path: Path, tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_video(tmp_path / "cut.mkv")
    tiny_list.write_text("cut.mkv,0\n" + tiny_list.read_text())
    probe = scanning._probe_one

    def killed(work: tuple) -> tuple:
        if work[0] == 1:
            raise KeyboardInterrupt
        return probe(work)

    monkeypatch.setattr(scanning, "_probe_one", killed)
    with pytest.raises(KeyboardInterrupt):
        scan(tiny_list, tmp_path / "m.jsonl", workers=0)
    monkeypatch.setattr(scanning, "_probe_one", probe)
    assert scan(tiny_list, tmp_path / "m.jsonl", workers=0) == {"good": 3, "bad": 0, "cut": 1, "resumed": 1}


def test_prepared_clips_that_are_cut_are_named(
    tmp_path: Path, tiny_list: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut_video(tmp_path / "cut.mkv")
    tiny_list.write_text("cut.mkv,0\n" + tiny_list.read_text())
    assert prepare(tiny_list, tmp_path / "out", workers=0)["good"] == 3
    assert f"cut clip: {tmp_path / 'cut.mkv'}: " in caplog.text and "1 clips are cut in the middle" in caplog.text
    assert verify(tmp_path / "out") == 3


def test_an_output_that_cannot_be(tiny_list: Path) -> None:
    with pytest.raises(DataError, match="x/m.jsonl cannot be written: .* give another --out"):
        scan(tiny_list, "/proc/x/m.jsonl", workers=0)
