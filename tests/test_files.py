"""Files are there as a whole or not at all: after a kill, on a full disk, and beside others who write them."""

import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umt_fast.cli.embed import write_features
from umt_fast.engine import checkpoint
from umt_fast.files import LockedError, WriteError, atomic_path, checksum, lock, put, write_json, write_text
from umt_fast.models.weights import save_state

REPOSITORY = Path(__file__).resolve().parents[1]
LARGE = torch.zeros(100_000)
WRITERS = {
    "write_json": lambda path: write_json(path, [0] * 100_000),
    "write_json shared": lambda path: write_json(path, [0] * 100_000, shared=True),
    "write_text": lambda path: write_text(path, (f"{n}\n" for n in range(100_000))),
    "checkpoint": lambda path: checkpoint.write(path, {"model": LARGE}),
    "save_state": lambda path: save_state({"a": LARGE}, path),
    "save_state safetensors": lambda path: save_state({"a": LARGE}, path.with_suffix(".safetensors")),
    "write_features": lambda path: write_features(path, {"a": LARGE}, [], {}),
}


def child(program: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a program that may use this module as `t`."""
    head = "import os, sys, tests.test_files as t; from pathlib import Path\nfrom umt_fast import files\n"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", head + program, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.process
def test_killed_between_writing_and_renaming_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")
    done = child(
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\nfiles.write_json(Path(sys.argv[1]), 'new' * 999)", path
    )
    assert done.returncode == -9, done.stderr
    assert path.read_text() == '"old"\n' and (tmp_path / "a.json.writing").read_text() == f'"{"new" * 999}"\n'
    write_json(path, "newer")
    assert path.read_text() == '"newer"\n' and [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.process
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses to let a file grow, as on a full disk."""
    names = ["a.bin", "a.safetensors"]
    for name in names:
        (tmp_path / name).write_text("old")
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "for name, write in t.WRITERS.items():\n"
        "    try: write(Path(sys.argv[1]))\n"
        "    except Exception as error: print(f'{name}: {type(error).__name__}: {error}')\n"
    )
    done = child(program, tmp_path / "a.bin")
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == list(WRITERS), done.stdout + done.stderr
    kinds = ("WriteError", "CheckpointError", "WeightsError", "ConfigError")
    for line in said:
        assert f"{tmp_path / 'a'}." in line and "cannot be written: " in line and line.split(": ")[1] in kinds, line
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_text() == "old" for name in names)


def test_the_reason_is_told_where_it_cannot_begin(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="none/a.json cannot be written: No such file or directory$") as caught:
        write_json(tmp_path / "none" / "a.json", 1)
    # Ranks tell each other.
    told = pickle.loads(pickle.dumps(caught.value))
    assert str(told) == str(caught.value) and told.reason == "No such file or directory"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_another_error_comes_through_and_leaves_nothing(kind: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(kind), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise kind
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_are_those_of_the_umask(umask: int, name: str, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / "a.bin")
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


@pytest.mark.slow
@pytest.mark.process
def test_several_may_write_one_file(tmp_path: Path) -> None:
    """Another process writes it while this one does; the last to end stays, whole."""
    path = tmp_path / "a.json"
    with atomic_path(path, shared=True) as temporary:
        temporary.write_text("begun first")
        done = child("files.write_json(sys.argv[1], 'ended first', shared=True)", path)
        assert done.returncode == 0 and path.read_text() == '"ended first"\n', done.stderr
    assert path.read_text() == "begun first" and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    put(tmp_path / "new", tmp_path / "old")
    assert [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))] == ["old", "old/new"]


def test_one_holds_a_lock_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path):
        with pytest.raises(LockedError, match="another process holds"), lock(path):
            pass
        with lock(tmp_path / "other"):
            pass
    with lock(path):
        pass


@pytest.mark.skipif(shutil.which("b2sum") is None, reason="coreutils' b2sum is not here")
def test_checksums_are_blake2b_of_128_bits(tmp_path: Path) -> None:
    parts = [os.urandom(3_000_000), b"", b"text"]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).write_bytes(part)
    (tmp_path / "all").write_bytes(b"".join(parts))

    def outside(name: str) -> str:
        command = ["b2sum", "-l", "128", str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]

    assert checksum(parts[0]) == checksum([tmp_path / "0"]) == outside("0")
    assert checksum([parts[0], tmp_path / "1", str(tmp_path / "2")]) == outside("all")
