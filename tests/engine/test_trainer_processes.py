"""The loop in real processes: the stage-1 command on real files, killed without warning, and two ranks."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.test_trainer import losses, trainer
from tests.ranks import run_ranks
from umt_fast.engine import checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def command(out: Path, clips: Path, ranks: int) -> list[str]:
    train = ["-m", "umt_fast", "train", "tests/assets/tiny.py:long", "--data.train", str(clips), "--run.out", str(out)]
    if ranks == 1:
        return [sys.executable, *train]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *launch, *train]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(out: Path, clips: Path, ranks: int) -> None:
    done = subprocess.run(
        command(out, clips, ranks), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def kill_when(process: subprocess.Popen, ready: object, limit: float = 120.0) -> None:
    """SIGKILL to the whole process group once ready() holds."""
    end = time.monotonic() + limit
    while process.poll() is None and not ready() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(random.Random(str(process.args)).random() * 0.3)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def clip_list(tiny_list: Path) -> Path:
    """Sixteen entries, all readable."""
    table = tiny_list.with_name("sixteen.csv")
    table.write_text("".join(f"video{number % 2}.mp4,{number}\n" for number in range(16)))
    return table


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_and_resume_is_bit_exact(ranks: int, tmp_path: Path, clip_list: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, clip_list, ranks)
    for wanted in (2, 7):
        process = subprocess.Popen(
            command(killed, clip_list, ranks),
            cwd=REPOSITORY,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        kill_when(process, lambda: (killed / "metrics.jsonl").exists() and len(losses_so_far(killed)) >= wanted)  # noqa: B023
        assert process.returncode != 0, "the run ended before it could be killed"
    finish(killed, clip_list, ranks)
    assert losses(killed) == losses(whole)
    assert [step for step, _ in losses(whole)] == list(range(1, 25))


def losses_so_far(out: Path) -> list[str]:
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.mark.process
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_ends(number: signal.Signals, ranks: int, tmp_path: Path, clip_list: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(
        command(out, clip_list, ranks), cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(losses_so_far(out)) >= 2):
            time.sleep(0.02)
        # Slurm and torchrun pass SIGTERM on to every rank; here it goes to torchrun, which does.
        process.send_signal(number)
        _, error = process.communicate(timeout=90)
    assert f"stopped by signal {int(number)}" in error
    if ranks == 1:
        assert process.returncode == (130 if number == signal.SIGINT else 0)
        assert f"signal {int(number)}: saving and stopping" in error
    step = checkpoint.checkpoints(out)[-1][0]
    assert step == losses(out)[-1][0] < 24


# argv: folder, noise, whether each rank has a folder of its own in it.
RANKS = """
import sys; from pathlib import Path
from tests.engine.test_trainer import trainer
from umt_fast.config import RunConfig
from umt_fast.engine.distributed import distributed_run
with distributed_run(RunConfig(device="cpu")) as ranks:
    out = Path(sys.argv[1], str(ranks.rank)) if sys.argv[3] == "apart" else Path(sys.argv[1])
    trainer(out, batch=2, noise=float(sys.argv[2]), rank=ranks.rank, world_size=ranks.world_size).train()
"""


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_train_as_one_with_the_joint_batch(tmp_path: Path) -> None:
    """Gradients of two ranks average to those of one process with both batches."""
    trainer(tmp_path / "one", batch=4, noise=0.0).train()
    run_ranks(tmp_path / "ranks.py", RANKS, tmp_path / "two", 0.0, "together")
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.process
@pytest.mark.slow
def test_ranks_that_see_different_folders_stop(tmp_path: Path) -> None:
    """As on nodes whose `out` is not shared: one would go on from a checkpoint, the other begin anew and wait for ever."""
    trainer(tmp_path / "nodes" / "0", batch=4).train()
    done = run_ranks(tmp_path / "ranks.py", RANKS, tmp_path / "nodes", 0.1, "apart", succeeds=False)
    assert "found checkpoints of different steps" in done.stderr and "all nodes share" in done.stderr
