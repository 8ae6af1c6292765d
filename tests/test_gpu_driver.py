"""The driver of gpu.sh, with phases that fail, hang and are cut, and the tables it leaves."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_tables, report
from benchmarks.gpu import Phase

WRITES = "import os, pathlib; open(pathlib.Path(os.environ['OUT']) / 'done', 'a').write('{}\\n')"


def phase(name: str, program: str, limit: float = 30.0, **more: object) -> Phase:
    return Phase(name, [sys.executable, "-c", program], limit, least=0.5, **more)


def run(phases: list[Phase], out: Path, deadline: float = 60.0) -> dict[str, dict]:
    lines = gpu.run(phases, out, deadline, dict(os.environ) | {"OUT": str(out)})
    return {line["phase"]: line for line in lines}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_and_a_hang_cost_themselves_alone(tmp_path: Path) -> None:
    hang = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, 1); time.sleep(600)'])\n"
        "(pathlib.Path(os.environ['OUT']) / 'pid').write_text(str(child.pid))\n"
        "print('begun', flush=True)\n"
        "time.sleep(600)"
    )
    phases = [
        phase("raises", "raise ValueError('no such thing')"),
        phase("dies", "import os; os.kill(os.getpid(), 11)"),
        phase("hangs", hang, limit=8),
        phase("works", WRITES.format("works")),
    ]
    started = time.monotonic()
    found = run(phases, tmp_path)
    assert time.monotonic() - started < 60
    assert {name: line["state"] for name, line in found.items()} == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "timed out",
        "works": "done",
    }
    assert (
        found["raises"]["reason"] == "exit status 1: ValueError: no such thing"
        and "Traceback" in found["raises"]["tail"]
    )
    assert found["dies"]["reason"].startswith("signal 11") and found["dies"]["exit_status"] == -11
    assert "its limit" in found["hangs"]["reason"] and "begun" in found["hangs"]["tail"]
    assert not alive(int((tmp_path / "pid").read_text())), "what a phase started ends with it"
    assert (tmp_path / "done").read_text() == "works\n"
    written = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in written] == ["raises", "dies", "hangs", "works"] and "commit" in written[0]


@pytest.mark.slow
def test_a_second_run_tries_what_failed_first_and_repeats_nothing_done(tmp_path: Path) -> None:
    flag = tmp_path / "fixed"
    phases = [
        phase("looks", WRITES.format("looks"), always=True),
        phase("first", WRITES.format("first")),
        phase("second", f"import pathlib, sys\nsys.exit(not pathlib.Path({str(flag)!r}).exists())"),
        phase("third", "import time; time.sleep(600)", limit=600),
        phase("fourth", WRITES.format("fourth")),
    ]
    found = run(phases, tmp_path, deadline=15)
    states = {name: line["state"] for name, line in found.items()}
    assert states == {"looks": "done", "first": "done", "second": "failed", "third": "cut", "fourth": "no time"}
    # The writer was killed within a line.
    with open(tmp_path / "phases.jsonl", "a") as file:
        file.write('{"phase": "fou')
    flag.touch()
    phases[3] = phase("third", WRITES.format("third"))
    phases.insert(1, phase("new", WRITES.format("new")))
    found = run(phases, tmp_path)
    assert list(found) == ["looks", "second", "third", "new", "fourth"], "what failed or was cut first"
    assert (tmp_path / "done").read_text().split() == ["looks", "first", "looks", "third", "new", "fourth"]
    assert all(json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()), "half a line is gone"
    assert list(run(phases, tmp_path)) == ["looks"]
    assert set(gpu.last_states(tmp_path).values()) == {"done"}


def test_figures_of_another_device_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run([phase("looks", "raise SystemExit('another device')", always=True), phase("rest", "pass")], tmp_path)
    assert list(found) == ["looks"]
    from benchmarks import rates

    rates.write(tmp_path, {"device": "Some GPU"})
    with pytest.raises(SystemExit, match="holds figures of Some GPU, this is .*; give another OUT"):
        rates.machine(tmp_path)


def test_lines_go_on_after_a_cut_one(tmp_path: Path) -> None:
    from benchmarks.timing import Lines

    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ')
    lines = Lines(tmp_path, "x.jsonl")
    lines.add({"a": 2})
    lines.add({"a": 3, "error": "no"})
    assert [row["a"] for row in map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())] == [1, 2, 3]
    assert [row["a"] for row in lines.known()] == [2], "of this commit, and no error"


def test_compiled_code_is_packed_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    for folder in (cache / "triton", other):
        folder.mkdir(parents=True)
    (cache / "triton" / "kernel").write_bytes(os.urandom(1000))
    gpu.pack(tmp_path, cache)
    gpu.unpack(tmp_path, other)
    assert (other / "triton" / "kernel").read_bytes() == (cache / "triton" / "kernel").read_bytes()
    monkeypatch.setattr(gpu, "MAX_PACKED", 100)
    gpu.pack(tmp_path, cache)
    assert not (tmp_path / "cache.tar.gz").exists()


def test_every_phase_and_test_is_there() -> None:
    phases = gpu.phases_of(["b16", "l16"], "out", "folder")
    names = [entry.name for entry in phases]
    assert names[:4] == ["machine", "rates", "tests", "checks"] and names[-2:] == ["trainer", "tiles"]
    assert "official-b16" in names and "tiles" not in [entry.name for entry in gpu.phases_of(["tiny"], "out")]
    for entry in phases:
        module = next(part for part in entry.command if part.startswith(("benchmarks.", "kernels.")))
        assert (gpu.REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
    assert all((gpu.REPOSITORY / path).is_file() for path in gpu.TESTS)


def test_attention_is_held_against_a_truth_that_autograd_confirms() -> None:
    from benchmarks import checks

    for case, tokens, queries in (("random", 9, 9), ("near -120", 7, 1)):
        values = checks.inputs(case, tokens, queries)
        q, k, v = (x.double().requires_grad_() for x in values[:3])
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        expected = [out, *torch.autograd.grad(out, (q, k, v), values[3].double())]
        for ours, theirs in zip(checks.truth(*values), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        logits = torch.einsum("bqhd,bkhd->bhqk", values[0].double(), values[1].double()) / 8
        assert case == "random" or (logits + 120).abs().max() < 15


def test_a_wrong_attention_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import checks
    from benchmarks.timing import Lines

    monkeypatch.setattr(checks, "TOKENS", (5,))
    plain = checks.kernels.attention
    monkeypatch.setattr(checks.kernels, "attention", lambda *qkv, backend: 1.05 * plain(*qkv, backend=backend))
    lines = Lines(tmp_path, "checks.jsonl")
    assert not checks.attention_values(lines)
    verdicts = {row["backend"]: row["ok"] for row in lines.known() if "ok" in row}
    assert verdicts and not any(verdicts.values())


def test_the_step_that_is_timed_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import steps

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("UMT_VARIANTS", "eager; graph")
    (tmp_path / "rates.json").write_text('{"matmul_tflops": 0.1, "device": "a CPU"}\n')
    steps.main("tiny")
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    timed = [row for row in rows if row["bench"] == "step" and "error" not in row]
    assert len(timed) == steps.ROUNDS or torch.cuda.is_available()
    first = timed[0]
    assert (
        first["clips_per_s"] == pytest.approx(2e3 / first["ms_per_step"], rel=0.01)
        and len(first["losses"]) == steps.WARM
    )
    assert torch.cuda.is_available() or any("needs a GPU" in row.get("error", "") for row in rows)
    profile = next(row for row in rows if row["bench"] == "profile")
    assert sum(profile["shares"].values()) == pytest.approx(1, abs=0.01)
    from umt_fast.plan import _measured

    monkeypatch.setenv("UMT_PHASE_UNTIL", str(time.time() - 1))
    with pytest.raises(SystemExit, match="no time was left for eager; graph: call again"):
        steps.main("tiny")
    matmul, share, where = _measured(str(tmp_path / "rates.json"))
    assert (matmul, where) == (0.1e12, "a CPU, tiny") and share == max(row["share_of_matmul_rate"] for row in timed)


def test_tables_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def write(name: str, *rows: dict) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rates.json", {"device": "Some GPU", "matmul_tflops": 500.0, "clocks": {"sm_mhz": 1980}})
    step = {
        "bench": "step",
        "model": "b16",
        "batch_size": 64,
        "ms_spread": [9.0, 11.0],
        "host_ms_per_step": 2.0,
        "steps": 20,
    }
    turns = [
        step | {"variant": "eager", "turn": n, "ms_per_step": 10.0, "clips_per_s": rate}
        for n, rate in enumerate((40, 60, 50))
    ]
    write(
        "steps.jsonl",
        turns[0],
        step | {"variant": "plain", "turn": 0, "ms_per_step": 40.0, "clips_per_s": 10.0},
        *turns[1:],
        step | {"variant": "graph", "error": "out of memory"},
        {
            "bench": "trainer",
            "model": "b16",
            "batch_size": 64,
            "variant": "eager",
            "clips_per_s": 45.0,
            "data_wait": 0.1,
        },
        {"bench": "official", "model": "b16", "batch_size": 64, "clips_per_s": 5.0},
    )
    write(
        "checks.jsonl",
        {
            "bench": "attention values",
            "case": "random",
            "tokens": 5,
            "queries": 5,
            "backend": "flash",
            "ok": False,
            "errors": {"output": 0.01, "dq": 0.3},
        },
    )
    write(
        "kernels.jsonl",
        {
            "size": "b16",
            "kernel": "gather",
            "provider": "ours",
            "seconds": 2e-6,
            "gb_per_s": 50.0,
            "tflops": 0.0,
            "copy_gb_per_s": 100.0,
            "bound_s": 1e-6,
            "share_of_bound": 0.5,
        },
        {"size": "b16", "kernel": "gather", "provider": "plain", "seconds": 5e-6},
        {"size": "b16", "kernel": "scatter", "provider": "ours", "error": "ValueError: no"},
    )
    write(
        "phases.jsonl",
        {"phase": "rates", "state": "failed", "reason": "exit status 1", "seconds": 3.0},
        {"phase": "rates", "state": "done", "reason": "", "seconds": 5.0},
    )
    report.main(tmp_path)
    text = capsys.readouterr().out
    assert text == (tmp_path / "table.md").read_text() and text.startswith("device Some GPU")
    # The median of three turns, not the first.
    assert "| b16, 64 clips | eager | 50 (40, 60, 50) | 5.00 | 10.00 (9.00 to 11.00) | 2.00 |" in text
    assert "| b16, 64 clips | graph | out of memory |" in text
    assert "| b16 | eager | 45 | 50 | 90% | 10% |" in text and "is 10.00 times as fast" in text
    assert "| random, 5 x 5 | 0.3 WRONG |" in text and "| rates | done | 5 |" in text
    assert "| b16, gather | 50 GB/s | 1.0 | 50% | 2.50 | 2.0 | 5.0 |" in text
    assert "| b16, scatter | ValueError: no |  |  |  | failed |  |" in text
    plot = (tmp_path / "plot.svg").read_text()
    assert 'width="380.0"' in plot and 'width="76.0"' in plot, "50 and 10 clips/s"


def test_a_bound_is_of_the_models_own_rates() -> None:
    about = {"matmul_tflops": 900.0, "copy_gb_per_s": 3000.0, "products": {"b16": {"bf16": 450.0}}}
    slow = gpu_tables.bound_at(about)("b16", 64)
    fast = gpu_tables.bound_at(about | {"products": {"b16": {"bf16": 900.0}}})("b16", 64)
    assert 1 < fast / slow < 2, "products alone get faster, bytes do not"


def test_every_product_is_made_and_the_means_are_of_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import rates
    from benchmarks.timing import Lines

    shape = rates.Shape("tiny", "student fc1", 256, 768, 1024, "bias, GELU")
    monkeypatch.setattr(rates, "shapes_of", lambda model: [shape])
    lines = Lines(tmp_path, "rates.jsonl")
    rates.products(lines, ["tiny"])
    rows = [json.loads(line) for line in (tmp_path / "rates.jsonl").read_text().splitlines()]
    made = {entry[:3] for entry in rates.eight_bit_calls(shape)}  # a CPU would take minutes to call them
    found = made | {(row["kind"], row["pass"], row["epilogue"]) for row in rows}
    fp8 = {(f"fp8 {kind}", name, "") for kind in ("tensor", "row", "block") for name in ("forward", "dgrad", "wgrad")}
    native = {(rates.NAME, name, "") for name in ("forward", "dgrad", "wgrad")}
    assert found >= fp8 | native | {("int8", "forward", ""), ("int8", "forward", "quantize, bias")}
    timed = [row for row in rows if row["kind"] == rates.NAME]
    flops = 2 * 256 * 768 * 1024
    assert all(row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12, rel=1e-3) for row in timed)
    mean = rates.summary(lines)["products"]["tiny"][rates.NAME]
    plain = [row["seconds"] for row in timed if not row["epilogue"]]
    assert mean == pytest.approx(3 * flops / sum(plain) / 1e12, rel=1e-2), "of all products together, not of rates"
    rates.products(lines, ["tiny"])
    again = (tmp_path / "rates.jsonl").read_text().splitlines()
    assert sum("error" not in json.loads(line) for line in again) == sum("error" not in row for row in rows), (
        "known ones"
    )
