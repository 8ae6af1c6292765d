"""run.tune's choice among candidates whose results are given: what wins, what is said, what is kept and for whom."""

import json
import logging
from pathlib import Path

import pytest
import torch

from umt_fast.engine import tune, tune_store
from umt_fast.engine.tune_process import Result

EAGER = {"compile": False, "cuda_graph": False}
COMPILED = {"compile": True, "cuda_graph": False}
GRAPH = {"compile": False, "cuda_graph": True}
BOTH = {"compile": True, "cuda_graph": True}
EVERY = [EAGER, COMPILED, BOTH, GRAPH]
KEY = {"machine": {"device": "a card", "driver": "1.2"}, "shapes": [4, 8]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Runner:
    """Answers as it was told: milliseconds, or (status, detail); notes what it was asked."""

    def __init__(self, **answers: float | tuple[str, str]) -> None:
        self.answers = {name.replace("_", " "): answer for name, answer in answers.items()}
        self.asked: list[str] = []

    def __call__(self, candidate: tune.Candidate) -> Result:
        name = tune.label(candidate).replace(" + CUDA graph", " graph").replace("CUDA graph", "graph")
        self.asked.append(name)
        answer = self.answers[name]
        if isinstance(answer, tuple):
            return Result(candidate=candidate, status=answer[0], detail=answer[1])
        return Result(candidate=candidate, status="ok", ms=answer, peak_gib=1.5, warm_up_s=3.0)


def choose(tmp_path: Path, runner: Runner, candidates: list[tune.Candidate] = EVERY) -> tune.Candidate:
    (tmp_path / "run").mkdir(exist_ok=True)
    return tune.choose(candidates, KEY, tmp_path / "run", runner)


def test_whatever_fails_is_named_and_the_next_best_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner(
        eager=20.0,
        compiled=("wrong", "loss is 3, eager 2"),
        compiled_graph=("hung", "no end within 600 s"),
        graph=30.0,
    )
    with caplog.at_level(logging.INFO, "umt_fast"):
        assert choose(tmp_path, runner) == EAGER
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        "WARNING: run.tune leaves out compiled, wrong: loss is 3, eager 2",
        "WARNING: run.tune leaves out compiled + CUDA graph, hung: no end within 600 s",
    ]
    rows = {row.split("  ")[1].strip(): row for row in caplog.text.splitlines() if row.startswith("  ")}
    assert rows["eager"].split()[1:] == ["20.00", "1.50", "3.0", "chosen"]
    assert rows["CUDA graph"].split()[2:] == ["30.00", "1.50", "3.0", "ok"]
    assert rows["compiled + CUDA graph"].split()[-1] == "hung"
    assert "run.tune chose eager: 20.00 ms per step (measured now)" in caplog.text
    written = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert written["choice"] == EAGER and written["label"] == "eager"
    assert [row["status"] for row in written["candidates"]] == ["ok", "wrong", "hung", "ok"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"eager": 20.0, "compiled": 10.0, "compiled_graph": 8.0, "graph": 12.0}, BOTH),
        ({"eager": 20.0, "compiled": 10.0, "compiled_graph": 9.9, "graph": 12.0}, COMPILED),  # a lead of noise
        ({"eager": 20.0, "compiled": 10.0, "compiled_graph": ("out of memory", "x"), "graph": 12.0}, COMPILED),
        ({"eager": ("out of memory", "x"), "compiled": 10.0, "compiled_graph": 11.0, "graph": 12.0}, COMPILED),
        (
            {"eager": ("crashed", "x"), "compiled": ("crashed", "x"), "compiled_graph": ("hung", "x"), "graph": 12.0},
            GRAPH,
        ),
    ],
)
def test_the_fastest_that_passes(answers: dict, expected: tune.Candidate, tmp_path: Path) -> None:
    assert choose(tmp_path, Runner(**answers)) == expected


def test_nothing_passes(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on as configured; a machine that was broken for a day is asked again."""
    bad = ("crashed", "no driver")
    with caplog.at_level(logging.INFO, "umt_fast"):
        assert choose(tmp_path, Runner(eager=bad, compiled=bad, compiled_graph=bad, graph=bad)) == EAGER
    assert "run.tune: eager, as configured: no candidate passed" in caplog.text
    assert not list(cache.rglob("*.json")) and (tmp_path / "run" / "tune.json").exists()


def test_the_cache_answers_once_it_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner(eager=20.0, compiled=10.0, compiled_graph=12.0, graph=13.0)
    choose(tmp_path, runner)
    asked_then = list(runner.asked)
    (tmp_path / "run" / "tune.json").unlink()
    with caplog.at_level(logging.INFO, "umt_fast"):
        assert choose(tmp_path, runner) == COMPILED
    assert runner.asked == asked_then and len(asked_then) == 4
    assert (
        "run.tune chose compiled: 10.00 ms per step; eager, as configured, 20.00 ms (measured earlier)" in caplog.text
    )
    written = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert written["source"] == "measured earlier" and len(written["candidates"]) == 4
    # What is not to be had here any more is no choice.
    assert choose(tmp_path, runner, [EAGER, GRAPH]) == GRAPH


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"key": 1}',
        "\x00\x01",
        '{"choice": {"compile": true, "cuda_graph": true}}',
        "[" * 100_000,
    ],
    ids=["empty", "cut", "list", "null", "another key", "binary", "no key", "deep"],
)
def test_a_damaged_cache_is_named_and_replaced(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner(eager=20.0, compiled=10.0, compiled_graph=12.0, graph=13.0)
    path = tune_store.path_of(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    caplog.clear()
    assert choose(tmp_path, runner) == COMPILED and len(runner.asked) == 4
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in line and "measuring anew" in line and "\n" not in line
    assert json.loads(path.read_text())["choice"] == COMPILED
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no half-written file beside it


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune_store.write(KEY, COMPILED, [])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    tune_store.write(KEY, EAGER, [])  # a warning, no error
    assert tune_store.read(KEY)["choice"] == COMPILED
    assert len(list(tune_store.path_of(KEY).parent.iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    runner = Runner(eager=20.0, compiled=10.0, compiled_graph=12.0, graph=13.0)
    assert choose(tmp_path, runner) == COMPILED
    assert "set UMT_CACHE to a folder that can be written" in caplog.text


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tune_store.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("UMT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tune_store.cache_folder() == Path("/somewhere/umt_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/her")
    assert tune_store.cache_folder() == Path("/home/her/.cache/umt_fast")


def test_fast_takes_few_and_full_takes_all() -> None:
    space = [
        {"compile": c, "cuda_graph": g, "attention": a, "precision": p}
        for c in (False, True)
        for g in (False, True)
        for a in ("auto", "cudnn", "math")
        for p in ("native", "fp8")
    ]
    given = space[0]
    labels = [tune.label(candidate) for candidate in tune.shortlist(space, given, "fast")]
    assert labels == ["eager", "compiled", "compiled + CUDA graph", "compiled + CUDA graph, teacher fp8"]
    every = tune.shortlist(space, given, "full")
    assert every[0] == given and len(every) == 24 and all(candidate in every for candidate in space)
    # Several ranks: no graphs.
    space = [candidate | {"precision": "native"} for candidate in space if not candidate["cuda_graph"]]
    space = [candidate for number, candidate in enumerate(space) if candidate not in space[:number]]
    labels = [tune.label(candidate) for candidate in tune.shortlist(space, given, "fast")]
    assert labels == ["eager", "compiled", "compiled, attention cudnn", "compiled, attention math"]
    # What the user has compiled stays compiled and comes first.
    fixed = [candidate for candidate in EVERY if candidate["compile"]]
    assert tune.shortlist(fixed, COMPILED, "fast") == [COMPILED, BOTH]


def test_the_key_names_driver_and_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        total_memory = 80

    driver = tmp_path / "driver"
    driver.write_text("570.1\n")
    monkeypatch.setattr(tune_store, "_DRIVER_FILES", (str(tmp_path / "none"), str(driver)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    card = torch.device("cuda", 0)
    found = [tune_store.path_of(tune_store.machine(card))]
    assert tune_store.machine(card)["driver"] == "570.1" and tune_store.machine(card)["device"] == "NVIDIA H100"

    def differs() -> None:
        path = tune_store.path_of(tune_store.machine(card))
        assert path not in found
        found.append(path)

    driver.write_text("580.2\n")
    differs()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    differs()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    differs()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    differs()
    monkeypatch.setattr("umt_fast.__version__", "9.9")
    differs()
    monkeypatch.setattr(tune_store, "code_hash", lambda: "other")
    differs()
    monkeypatch.setattr(tune_store, "_version", lambda library: "9" if library == "triton" else "none")
    differs()


def test_the_code_is_read_line_by_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "kernel.py"
    file.write_text("a = 1\n")
    before = tune_store.code_hash()
    assert tune_store.code_hash() == before
    file.write_text("a = 2\n")
    assert tune_store.code_hash() != before
