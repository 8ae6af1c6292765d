"""torch's global switches during a run, and a run that continues bit for bit with run.deterministic."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests.assets import tiny
from umt_fast.config import ConfigError, RunConfig
from umt_fast.engine.numerics import numerics
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
BACKENDS = torch.backends


def switches() -> dict[str, object]:
    return {
        "cuda": BACKENDS.cuda.matmul.fp32_precision,
        "mkldnn": BACKENDS.mkldnn.matmul.fp32_precision,
        "conv": BACKENDS.cudnn.conv.fp32_precision,
        "rnn": BACKENDS.cudnn.rnn.fp32_precision,
        "legacy": torch.get_float32_matmul_precision(),
        "sdp": BACKENDS.cuda.cudnn_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": BACKENDS.cudnn.deterministic,
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": BACKENDS.cudnn.benchmark,
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("legacy", ["highest", "high"])
def test_switches_are_set_and_set_back(deterministic: bool, legacy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_float32_matmul_precision(legacy)
    BACKENDS.cudnn.benchmark = True
    before = switches()
    try:
        with pytest.raises(KeyError), numerics(RunConfig(deterministic=deterministic)):
            inside = switches()
            raise KeyError
        assert switches() == before
    finally:
        BACKENDS.cudnn.benchmark = False
        torch.set_float32_matmul_precision("highest")
    assert {inside["cuda"], inside["mkldnn"], inside["conv"], inside["rnn"]} <= {"ieee", "none"}
    assert inside["legacy"] == "highest" and not BACKENDS.cuda.matmul.allow_tf32 and inside["sdp"] is False
    if deterministic:
        assert (
            inside["deterministic"]
            and inside["cudnn"]
            and not (inside["benchmark"] or inside["fill"] or inside["warn"])
        )
        assert inside["workspace"] == ":4096:8"
    else:
        kept = ("deterministic", "warn", "cudnn", "benchmark", "fill", "workspace")
        assert {name: inside[name] for name in kept} == {name: before[name] for name in kept}


def test_a_workspace_that_rules_it_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with (
        pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG.*it is :0:0"),
        numerics(RunConfig(deterministic=True)),
    ):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with numerics(RunConfig(deterministic=True)):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_continues_bit_for_bit(
    tmp_path: Path, tiny_list: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umt_fast.engine.trainer.measure_matmul_rate", lambda *_: 1e12)
    during = []
    forward = UnmaskedAlignment.forward

    def watched(self, *args, **kwargs):
        during.append(torch.are_deterministic_algorithms_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UnmaskedAlignment, "forward", watched)

    def run(name: str, last: int) -> Path:
        config = tiny.long()
        config.run.deterministic, config.run.out, config.run.max_steps = True, str(tmp_path / name), last
        config.student.drop_path, config.data.train = 0.3, str(tiny_list)
        return train(config)

    whole = run("whole", 7)
    for last in (2, 5, 7):
        parts = run("parts", last)
    rows = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, (out / "metrics.jsonl").open())]
        for out in (whole, parts)
    ]
    assert len(rows[0]) == 7 and rows[0] == rows[1]
    states = [torch.load(out / "checkpoint-00000007.pt", weights_only=True)["model"] for out in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert during and all(during) and not torch.are_deterministic_algorithms_enabled()


def test_our_kernels_have_no_atomic_operations() -> None:
    """As numerics.py tells of them."""
    sources = {path.name: path.read_text() for path in (REPOSITORY / "kernels").glob("*.py")}
    assert any("@triton.jit" in text for text in sources.values())
    assert not [name for name, text in sources.items() if re.search(r"tl\.atomic|atomic_(add|xchg|cas|max|min)", text)]


def test_a_step_has_no_convolution() -> None:
    """So there is nothing for cudnn.benchmark to choose."""
    from torch.profiler import ProfilerActivity, profile

    config = tiny.tiny()
    config.teacher.patch_size, config.teacher.image_size = 14, 28
    objective = UnmaskedAlignment(config).train()
    batch = {"video": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)}
    with profile(activities=[ProfilerActivity.CPU]) as found:
        objective(batch, torch.tensor([5]))["loss"].backward()
    names = {event.key for event in found.key_averages()}
    assert names & {"aten::addmm", "mkldnn::_linear_pointwise"} and not [name for name in names if "conv" in name]
