"""Ctrl-C and kill -9 outside of training: one line or none, and no process left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from umt_fast.cli import main as command_line

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Commands listen to Ctrl-C, also where the tests themselves run in the background and were started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, number = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):  # no process, or one that has just ended
            continue
        if int(number) == leader and state != "Z":
            found.append(int(entry.name))
    return found


def ends(leader: int, seconds: float = 30.0) -> bool:
    limit = time.monotonic() + seconds
    while group(leader) and time.monotonic() < limit:
        time.sleep(0.05)
    return not group(leader)


def after_ctrl_c(process: subprocess.Popen) -> tuple[int, list[str], bool]:
    """What Ctrl-C makes of a process: its exit status, the lines it says, and whether its whole group ends."""
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, said, ends(process.pid)


@contextmanager
def under_way(command: str, tiny_list: Path) -> Iterator[subprocess.Popen]:
    """The command on a list that takes long, in a process group of its own, its workers at work."""
    table, out = tiny_list.with_name("long.csv"), tiny_list.with_name("out")
    links = [tiny_list.with_name(f"link{number}.mp4") for number in range(1500)]
    for link in links:
        link.symlink_to("video0.mp4")
    table.write_text("".join(f"{link.name},0\n" for link in links))
    words = [sys.executable, "-m", "umt_fast", command, str(table), "--out", str(out), "--workers", "2"]
    begun = {"scan": out.with_name("out.partial"), "prepare": out / "part-0-of-1-00000.jsonl.writing"}[command]
    with subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not (begun.exists() and begun.stat().st_size):
                time.sleep(0.05)
            assert process.poll() is None and len(group(process.pid)) >= 4
            yield process
        finally:
            for left in group(process.pid):
                os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("command", ["scan", "prepare"])
def test_ctrl_c_is_one_line_and_ends_everything(command: str, tiny_list: Path) -> None:
    with under_way(command, tiny_list) as process:
        assert after_ctrl_c(process) == (130, ["umt_fast: interrupted"], True)


@pytest.mark.slow
def test_a_background_command_goes_on(tiny_list: Path) -> None:
    """A script starts `command &` deaf to Ctrl-C; its workers must be so too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with under_way("scan", tiny_list) as process:
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0 and "1500 good clips" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tyro", "torch"])
def test_ctrl_c_while_a_command_starts(module: str, tmp_path: Path) -> None:
    """A module stands in that is interrupted while it is imported, and aborts then, as C++ may."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    os.abort()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    words = [sys.executable, "-m", "umt_fast", "eval", "classify", "a.pt", "list.csv"]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "umt_fast: interrupted\n"


@pytest.mark.parametrize("place", ["clean-up", "destructor", "exit"])
def test_a_second_ctrl_c_shows_no_stack(place: str, tmp_path: Path) -> None:
    """It comes while the first one is being cleaned up after, or while Python ends."""
    moments = {
        "clean-up": "    try:\n        press()\n    finally:\n        press()\n",
        "destructor": "    class Held:\n        __del__ = lambda self: press()\n    held = Held()\n    press()\n",
        "exit": "    atexit.register(press)\n    press()\n",
    }
    program = (
        "import atexit, os, runpy, signal, sys\n"
        "from umt_fast import interrupts\n"
        "from umt_fast.cli import data\n"
        "press = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        f"def scan(rest):\n    interrupts.raise_again()\n{moments[place]}"
        "data.scan = scan\n"
        "sys.argv = ['umt_fast', 'scan']\n"
        "runpy.run_module('umt_fast', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (130, "umt_fast: interrupted\n")


def test_a_late_ctrl_c_ends_a_clean_up_that_hangs(tmp_path: Path) -> None:
    program = (
        "import os, signal, time\n"
        "from umt_fast import interrupts\n"
        "press = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "interrupts.end_at_once()\n"
        "interrupts.raise_again()\n"
        "try:\n    press()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(interrupts._PATIENCE + 0.2)\n    press()\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "umt_fast: interrupted\n")


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start(tiny_list: Path) -> None:
    program = (
        "import sys\n"
        "from umt_fast.cli import data, main as command_line\n"
        "from umt_fast import interrupts\n"
        "from umt_fast import workers\n"
        "def scan(rest):\n"
        "    interrupts.raise_again()\n"
        "    print('started', flush=True)\n"
        "    with workers.worker_pool(1, 'umt_fast.data.loaders.captions') as pool:\n"
        "        pool.submit(abs, 1).result()\n"
        "        raise AssertionError('not interrupted')\n"
        "data.scan = scan\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(command_line.main(['scan']))\n"
    )
    script = tiny_list.with_name("program.py")
    script.write_text(program)
    with subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        process.stdout.readline()
        time.sleep(1)  # the server is importing torch, which takes seconds
        assert after_ctrl_c(process) == (130, ["umt_fast: interrupted"], True)


@pytest.mark.slow
def test_workers_end_with_a_killed_scan(tiny_list: Path) -> None:
    with under_way("scan", tiny_list) as process:
        process.kill()
        process.wait()
        assert ends(process.pid)


@pytest.mark.parametrize("name", list(command_line.COMMANDS))
def test_ctrl_c_in_every_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(rest: list[str]) -> None:
        raise KeyboardInterrupt

    module = SimpleNamespace(**{command_line.COMMANDS[name].partition(".")[2]: interrupted})
    monkeypatch.setattr(command_line.importlib, "import_module", lambda _: module)
    assert command_line.main([name]) == 130
    assert capsys.readouterr().err == "umt_fast: interrupted\n"
