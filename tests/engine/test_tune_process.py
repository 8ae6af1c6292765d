"""A candidate in a process of its own: crashes, hangs and full memories stay there, and it ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umt_fast.config import to_dict
from umt_fast.engine import trainer as trainer_module
from umt_fast.engine.tune_process import Result, failure, measure, run_candidate
from umt_fast.tasks.tuning import with_settings

REPOSITORY = Path(__file__).resolve().parents[2]
REQUEST = {"candidate": {"compile": True}}


def child(program: str, deadline: float = 60.0) -> Result:
    return run_candidate(REQUEST, deadline, (sys.executable, "-c", program))


@pytest.mark.process
def test_an_answer_is_read_whatever_else_is_printed() -> None:
    answer = {"status": "ok", "ms": 1.5, "peak_gib": 2.0, "warm_up_s": 3.0}
    result = child(
        "import json, sys\n"
        f"assert json.loads(sys.stdin.readline()) == {REQUEST}\n"
        "print(json.dumps({'at': 'timing'})); print('[1, 2]'); print('chatter')\n"
        f"print(json.dumps({answer}))"
    )
    assert result == Result(candidate={"compile": True}, **answer)


@pytest.mark.process
@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("import sys; print('Xid 31', file=sys.stderr); sys.exit(7)", "crashed", "ended with status 7: Xid 31"),
        ("import os; os.abort()", "crashed", "ended by signal 6"),
        ("import os; os.kill(os.getpid(), 9)", "crashed", "killed by signal 9; the host's memory may have run out"),
        ("pass", "crashed", "ended with status 0"),
        ("print('{\"status\": ')", "crashed", "ended with status 0"),
        ('print(\'{"status": "ok", "ms": 1.0}\'); import os; os.abort()', "crashed", "ended by signal 6"),
    ],
)
def test_a_crash_is_a_result(program: str, status: str, detail: str) -> None:
    result = child(program)
    assert (result.status, result.detail, result.ms) == (status, detail, None)


def _gone(number: int) -> bool:
    """Whether a process has ended; one nobody waited for counts."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return True


def _wait_until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.process
def test_a_hang_ends_at_the_deadline_with_all_it_started(tmp_path: Path) -> None:
    numbers = tmp_path / "pids"
    start = time.monotonic()
    result = child(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        'print(\'{"at": "comparison"}\', flush=True)\n'
        "compiler = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(numbers)!r}, 'w').write(f'{{os.getpid()}} {{compiler.pid}}')\n"
        "time.sleep(600)",
        deadline=8.0,
    )
    assert time.monotonic() - start < 60
    assert (result.status, result.detail) == ("hung", "no end within 8 s (comparison)")
    for number in map(int, numbers.read_text().split()):
        assert _wait_until(lambda number=number: _gone(number))


@pytest.mark.process
@pytest.mark.slow
def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Also with one that is killed: nobody is left to keep the GPU."""
    builder = tmp_path / "endless.py"
    builder.write_text(
        "import os, time\n"
        "def build(task, record, exact):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    request = {"candidate": {}, "builder": "endless:build", "task": "", "record": {"run": {}}, "reference": {}}
    program = f"from umt_fast.engine.tune_process import run_candidate; run_candidate({request!r}, 600)"
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        assert _wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 120)
        number = int((tmp_path / "pid").read_text())
        assert not _gone(number)
        parent.send_signal(signal.SIGKILL)
        assert _wait_until(lambda: _gone(number))
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.process
def test_ranks_of_a_launcher_are_not_the_childs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KEPT", "yes")
    found = child(
        "import os, json\n"
        "names = [n for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_RUN_ID', 'KEPT') if n in os.environ]\n"
        "print(json.dumps({'status': 'wrong', 'detail': ' '.join(names)}))"
    )
    assert found.detail == "KEPT"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 ..."), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crashed"),
    ],
)
def test_a_full_memory_is_told_from_a_crash(error: Exception, status: str) -> None:
    found = failure(error)
    assert found["status"] == status and "\n" not in found["detail"]


def request(settings: dict) -> dict:
    from tests.assets import tiny

    config = tiny.tiny()
    return {
        "builder": "umt_fast.tasks.tuning:build_case",
        "task": "pretraining",
        "record": to_dict(with_settings(config, settings)),
        "reference": to_dict(config),
    }


def scaled(objective):
    """One per cent too much of everything."""

    def forward(batch, seed):
        values = objective(batch, seed)
        return values | {"loss": 1.01 * values["loss"]}

    return forward


def turned(objective):
    """Loss and norms are right, the gradient of one matrix is another's direction."""
    weight = objective.student.encoder.blocks[1].mlp.fc1.weight
    weight.register_hook(lambda gradient: gradient.flip(0))
    return objective


def not_a_number(objective):
    weight = objective.student.encoder.blocks[1].mlp.fc1.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    return objective


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda objective: objective, ""),
        (scaled, "loss is"),
        (turned, "the gradient of encoder.blocks.1.mlp.fc1.weight has the cosine"),
        (not_a_number, "gradient norm is nan"),
    ],
    ids=["right", "scaled", "turned", "not a number"],
)
def test_the_gate(change, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling would do wrong, in its place."""
    monkeypatch.setattr(trainer_module, "compiled", change)
    parts: list[str] = []
    found = measure(request({"compile": True}), parts.append)
    assert "comparison with eager" in parts
    if not detail:
        assert found["status"] == "ok" and found["ms"] > 0 and parts[-1] == "timing"
    else:
        assert found["status"] == "wrong" and detail in found["detail"] and "timing" not in parts


@pytest.mark.process
def test_the_child_measures_for_itself() -> None:
    result = run_candidate(request({}) | {"candidate": {"compile": False}}, 300)
    assert result.status == "ok" and result.ms > 0 and result.peak_gib > 0, result


@pytest.mark.process
@pytest.mark.slow
def test_an_error_in_the_child_comes_back_in_a_line() -> None:
    broken = request({})
    broken["record"]["student"]["num_heads"] = 0
    broken["reference"] = broken["record"]
    result = run_candidate(broken | {"candidate": {}}, 300)
    assert result.status == "refused" and result.detail.startswith("student.num_heads is 0")
    assert "\n" not in result.detail
