"""recipes/slurm.sh with fakes of Slurm's commands and for Python."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).resolve().parent.parent


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Commands that note in `events` what they were asked; the environment that finds them."""
    commands = tmp_path / "bin"
    commands.mkdir()
    events = tmp_path / "events"
    executable(commands / "srun", f'echo "srun $1" >>{events}; shift; "$@" & echo $! >{tmp_path}/task; wait $!')
    # Slurm kills a step whose srun gets SIGTERM; scancel with a signal reaches the task instead.
    executable(commands / "scancel", f'echo "scancel $*" >>{events}; kill -TERM $(cat {tmp_path}/task)')
    executable(commands / "scontrol", f'echo "scontrol $*" >>{events}')
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "NGPU": "1",
        "DATA": "list.csv",
        "OUT": str(tmp_path / "run"),
    }


def start(cluster: dict[str, str], tmp_path: Path, python: str, *arguments: str) -> subprocess.Popen:
    interpreter = executable(tmp_path / "python", python)
    # As sbatch does it: a copy in a folder of Slurm's own.
    script = tmp_path / "slurm_script"
    script.write_bytes((REPOSITORY / "recipes" / "slurm.sh").read_bytes())
    return subprocess.Popen(
        ["bash", str(script), *arguments],
        env=cluster | {"UMT_PYTHON": str(interpreter)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_time_running_out_saves_and_queues_again(cluster: dict[str, str], tmp_path: Path) -> None:
    events = tmp_path / "events"
    python = (
        f"trap 'sleep 0.3; echo saved >>{events}; exit 0' TERM\n"
        f'echo "python $*" >>{events}; for turn in $(seq 300); do sleep 0.1; done'
    )
    job = start(cluster, tmp_path, python, "stage1_k710", "--run.seed", "7")
    end = time.monotonic() + 30
    while time.monotonic() < end and not (events.exists() and "python" in events.read_text()):
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    _, error = job.communicate(timeout=30)
    seen = events.read_text().splitlines()
    assert job.returncode == 0, error
    assert (
        seen[0] == "srun --kill-on-bad-exit=1" and seen[1].endswith("--run.seed 7") and "stage1_k710.py:b16" in seen[1]
    )
    # Queued only when the trainer has saved, however long that takes.
    assert seen[2:] == ["scancel --signal=TERM 77", "saved", "scontrol requeue 77"]


def test_a_failure_is_not_queued_again(cluster: dict[str, str], tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "exit 3", "stage1_k710")
    _, error = job.communicate(timeout=30)
    assert job.returncode == 3, error
    assert "requeue" not in (tmp_path / "events").read_text()


def test_stage_2_goes_through_its_own_launcher(cluster: dict[str, str], tmp_path: Path) -> None:
    corpora = {"WEBVID2M": "webvid.json", "CC3M": "cc3m.json", "INIT": "stage1.pth"}
    job = start(
        cluster | corpora,
        tmp_path,
        f'echo "python $* wait $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >>{tmp_path}/events',
        "stage2_5m",
    )
    _, error = job.communicate(timeout=30)
    assert job.returncode == 0, error
    text = (tmp_path / "events").read_text()
    assert "recipes/stage2.py:b16 --videos webvid.json --images cc3m.json" in text and "wait 110" in text


def test_an_unknown_launcher_is_named(cluster: dict[str, str], tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "exit 0", "stage3")
    _, error = job.communicate(timeout=30)
    assert job.returncode == 2 and "no launcher at" in error and "UMT_ROOT" in error
