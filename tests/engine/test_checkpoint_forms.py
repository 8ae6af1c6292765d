"""Checkpoints by parameter name: those that counted parameters are continued, and those written in the background are whole."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from tests.engine.test_sharding import make, rows, stage1, stage2, train
from umt_fast.engine import checkpoint, sharded_checkpoint
from umt_fast.engine import trainer as trainer_module
from umt_fast.engine.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "measure_matmul_rate", lambda *_: 1e12)


def equal(one: Any, two: Any) -> bool:
    """Nested values equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def state(run: Trainer) -> dict[str, Any]:
    return {"model": run.objective.trainable.state_dict(), "optimizer": run.optimizer.state_dict()}


def write_numbered(path: Path, run: Trainer) -> None:
    """Replaces a checkpoint of this run by one that an earlier version would have written: parameters by their number."""
    numbered = state(run)
    if path.suffix == ".pt":
        torch.save(torch.load(path, weights_only=True) | numbered, path)
        return
    rest = torch.load(path / "rest.pt", weights_only=True)
    tensors = {f"model.{name}": value for name, value in numbered["model"].items()}
    for index, values in numbered["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    shutil.rmtree(path)
    dcp.save(tensors, storage_writer=FileSystemWriter(path), no_dist=True)
    torch.save(rest | {"groups": numbered["optimizer"]["param_groups"]}, path / "rest.pt")


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("build", [stage1, stage2])
def test_numbered_and_named_checkpoints_continue_bit_for_bit(build: Any, kind: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", build, checkpoint=kind, max_steps=4)
    for form in ("named", "numbered"):
        begun = train(tmp_path / form, build, checkpoint=kind, max_steps=2)
        if form == "numbered":
            write_numbered(checkpoint.checkpoints(tmp_path / form)[-1][1], begun)
        continued = make(tmp_path / form, build, checkpoint=kind, max_steps=4)
        continued._resume()
        assert continued.step == 2 and equal(state(continued), state(begun)), "what was saved is what is loaded"
        continued = train(tmp_path / form, build, checkpoint=kind, max_steps=4)
        assert rows(tmp_path / form) == rows(tmp_path / "whole") and equal(state(continued), state(whole))


def test_parameters_are_named_in_the_file(tmp_path: Path) -> None:
    run = train(tmp_path, max_steps=1)
    found = checkpoint.load_newest(tmp_path)[1]["optimizer"]
    trained = {name for name, value in run.objective.trainable.named_parameters() if value.requires_grad}
    assert set(found["state"]) == trained == {name for group in found["param_groups"] for name in group["params"]}


def test_a_parameter_without_a_gradient_so_far_begins_as_in_the_whole_run(tmp_path: Path) -> None:
    """torch makes all moments when it loads; they must not count a step that was none."""

    def late(run: Trainer) -> torch.nn.Parameter:
        return run.parameters[-1]

    def steps(run: Trainer, last: int) -> Trainer:
        forward = run.objective.forward

        def partly(*given: Any) -> dict:
            late(run).requires_grad_(run.step >= 2)
            return forward(*given)

        run.objective.forward, run.last_step = partly, last
        run.train()
        return run

    whole = steps(make(tmp_path / "whole"), 4)
    steps(make(tmp_path / "parts"), 2)
    assert len(checkpoint.load_newest(tmp_path / "parts")[1]["optimizer"]["state"]) == len(whole.parameters) - 1
    continued = steps(make(tmp_path / "parts"), 4)
    assert float(continued.optimizer.state[late(continued)]["step"]) == 2
    assert equal(state(continued), state(whole))


def test_other_groups_are_refused(tmp_path: Path) -> None:
    train(tmp_path, max_steps=1)
    other = make(tmp_path)
    other.optimizer.param_groups[0]["params"].append(other.optimizer.param_groups[-1]["params"].pop())
    with pytest.raises(checkpoint.CheckpointError, match="groups of parameters are not the"):
        other.train()


class Watched:
    """A background writer that is slow: while a part is written, training goes on."""

    def __init__(self, run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.ahead, self.seen = run, [], []
        write = FileSystemWriter.write_data

        def slow(writer: FileSystemWriter, *given: Any) -> Any:
            begun, end = run.saving_step, time.monotonic() + 60
            while run.step < min(begun + 1, run.last_step) and time.monotonic() < end:
                time.sleep(0.01)
            self.ahead.append(run.step - begun)
            self.seen.append([step for step, _ in checkpoint.checkpoints(run.folder)])
            return write(writer, *given)

        save = run._save

        def noted() -> None:
            run.saving_step = run.step
            save()

        run._save = noted
        monkeypatch.setattr(FileSystemWriter, "write_data", slow)


def test_in_the_background_the_weights_of_the_step_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next step changes them; the checkpoint before stays until this one is whole."""
    options = {"checkpoint": "sharded", "save_every": 2, "max_steps": 6}
    train(tmp_path / "plain", keep=9, **options)
    run = make(tmp_path / "background", keep=1, async_save=True, **options)
    watched = Watched(run, monkeypatch)
    published = []
    run.saver.published = lambda path, step: published.append(
        (step, run.step, sharded_checkpoint.read_weights(path)["model"])
    )
    run.train()
    # By a step at least, or two where the machine is slow at writing; behind the last save there is none.
    assert all(ahead in (1, 2) for ahead in watched.ahead[:2]) and watched.ahead[2] == 0, "training did not go on"
    assert watched.seen == [[], [2], [2, 4]]
    assert [(step, at > step or step == 6) for step, at, _ in published] == [(2, True), (4, True), (6, True)]
    for step, _, model in published:
        same = sharded_checkpoint.read_weights(tmp_path / "plain" / f"checkpoint-{step:08d}.sharded")["model"]
        assert equal(model, same), f"step {step}"
    assert rows(tmp_path / "background") == rows(tmp_path / "plain")


def test_in_the_background_older_checkpoints_go_when_the_newer_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, checkpoint="sharded", save_every=2, max_steps=6, keep=1, async_save=True)
    watched = Watched(run, monkeypatch)
    run.train()
    assert watched.seen == [[], [2], [4]]
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [6] and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("last", [4, 6])
def test_a_full_disk_in_the_background_is_told(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next save, or by the end of the run."""
    write = FileSystemWriter.write_data

    def full(writer: FileSystemWriter, *given: Any) -> Any:
        if f"{last:08d}" in str(writer.path):
            raise OSError(28, "No space left on device")
        return write(writer, *given)

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(checkpoint.CheckpointError, match=f"{last:08d}.sharded cannot be written: .*No space left"):
        train(tmp_path, checkpoint="sharded", save_every=2, max_steps=6, async_save=True)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == list(range(2, last, 2))
    assert not list(tmp_path.glob("*.partial"))


KILLED = """
import sys, time; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from torch.distributed.checkpoint import FileSystemWriter
from tests.engine.test_sharding import make
from umt_fast.engine import trainer as trainer_module
trainer_module.measure_matmul_rate = lambda *_: 1e12
out, write = Path(sys.argv[1]), FileSystemWriter.finish
def never_ends(writer, *given, **named):
    if "00000004" in str(writer.path):
        (out / "writing").touch()
        time.sleep(600)
    return write(writer, *given, **named)
FileSystemWriter.finish = never_ends
make(out, checkpoint="sharded", save_every=2, max_steps=6, async_save=True).train()
"""


def test_killed_in_the_middle_the_checkpoint_before_is_usable(tmp_path: Path) -> None:
    """When its parts are on disk, but not yet its index: nothing takes it for a checkpoint, and the run is repeated exactly."""
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(out), str(REPOSITORY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 240
        while process.poll() is None and not (out / "writing").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said[-3000:]
    assert list((out / "checkpoint-00000004.sharded.partial").glob("*.distcp")), "it was killed while it wrote"
    assert [step for step, _ in checkpoint.checkpoints(out)] == [2]
    options = {"checkpoint": "sharded", "save_every": 2, "max_steps": 6}
    continued, whole = train(out, async_save=True, **options), train(tmp_path / "whole", **options)
    assert rows(out) == rows(tmp_path / "whole") and equal(state(continued), state(whole))
    assert [step for step, _ in checkpoint.checkpoints(out)] == [4, 6] and not list(out.glob("*.partial"))
