"""The whole quickstart in small: every part runs, leaves its figures, and is not done twice."""

import json
from pathlib import Path

import pytest

from umt_fast import recipe
from umt_fast.config import ConfigError
from umt_fast.sample_world import classes, quickstart


@pytest.mark.slow
def test_every_part_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = recipe.load

    def shortened(page: str):
        config = load(page)
        config.run.max_steps = 2
        return config

    monkeypatch.setattr(quickstart, "WORLD", {"train": 48, "test": 24, "labeled": 24})
    monkeypatch.setattr(quickstart, "CLIP_STEPS", 3)
    monkeypatch.setattr(recipe, "load", shortened)
    report = quickstart.run(tmp_path, seed=1, stage2=True)
    results = json.loads((tmp_path / "results.json").read_text())

    assert results["labeled clips"]["good"] == 24 and results["captioned clips"]["good"] == 48
    for scores in (results["comparison"]["motion"], results["comparison"]["scene"]):
        assert set(scores) == {"pretrained", "scratch", "teacher"} and all(0 <= score <= 1 for score in scores.values())
    assert results["foreground"]["ratio"] > 0
    assert {"dual_t2v_r1", "match_v2t_r1"} <= set(results["retrieval"])
    page = report.read_text()
    assert all(word in page for word in ("pre-trained", "re-ranked", "foreground", "data:image/png"))

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(written) >= 8, "stage 1, stage 2 and six comparisons leave a checkpoint each"

    def begun(*arguments: object) -> None:
        raise AssertionError("a finished comparison is begun again")

    monkeypatch.setattr(quickstart.Comparison, "begin", begun)
    quickstart.run(tmp_path, seed=1, stage2=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == written
    assert json.loads((tmp_path / "results.json").read_text()) == results

    scores = classes.run(tmp_path)
    for label in classes.CLASSES:
        assert set(scores[label]) == {*classes.PROBES, *classes.TUNED}
        tuned = [scores[label][variant] for variant in classes.TUNED]
        assert all(set(views) == set(classes.VIEWS) for views in tuned)
        flat = [scores[label][kind] for kind in classes.PROBES] + [score for views in tuned for score in views.values()]
        assert all(0 <= score <= 1 for score in flat)
    assert "| attentive probe | " in classes.table(scores)
    assert len(list((tmp_path / "classes").glob("*/checkpoint-*.pt"))) == 4


def test_classes_ask_for_a_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert classes.main(tmp_path) == 2
    assert "holds no quickstart; run `bash recipes/quickstart.sh" in capsys.readouterr().err
    quickstart.Results(tmp_path, 3).part("world", dict)
    assert classes.main(tmp_path) == 2
    assert "has not pre-trained yet" in capsys.readouterr().err


def test_results_are_replaced_as_a_whole_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart.Results(tmp_path, 3).part("one", lambda: {"value": 1})
    before = (tmp_path / "results.json").read_text()

    def full(*arguments: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk full"):
            quickstart.Results(tmp_path, 3).part("two", lambda: {"value": 2})
    assert (tmp_path / "results.json").read_text() == before
    assert quickstart.Results(tmp_path, 3).values["one"]["value"] == 1
    with pytest.raises(ConfigError, match="of seed 3; give another --out"):
        quickstart.Results(tmp_path, 4)
    (tmp_path / "results.json").write_text(before[:20])
    with pytest.raises(ConfigError, match="results.json is damaged; delete it"):
        quickstart.Results(tmp_path, 3)
