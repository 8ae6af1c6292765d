"""The planner's arithmetic, by hand-computed cases."""

import json
from pathlib import Path

import pytest

from umt_fast import recipe
from umt_fast.__main__ import main
from umt_fast.config import ConfigError
from umt_fast.plan import PlanOptions, Rates, Work, project, report, work_of

# 1 GFLOP, half of it backward, and 1 MB per clip; a million parameters trained and two million frozen.
WORK = Work(flops=1e9, backward=0.5, trained=1_000_000, frozen=2_000_000, activation_bytes=1e6)
# A clip takes a millisecond.
RATES = Rates(compute=1e12, bandwidth=28e9, link=1e9, decode=1e4, memory=1e9)


def planned(rates: Rates = RATES, **changes: object):
    values = {"gpus": 2, "clips": 10, "micro_steps": 1, "decoded": 10, "sharded": False, "half": True}
    return project(WORK, rates, **(values | changes))


def test_each_part_of_a_step() -> None:
    found = planned()
    # 28 bytes of each parameter at 28 GB/s; 8 bytes of half of them at 1 GB/s, hidden by 5 ms of backward.
    assert found.seconds == pytest.approx({"matmul": 10e-3, "memory": 1e-3, "network": 0.0, "decode": 1e-3})
    assert found.network_all == pytest.approx(4e-3)
    assert found.step == pytest.approx(11e-3) and found.bound == "matmul"
    assert found.memory_bytes == 16e6 + 4e6 + 10e6 and found.fits


def test_one_gpu_sends_nothing() -> None:
    assert planned(gpus=1).network_all == 0


def test_each_bound_is_named() -> None:
    slow_link = planned(Rates(1e12, 28e9, 0.1e9, 1e4, 1e9))
    assert slow_link.bound == "network" and slow_link.step == pytest.approx(11e-3 + 35e-3)
    assert planned(Rates(1e12, 1e9, 1e9, 1e4, 1e9)).bound == "memory"
    starved = planned(Rates(1e12, 28e9, 1e9, 100.0, 1e9))
    # Decoding runs beside the rest: it decides alone.
    assert starved.bound == "decode" and starved.step == pytest.approx(0.1)
    assert not planned(Rates(1e12, 28e9, 1e9, 1e4, 29e6)).fits


def test_sharding_halves_the_state_and_sends_parameters_too() -> None:
    found = planned(sharded=True, micro_steps=2)
    # Value, gradient and moments by halves; activations of one micro-step.
    assert found.memory_bytes == 8e6 + 4e6 + 5e6
    # Half the parameters: gradients once (4 bytes), bf16 parameters twice in each of two micro-steps (8 bytes).
    assert found.network_all == pytest.approx(0.5e6 * 12 / 1e9)
    assert found.seconds["memory"] == pytest.approx(0.5e-3)


def test_the_papers_run() -> None:
    """B/16 at the share of an A100's rate that 60 hours on 32 of them mean."""
    config = recipe.load("stage1_k710")
    work = work_of(config)
    assert work.trained == pytest.approx(88.3e6, rel=0.02) and work.frozen == pytest.approx(86.2e6, rel=0.02)
    text = report("stage1_k710", config, PlanOptions(gpus=32, share=0.029, cores=12), recipe.clips_of("stage1_k710"))
    hours = float(text.splitlines()[1].split(" hours")[0])
    assert 50 < hours < 66
    assert "bound: matmul" in text and "650000 clips" in text and "prediction" in text


def test_measured_figures_replace_the_assumed(tmp_path: Path) -> None:
    config = recipe.load("tests/assets/tiny.py")
    line = {"matmul_tflops": 700.0, "share_of_matmul_rate": 0.25, "device": "Some GPU", "model": "b16"}
    (tmp_path / "line").write_text("noise\n" + json.dumps(line) + "\n")
    text = report("tiny", config, PlanOptions(measured=str(tmp_path / "line"), clips=9))
    assert "700 TFLOP/s" in text and "25.0%" in text and text.count("measured: Some GPU, b16") == 2
    with pytest.raises(ConfigError, match="bench stage1"):
        report("tiny", config, PlanOptions(measured=str(tmp_path / "none")))
    for rate in ("0", "-5", "NaN"):
        (tmp_path / "line").write_text(
            f'{{"matmul_tflops": {rate}, "share_of_matmul_rate": 0.25, "device": "x", "model": "b16"}}'
        )
        with pytest.raises(ConfigError, match="does not end with a line"):
            report("tiny", config, PlanOptions(measured=str(tmp_path / "line")))


def test_the_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    key = ["--run.parallel", "fsdp", "--run.batch_size", "3"]
    assert main(["plan", "tests/assets/tiny.py", "--gpus", "16", "--gpu", "h200", "--clips", "100", *key]) == 0
    text = capsys.readouterr().out
    assert "16 x H200 SXM, sharded (fsdp)" in text and "3 clips per GPU and step, 48 in all" in text
    assert "100 clips x 1 crops x 3 epochs" in text and "one port for each GPU" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan"], "needs a recipe"),
        (["plan", "tests/assets/tiny.py", "--gpus", "0"], "gpus is 0"),
        (["plan", "stage2", "--gpus", "8"], "--clips N"),
        (["plan", "tests/assets/tiny.py:classes"], "a plan of task classification without a list needs the number"),
        (["plan", "tests/assets/tiny.py", "--run.batch_sise", "3"], "--run.batch_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_plans(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "clips"), [("k400", 240_000), ("ssv2:l16", 168_913), ("stage1_k710:l16", 650_000), ("k710", 650_000)]
)
def test_clips_are_those_of_the_recipe(page: str, clips: int, capsys: pytest.CaptureFixture, tiny_list: Path) -> None:
    assert main(["plan", page]) == 0
    text = capsys.readouterr().out
    assert f": {clips} clips x" in text and "assumed: CLIPS of the recipe's page" in text
    assert main(["plan", page, "--data.train", str(tiny_list), "--data.separator", ","]) == 0
    assert ": 2 clips x" in capsys.readouterr().out


def test_stage_2_and_fine_tuning_have_plans_too() -> None:
    stage2 = recipe.load("stage2")
    found = work_of(stage2)
    # Tower, BERT with three fusion layers, heads: the paper's base model has about 200 M parameters.
    assert 190e6 < found.trained < 240e6
    assert "hours" in report("stage2", stage2, PlanOptions(clips=5_000_000, gpus=16))
    assert work_of(recipe.load("tests/assets/tiny.py:classes")).frozen == 0
