"""run.tune of a whole run: what may be chosen, for what a choice holds, and that a run keeps the one it began with.

Milliseconds are given by a runner that measures nothing; one test lets the machine decide.
"""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.config import ConfigError, RunConfig, from_dict, to_dict
from umt_fast.engine import trainer as trainer_module
from umt_fast.engine import tune, tune_store
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.tune_process import Result
from umt_fast.tasks import task_of, tuning
from umt_fast.train import fit_objective

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = f"{REPOSITORY}/tests/assets/tiny.py"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def labels(config: Any, ranks: Ranks) -> list[str]:
    return [tune.label(settings) for settings in tuning.space(config, ranks)]


def without_attention(names: list[str]) -> set[str]:
    return {name for name in names if "attention" not in name}


@pytest.fixture
def every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes in all of them."""
    monkeypatch.setattr("kernels.quantized_backend", lambda precision, device: "any")


def test_what_may_be_chosen(every_precision: None) -> None:
    config, one, four = tiny.tiny(), Ranks(0, 1, GPU), Ranks(0, 4, GPU)
    ways = {"eager", "compiled", "CUDA graph", "compiled + CUDA graph"}
    ways |= {f"{way}, fused linear layers" for way in ways}
    assert labels(config, one)[0] == "eager" and without_attention(labels(config, one)) == ways
    expected = {f"{way}{of}" for way in ("eager", "compiled") for of in ("", ", fused linear layers")}
    assert without_attention(labels(config, four)) == expected
    assert without_attention(labels(config, Ranks(0, 1, CPU))) == {"eager", "compiled"}
    assert not any("cudnn" in name or "flash_attn" in name for name in labels(config, Ranks(0, 1, CPU)))
    config.run.parallel = "fsdp"
    assert without_attention(labels(config, four)) == {"eager", "eager, fused linear layers"}
    # The teacher's precision only where it is named.
    config = tiny.tiny()
    config.run.tune_axes = ("compile", "precision")
    expected = {f"{way}{of}" for way in ("eager", "compiled") for of in ("", ", teacher int8", ", teacher fp8")}
    assert set(labels(config, one)) == expected
    # Fine-tuning has no teacher.
    config = tiny.classes()
    config.run.tune_axes = ("compile", "precision")
    assert set(labels(config, one)) == {"eager", "compiled"}


def test_a_precision_the_device_has_not_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(precision: str, device: torch.device) -> str:
        if precision == "fp8":
            raise ValueError("needs Hopper")
        return "any"

    monkeypatch.setattr("kernels.quantized_backend", refuse)
    config = tiny.tiny()
    config.run.tune_axes = ("precision",)
    assert labels(config, Ranks(0, 1, GPU)) == ["eager", "eager, teacher int8"]


def test_what_is_set_stays(every_precision: None) -> None:
    config = tiny.tiny()
    config.run.compile = True
    found = labels(config, Ranks(0, 1, GPU))
    ways = {"compiled", "compiled + CUDA graph"}
    ways |= {f"{way}, fused linear layers" for way in ways}
    assert found[0] == "compiled" and without_attention(found) == ways
    config.run.tune_axes = ("attention",)
    assert without_attention(labels(config, Ranks(0, 1, GPU))) == {"compiled"}
    config.teacher.precision, config.run.tune_axes = "int8", ("precision",)
    assert labels(config, Ranks(0, 1, GPU)) == ["compiled, teacher int8"]


@pytest.mark.parametrize("variant", ["tiny", "classes", "captions"])
def test_the_key_is_of_shapes_and_model(variant: str) -> None:
    machine = {"device": "a card"}
    config = getattr(tiny, variant)()

    def path(change: Callable[[Any], None] = lambda config: None, world_size: int = 1) -> Path:
        changed = from_dict(type(config), to_dict(config))
        change(changed)
        return tune_store.path_of(tuning.key_of(changed, world_size, machine))

    def setting(place: str, value: object) -> Callable[[Any], None]:
        *sections, name = place.split(".")

        def change(config: Any) -> None:
            setattr(getattr(config, sections[0]) if sections else config, name, value)

        return change

    same = [
        ("run.out", "elsewhere"),
        ("run.seed", 5),
        ("run.epochs", 9),
        ("run.max_steps", 7),
        ("run.save_every", 2),
        ("run.tune_deadline", 9.0),
        ("data.train", "other.csv"),
        ("data.workers", 3),
        ("optim.lr", 1.0),
        ("init", "weights.pt"),
    ]
    other = [
        ("run.batch_size", 3),
        ("run.accumulate", 2),
        ("run.dtype", "bf16"),
        ("run.parallel", "fsdp"),
        ("run.compile", True),
        ("run.tune", "full"),
        ("run.tune_axes", ("compile",)),
        ("data.num_sample", 2),
        ("student.depth", 3),
        ("student.num_frames", 8),
        ("student.checkpoint_blocks", 1),
        ("student.drop_path", 0.0),
        ("optim.clip_grad", 1.0),
    ]
    if variant != "classes":
        other += [("teacher.precision", "int8"), ("mask", dataclasses.replace(config.mask, ratio=0.5))]
        same += [("teacher.weights", "clip.pt")]
    if variant == "captions":
        other += [("max_length", 5), ("images", ("list.json",)), ("co_training", "packed")]
        same += [("bert", "folder"), ("tokenizer", "folder")]
    assert all(path(setting(*change)) == path() for change in same)
    found = [path(), path(world_size=2), *(path(setting(*change)) for change in other)]
    assert len(set(found)) == len(found)
    assert tune_store.path_of(tuning.key_of(config, 1, {"device": "another"})) != path()


class Runner:
    """Takes the place of the process that measures: milliseconds by label; counts how often it was asked."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.asked = milliseconds, 0

    def __call__(self, request: dict, deadline: float) -> Result:
        self.asked += 1
        name = tune.label(request["candidate"])
        if name not in self.milliseconds:
            return Result(candidate=request["candidate"], status="crashed", detail="not asked for")
        return Result(
            candidate=request["candidate"], status="ok", ms=self.milliseconds[name], peak_gib=1.0, warm_up_s=1.0
        )


class Compiler:
    """Takes torch.compile's place, which takes a minute, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: torch.nn.Module) -> torch.nn.Module:
        self.calls += 1
        return module


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(trainer_module, "compiled", found)
    return found


def saved_settings(out: Path) -> dict:
    newest = sorted(out.glob("checkpoint-*.pt"))[-1]
    return torch.load(newest, weights_only=True)["config"]["run"]


def test_the_choice_is_used_saved_and_kept(
    tmp_path: Path,
    tiny_list: Path,
    cache: Path,
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    command = ["train", TINY, "--data.train", str(tiny_list), "--run.out", str(out), "--run.tune", "fast"]
    first = Runner(eager=20.0, compiled=10.0)
    monkeypatch.setattr(tuning, "run_candidate", first)
    with caplog.at_level(logging.INFO, "umt_fast"):
        assert main([*command, "--run.max_steps", "1"]) == 0
    assert first.asked >= 2 and compiler.calls == 1
    assert "run.tune chose compiled: 10.00 ms per step" in caplog.text
    assert saved_settings(out)["compile"] is True and saved_settings(out)["tune"] == "fast"
    assert json.loads((out / "tune.json").read_text())["label"] == "compiled"

    # Without the cache, on a machine that would now choose otherwise.
    shutil.rmtree(cache)
    second = Runner(eager=1.0, compiled=10.0)
    monkeypatch.setattr(tuning, "run_candidate", second)
    caplog.clear()
    with caplog.at_level(logging.INFO, "umt_fast"):
        assert main([*command, "--run.max_steps", "2"]) == 0
    assert second.asked == 0 and compiler.calls == 2
    assert f"run.tune: compiled, as in {out}/checkpoint-00000001.pt" in caplog.text

    # With a cache that says otherwise.
    assert main([*command[:-3], str(tmp_path / "other"), "--run.tune", "fast"]) == 0
    assert second.asked >= 2 and compiler.calls == 2 and saved_settings(tmp_path / "other")["compile"] is False
    assert list(cache.rglob("*.json"))
    assert main([*command, "--run.max_steps", "3"]) == 0
    assert compiler.calls == 3 and saved_settings(out)["compile"] is True

    # A new run of the same kind asks nobody.
    third = Runner()
    monkeypatch.setattr(tuning, "run_candidate", third)
    assert main([*command[:-3], str(tmp_path / "third"), "--run.tune", "fast"]) == 0
    assert third.asked == 0 and saved_settings(tmp_path / "third")["compile"] is False


def test_a_run_that_was_not_tuned_is_tuned_when_continued(
    tmp_path: Path, tiny_list: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", TINY, "--data.train", str(tiny_list), "--run.out", str(tmp_path / "run")]
    runner = Runner(eager=20.0, compiled=10.0)
    monkeypatch.setattr(tuning, "run_candidate", runner)
    assert main([*command, "--run.max_steps", "1"]) == 0
    assert runner.asked == 0 and not (tmp_path / "run" / "tune.json").exists()
    assert main([*command, "--run.max_steps", "2", "--run.tune", "fast"]) == 0
    assert runner.asked >= 2 and compiler.calls == 1


def test_a_choice_this_machine_cannot_have_is_made_anew(
    tmp_path: Path,
    tiny_list: Path,
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    command = ["train", TINY, "--data.train", str(tiny_list), "--run.out", str(out), "--run.tune", "fast"]
    monkeypatch.setattr(tuning, "run_candidate", Runner(eager=1.0, compiled=2.0))
    assert main([*command, "--run.max_steps", "1"]) == 0
    (newest,) = out.glob("checkpoint-*.pt")
    content = torch.load(newest, weights_only=True)
    content["config"]["run"]["cuda_graph"] = True  # as a run on a GPU saves it
    torch.save(content, newest)
    assert main([*command, "--run.max_steps", "2"]) == 0
    assert "cannot go on with CUDA graph" in caplog.text and "needs a GPU" in caplog.text
    assert saved_settings(out)["cuda_graph"] is False


def test_all_checkpoints_damaged_is_known_before_anything_is_timed(
    tmp_path: Path, tiny_list: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["train", TINY, "--data.train", str(tiny_list), "--run.out", str(tmp_path / "run"), "--run.tune", "fast"]
    runner = Runner(eager=1.0, compiled=2.0)
    monkeypatch.setattr(tuning, "run_candidate", runner)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-00000001.pt").write_bytes(b"cut")
    assert main(command) == 2
    assert runner.asked == 0 and "none of the 1 checkpoints" in capsys.readouterr().err


def test_an_objective_that_is_built_already_is_refused(tmp_path: Path) -> None:
    config = tiny.tiny()
    config.run.tune, config.run.out = "fast", str(tmp_path)
    with pytest.raises(ConfigError, match="run.tune is 'fast', and this objective is built already"):
        fit_objective(config, torch.nn.Linear(1, 1))


def test_a_deadline_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="run.tune_deadline is 0"):
        RunConfig(tune_deadline=0)


RANKS = """
import json, os, sys, time
from tests.assets import tiny
from umt_fast.tasks import tuning
from umt_fast.engine import tune, tune_store
from umt_fast.engine.distributed import distributed_run
from umt_fast.engine.tune_process import Result

out, what = sys.argv[1:3]
rank = int(os.environ["RANK"])

def run(request, deadline):
    assert rank == 0, "the other rank measures too"
    time.sleep(1.0)
    fast = request["candidate"]["compile"]
    return Result(candidate=request["candidate"], status="ok", ms=1.0 if fast else 2.0, peak_gib=1.0, warm_up_s=0.0)

tuning.run_candidate = run
pauses = []
gather = tune.gather
tune.gather = lambda value: pauses.append(value) or gather(value)
settle, on_first = tuning.settle, tune.on_first_rank
tune.on_first_rank = lambda work, ranks: on_first(work, ranks, pause=0.2)
if what == "mixed":
    tune_store.device_name = lambda device: f"card {rank}"
if what == "fails":
    tune_store.machine = lambda device: 1 / 0
config = tiny.tiny()
config.run.out, config.run.tune = out, "fast"
with distributed_run(config.run) as ranks:
    try:
        settle(config, ranks)
        said = f"compile {config.run.compile}, met {len(pauses) > 4}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
open(f"{out}/{what}{rank}", "w").write(said)
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("same", "compile True, met True"),
        (
            "mixed",
            "ConfigError: run.tune measures one device for all ranks, and these have card 0, card 1; set --run.tune off",
        ),
        ("fails", "ZeroDivisionError"),
    ],
)
def test_ranks_agree(what: str, expected: str, tmp_path: Path) -> None:
    """One rank measures while the others keep meeting it; its choice, or its error, is everybody's."""
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*launch, str(program), str(tmp_path), what],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [(tmp_path / f"{what}{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith(expected)


@pytest.mark.parametrize("variant", ["classes", "captions", "packed"])
def test_every_task_has_a_case(variant: str) -> None:
    """What is timed has the loaders' fields and shapes, and its gate is as exact as it claims: two runs are the same."""
    from umt_fast.engine.tune_measure import difference, not_finite, observe

    config = tiny.captions() if variant == "packed" else getattr(tiny, variant)()
    config.data.num_sample = 2
    if variant != "classes":
        config.videos, config.images = ("clips.json",), ("pictures.json",)
        config.co_training = "packed" if variant == "packed" else "alternating"
    record, task = to_dict(config), task_of(config).name
    case = tuning.build_case(task, record, exact=True)
    frames = [batch["video"].shape for batch in case.batches]
    clips, images = (4, 4, 32, 32, 3), (4, 1, 32, 32, 3)
    assert frames == ([clips, images] if variant == "captions" else [clips])
    assert ("image_video" in case.batches[0]) == (variant == "packed")
    assert case.batches[0]["index"].tolist() == [0, 0, 1, 1] * (1 + (variant == "packed"))
    seen = observe(case)
    assert not not_finite(seen) and len(seen) == len(frames)
    assert not difference(seen, observe(tuning.build_case(task, record, exact=True)), "fp32")
    # Other weights are another step: the gate would see it.
    changed = to_dict(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1)))
    assert difference(seen, observe(tuning.build_case(task, changed, exact=True)), "bf16")


@pytest.mark.process
@pytest.mark.compile
@pytest.mark.slow
def test_the_machine_decides(tmp_path: Path, tiny_list: Path) -> None:
    """Nothing in anything's place: children measure, one is chosen, trained with and saved."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "umt_fast", "train", TINY, "--data.train", str(tiny_list), "--run.out", str(out)]
    done = subprocess.run(
        [*command, "--run.tune", "fast", "--run.tune_axes", "compile"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "tune.json").read_text())
    passed = {tune.label(row["candidate"]): row for row in found["candidates"] if row["status"] == "ok"}
    assert "eager" in passed, found["candidates"]
    assert f"run.tune chose {found['label']}" in done.stderr
    assert saved_settings(out)["compile"] is found["choice"]["compile"]
    # Compiling needs a C++ compiler, which a machine may lack; where there is one, the step must pass the gate.
    if shutil.which("g++") or shutil.which("clang++"):
        assert "compiled" in passed, found["candidates"]
