"""A run folder belongs to one list of clips and to one run at a time."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.ranks import run_ranks
from umt_fast.__main__ import main
from umt_fast.config import DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.prepare.scan import scan
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.lists import read_list
from umt_fast.data.sources.prepared import Settings
from umt_fast.engine.checkpoint import CheckpointError, checkpoints, own_folder

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = f"{REPOSITORY}/tests/assets/tiny.py"


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Runs `train` and returns what it says on stderr: nothing but a refusal."""
    code = main(["train", *map(str, arguments)])
    said = capsys.readouterr().err
    assert code == (2 if "error" in said else 0) and "Traceback" not in said
    return said


def entries(folder: Path, *names: str) -> Path:
    table = folder / f"{'-'.join(names)}.csv"
    table.write_text("".join(f"{name}.mp4,{number}\n" for number, name in enumerate(names)))
    return table


@pytest.mark.parametrize("variant", ["tiny", "classes"])
def test_another_list_cannot_continue(
    variant: str, tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture
) -> None:
    other = entries(tmp_path, "video1", "video0")
    base = [f"{TINY}:{variant}", "--run.out", tmp_path / "run", "--run.max_steps"]
    assert not run(capsys, *base, 1, "--data.train", tiny_list)
    assert "made with another list of clips" in run(capsys, *base, 2, "--data.train", other)
    moved = tmp_path / "moved" / tmp_path.name
    moved.mkdir(parents=True)
    for number in range(2):
        os.link(tmp_path / f"video{number}.mp4", moved / f"video{number}.mp4")
    assert not run(capsys, *base, 2, "--data.train", entries(moved, "video0", "video1"))
    # Checkpoints of older versions do not know their list.
    newest = checkpoints(tmp_path / "run")[-1][1]
    content = torch.load(newest, weights_only=True)
    assert len(content["trainer"].pop("clips")) == 16
    torch.save(content, newest)
    assert not run(capsys, *base, 3, "--data.train", other)


def test_a_list_its_manifest_and_its_prepared_folder_are_the_same(tmp_path: Path, tiny_list: Path) -> None:
    data, manifest, packed = DataConfig(), tmp_path / "there" / "manifest.jsonl", tmp_path / "packed"
    scan(tiny_list, manifest, workers=1)
    prepare(tiny_list, packed, settings=Settings(segments=4), workers=0)
    kinds = [read_list(source, data) for source in (tiny_list, manifest, packed)]
    located = ClipLoader(kinds[0], DataConfig(prepared=(str(packed),)), num_frames=4, image_size=32, batch_size=1)
    assert len({located.identity, *(clips.identity() for clips in kinds)}) == 1


@pytest.mark.parametrize("co_training", ["alternating", "packed"])
def test_other_captioned_clips_cannot_continue(
    co_training: str, tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]))
    for number in range(2):
        Image.new("RGB", (50, 40), (99 * number, 0, 0)).save(tmp_path / f"{number}.png")

    def captions(name: str, key: str, files: list[str]) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{key: file, "caption": "a red thing"} for file in files]))
        return path

    films = [captions(name, "video", ["video0.mp4", "video1.mp4"]) for name in ("first", "second")]
    films.append(captions("third", "video", ["video1.mp4", "video1.mp4"]))
    pictures = [
        captions(name, "image", files) for name, files in (("p", ["0.png", "1.png"]), ("q", ["1.png", "0.png"]))
    ]
    base = [f"{TINY}:captions", "--tokenizer", tmp_path, "--co_training", co_training, "--run.out", tmp_path / "run"]

    def go(steps: int, videos: list[Path], images: list[Path]) -> str:
        return run(capsys, *base, "--run.max_steps", steps, "--videos", *videos, "--images", *images)

    assert not go(1, films[:2], pictures)
    for videos, images in ((films[::2], pictures), (films[1:], pictures), (films[:2], pictures[::-1])):
        assert "made with another list of clips" in go(2, videos, images)
    assert not go(2, films[:2], pictures)


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [TINY, "--data.train", tiny_list, "--run.out", tmp_path / "run"]
    with own_folder(tmp_path / "run", first=True):
        said = run(capsys, *arguments)
        assert f"another run is writing to {tmp_path / 'run'}" in said and len(said.splitlines()) == 1
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        with own_folder(tmp_path / "run", first=False):  # other ranks of the run that holds it
            pass
    assert not run(capsys, *arguments)


@pytest.mark.process
def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    """The system lets go of the lock, also where a program that the run had started lives on."""
    program = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "from umt_fast.engine.checkpoint import own_folder\n"
        "with own_folder(Path(sys.argv[1]), first=True):\n"
        "    print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        left = int(process.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match="another run"), own_folder(tmp_path, first=True):
                pass
            process.send_signal(signal.SIGKILL)
            process.wait()
            with own_folder(tmp_path, first=True):
                os.kill(left, 0)
        finally:
            os.kill(left, signal.SIGKILL)


@pytest.mark.process
@pytest.mark.slow
def test_every_rank_is_refused(tmp_path: Path) -> None:
    """One that was not told would wait for the others for ever."""
    program = (
        "import sys; from pathlib import Path\n"
        "from umt_fast.config import RunConfig\n"
        "from umt_fast.engine.checkpoint import CheckpointError, own_folder\n"
        "from umt_fast.engine.distributed import distributed_run\n"
        "with distributed_run(RunConfig(device='cpu')) as ranks:\n"
        "    try:\n"
        "        with own_folder(Path(sys.argv[1]), first=ranks.first):\n"
        "            print('entered')\n"
        "    except CheckpointError as error:\n"
        "        print(f'rank {ranks.rank}: {error}')\n"
    )
    with own_folder(tmp_path / "run", first=True):
        done = run_ranks(tmp_path / "ranks.py", program, tmp_path / "run")
    assert all(f"rank {rank}: another run is writing" in done.stdout for rank in (0, 1)), done.stdout
    assert "entered" not in done.stdout


def test_file_systems_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with own_folder(tmp_path, first=True), own_folder(tmp_path, first=True):
        pass
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second and "cannot be locked (Function not implemented)" in first


def test_settings_that_name_no_folder_and_no_seed(capsys: pytest.CaptureFixture) -> None:
    assert "run.out is empty" in run(capsys, f"{TINY}:tiny", "--run.out", "")
    assert "run.seed is -1; it must lie in" in run(capsys, f"{TINY}:tiny", "--run.seed", -1)
