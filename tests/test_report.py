"""The report: self-contained, complete, and only about what is there."""

import base64
import json
import os
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from umt_fast.config import ConfigError
from umt_fast.report import found_picture, mask_picture, write_report


def rows(count: int) -> str:
    shared = {
        "clips_per_s": 2.0,
        "data_wait": 0.1,
        "mfu": 0.3,
        "memory_gib": 1.5,
        "bad_files": 1,
        "lr": 1e-3,
        "epoch": 0,
    }
    return "".join(
        json.dumps({"step": step, "loss": 2 / step, "loss_layer_0": 1 / step, **shared}) + "\n"
        for step in range(1, count)
    )


def curves(page: str) -> list[str]:
    """The SVG figures of a page."""
    return [base64.b64decode(found).decode() for found in re.findall(r'data:image/svg\+xml;base64,([^"]+)"', page)]


def heights(svg: str, name: str) -> list[float]:
    """How far down the page each point of a named line lies."""
    path = re.search(rf'<g id="{name}">\s*<path d="([^"]+)"', svg)[1]
    return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]


def test_a_plain_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(rows(40) + '{"step": 40, "lo')
    page = write_report(tmp_path).read_text()
    HTMLParser().feed(page)
    assert len(curves(page)) == 2 and "Throughput" in page and "Kept tokens" not in page and "motion" not in page
    found = heights(curves(page)[0], "loss")
    assert len(found) == 39 and found == sorted(found), "a falling loss must go down the page"
    # By 2 / step, the loss falls from its first point to the second by half of its whole way and more.
    assert (found[1] - found[0]) / (found[-1] - found[0]) == pytest.approx((2 - 2 / 2) / (2 - 2 / 39), abs=1e-4)
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_equal_files_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at another time, in a process that has drawn before, and with settings of matplotlib's own left around."""
    import matplotlib

    (tmp_path / "metrics.jsonl").write_text(rows(40))
    first = write_report(tmp_path).read_bytes()
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", None)
    assert write_report(tmp_path).read_bytes() == first
    assert all("dc:date" not in svg for svg in curves(first.decode()))


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'umt_fast\[report\]'"):
        write_report(tmp_path)


def test_a_quickstart(tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "metrics.jsonl").write_text(rows(5))
    scores = {"pretrained": 0.61, "scratch": 0.42, "teacher": 0.25, "seconds": 3.0}
    shares = {"semantic": 0.2, "random": 0.1, "tube": 0.1, "ratio": 2.0, "seconds": 1.0}
    (tmp_path / "results.json").write_text(
        json.dumps({"seed": 0, "comparison": {"motion": scores, "scene": scores, "seconds": 9.0}, "foreground": shares})
    )
    kept = np.tile(np.array([0, 5]), (2, 1))
    np.savez(tmp_path / "masks.npz", side=2, video=np.zeros((2, 2, 8, 8, 3), np.uint8), semantic=kept, random=kept)
    page = write_report(tmp_path).read_text()
    assert "61" in page and "2.00 times the foreground" in page
    assert page.count("data:image/png;base64,") == 4


def test_a_tuned_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(rows(5))
    measured = {"ms": 12.5, "peak_gib": 3.25, "warm_up_s": 40.0}
    found = [
        {"candidate": {"compile": False}, "status": "wrong", "detail": "loss < 0"} | dict.fromkeys(measured),
        {"candidate": {"compile": True}, "status": "ok", "detail": "", **measured},
    ]
    content = {"choice": {"compile": True}, "label": "compiled", "source": "measured now", "candidates": found}
    (tmp_path / "tune.json").write_text(json.dumps(content))
    page = write_report(tmp_path).read_text()
    assert "run.tune chose: compiled (measured now)" in page and "12.5" in page and "loss &lt; 0" in page
    (tmp_path / "tune.json").write_text('{"label": "x"')
    with pytest.raises(ConfigError, match="tune.json is damaged"):
        write_report(tmp_path)


def test_odd_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = [json.loads(line) for line in rows(9).splitlines()]
    odd = [{"step": 9}, {"step": 10, "loss": float("nan"), "mfu": float("inf")}, {"loss": 1.0}, [1], {"step": "11"}]
    text = "".join(json.dumps(row) + "\n" for row in whole[:4] + odd + whole[4:])
    (tmp_path / "metrics.jsonl").write_text(text + "[" * 100_000 + '\n{"step": 12, "lo')
    page = write_report(tmp_path).read_text()
    assert len(heights(curves(page)[0], "loss")) == 8 and "nan" not in page
    assert "left out 5 lines" in caplog.text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    page = write_report(tmp_path).read_text()
    assert "not logged" in page and not curves(page)


@pytest.mark.parametrize(
    "content",
    [
        '{"seed": 0, "compar',
        "[]",
        "",
        '{"comparison": {"motion": {}}}',
        "[" * 100_000,
        '{"retrieval": {"clips": 0, "captions": 0}}',
    ],
)
def test_damaged_results_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match="results.json is damaged.*; delete it"):
        write_report(tmp_path)


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(rows(5))
    (tmp_path / "masks.npz").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(ConfigError, match="masks.npz is damaged"):
        write_report(tmp_path)


def test_kept_patches_are_the_ones_left_bright() -> None:
    video = np.full((2, 8, 8, 3), 60, np.uint8)
    picture = np.asarray(mask_picture(video, np.array([0, 7]), 2, scale=1))
    below = picture[10:]
    assert (below[:4, :4] == 60).all() and (below[:4, 4:8] != 60).all()
    assert (below[4:8, 14:18] == 60).all() and (below[:4, 10:14] != 60).all()


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to report"):
        write_report(tmp_path)


def test_found_clips_are_framed_by_whether_they_are_right(tmp_path: Path) -> None:
    videos = np.full((2, 3, 3, 6, 6, 3), 128, np.uint8)
    right = np.array([[True, False, False], [False, False, False]])
    np.savez(tmp_path / "retrieval.npz", caption=np.array(["a <red> thing", "other"]), right=right, video=videos)
    names = [f"{head}_{side}_{k}" for head in ("dual", "match") for side in ("t2v", "v2t") for k in ("r1", "r5", "r10")]
    figures = dict.fromkeys(names, 0.25) | {
        f"{h}_{s}_median_rank": 7 for h in ("dual", "match") for s in ("t2v", "v2t")
    }
    record = {"retrieval": figures | {"clips": 50, "captions": 50, "seconds": 1.0}}
    (tmp_path / "results.json").write_text(json.dumps(record))
    page = write_report(tmp_path).read_text()
    HTMLParser().feed(page)
    assert page.count("data:image/png") == 2 and "a &lt;red&gt; thing" in page and "2.00%" in page
    picture = np.asarray(found_picture(videos[0], right[0], 1))
    assert picture.shape == (10, 3 * 22 + 2 * 4, 3)
    assert picture[0, 0, 1] > picture[0, 0, 0] and picture[0, 30, 0] > picture[0, 30, 1]
    assert (picture[5, 5] == 128).all()
