"""The loop: exact resume, accumulation, ranks, signals, non-finite losses, checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from umt_fast.config import OptimConfig, RunConfig
from umt_fast.engine import checkpoint, precision
from umt_fast.engine.trainer import NonFiniteError, Trainer, step_seed

REPOSITORY = Path(__file__).resolve().parents[2]


class Toy(nn.Module):
    """Least squares with noise from the step's generators, so that a wrong seed shows in the loss."""

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.trainable = nn.Linear(4, 1)
        self.noise = noise

    def forward(self, batch: dict, seed: torch.Tensor) -> dict:
        x = batch["x"] + self.noise * torch.rand(batch["x"].shape)
        return {"loss": (self.trainable(x).squeeze(1) - batch["y"]).square().mean()}

    def flops_per_clip(self) -> float:
        return 24.0


class ToyLoader:
    def __init__(self, batch: int, count: int = 24, poison: int = -1, rank: int = 0, world_size: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 4, generator=generator)
        self.y = self.x.sum(1)
        self.batch, self.rank, self.world_size = batch, rank, world_size
        self.epoch = self.position = 0
        if poison >= 0:
            self.y[poison] = float("nan")

    def __len__(self) -> int:
        return len(self.x) // self.batch // self.world_size

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def name_of(self, index: int) -> str:
        return f"clip{index}.mp4"

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch))
        while self.position < len(self):
            first = (self.position * self.world_size + self.rank) * self.batch
            index = order[first : first + self.batch]
            self.position += 1
            yield {"x": self.x[index], "y": self.y[index], "index": index}


def trainer(
    out: Path,
    *,
    batch: int = 4,
    noise: float = 0.1,
    poison: int = -1,
    rank: int = 0,
    world_size: int = 1,
    **run: object,
) -> Trainer:
    torch.manual_seed(0)
    values = {"epochs": 3, "warmup_epochs": 1, "device": "cpu", "dtype": "fp32", "log_every": 1, "tensorboard": False}
    config = RunConfig(out=str(out), batch_size=batch, **(values | run))
    optim = OptimConfig(lr=0.05, lr_batch=0, **({"clip_grad": 0.0}))
    return Trainer(config, optim, Toy(noise), ToyLoader(batch, poison=poison, rank=rank, world_size=world_size))


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_stopped_in_mid_epoch_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").train()
    trainer(tmp_path / "parts", max_steps=8).train()
    trainer(tmp_path / "parts").train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == list(range(1, 19))
    final = [checkpoint.load_newest(tmp_path / name)[1]["model"] for name in ("whole", "parts")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    trainer(tmp_path / "large", batch=4, noise=0.0).train()
    trainer(tmp_path / "small", batch=2, accumulate=2, noise=0.0).train()
    for (_, large), (_, small) in zip(losses(tmp_path / "large"), losses(tmp_path / "small"), strict=True):
        assert small == pytest.approx(large, rel=1e-5)


def test_metrics_log_keeps_each_step_once_after_a_lost_tail(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=6).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 99.0}\n{"step": 8, "lo')  # written after the checkpoint, then killed
    trainer(tmp_path).train()
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 19))
    assert all(loss != 99.0 for _, loss in losses(tmp_path))


def test_non_finite_loss_stops_before_anything_is_written(tmp_path: Path) -> None:
    run = trainer(tmp_path, poison=5, log_every=4)
    with pytest.raises(NonFiniteError, match="clip5.mp4") as caught:
        run.train()
    step = int(str(caught.value).split("step ")[1].split(";")[0])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    assert step == order.index(5) // 4 + 1
    assert not checkpoint.checkpoints(tmp_path) or checkpoint.checkpoints(tmp_path)[-1][0] < step
    for _, path in checkpoint.checkpoints(tmp_path):
        assert all(torch.isfinite(value).all() for value in torch.load(path, weights_only=True)["model"].values())
    # The sound steps of the window are on record, and the bad update did not reach the weights in memory.
    assert [row for row, _ in losses(tmp_path)] == list(range(1, step))
    assert all(torch.isfinite(value).all() for value in run.objective.trainable.state_dict().values())


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    """Gradients scaled to norm 1e-6: Adam's first steps hardly change, its second moments show the clipped size."""
    free, clipped = trainer(tmp_path / "free", max_steps=1), trainer(tmp_path / "clipped", max_steps=1)
    clipped.clip_grad = 1e-6
    free.train(), clipped.train()

    def norm(run: Trainer) -> float:
        moments = [state["exp_avg_sq"] for state in run.optimizer.state.values()]
        return torch.cat([moment.flatten() for moment in moments]).sum().sqrt().item() / (1 - 0.95) ** 0.5

    (row,) = [json.loads(line) for line in (tmp_path / "clipped" / "metrics.jsonl").read_text().splitlines()]
    assert norm(free) == pytest.approx(row["grad_norm"], rel=1e-4)  # what is logged is the norm before clipping
    assert norm(clipped) == pytest.approx(1e-6, rel=1e-3)


def test_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path / "whole").train()
    trainer(tmp_path / "cut", max_steps=12).train()
    newest = checkpoint.checkpoints(tmp_path / "cut")[-1][1]
    newest.write_bytes(newest.read_bytes()[:500])
    trainer(tmp_path / "cut").train()
    assert newest.name in caplog.text and "damaged" in caplog.text
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_damaged_later_file_does_not_cost_sound_ones(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=6).train()
    (tmp_path / "checkpoint-00000015.pt").write_bytes(b"cut")
    trainer(tmp_path, max_steps=12, keep=1).train()
    assert checkpoint.load_newest(tmp_path)[1]["trainer"]["step"] == 12


def test_keep_policy(tmp_path: Path) -> None:
    trainer(tmp_path, epochs=5, keep=2, keep_every_epochs=2).train()
    assert [step // 6 for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 4, 5]


def test_disk_full_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = checkpoint.save(tmp_path, 1, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, 2, {"step": 2})
    assert [path for _, path in checkpoint.checkpoints(tmp_path)] == [old]
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.process
def test_a_write_that_really_fails(tmp_path: Path) -> None:
    """The system refuses to let the file grow, as on a full disk; the run ends in one line, older files whole."""
    script = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from umt_fast.engine import checkpoint\n"
        "folder = Path(sys.argv[1]); checkpoint.save(folder, 1, {'model': torch.zeros(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    checkpoint.save(folder, 2, {'model': torch.zeros(1_000_000)})\n"
        "except checkpoint.CheckpointError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "cannot be written" in done.stdout, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]
    assert checkpoint.load_newest(tmp_path)[1]["model"].shape == (10,)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, max_steps=2).train()

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(checkpoint.CheckpointError, match="may not be read: Permission denied"):
        trainer(tmp_path).train()


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, max_steps=3, tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == losses(tmp_path)


def test_another_batch_size_cannot_continue(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(checkpoint.CheckpointError, match="made with run.batch_size 4, this run has 8"):
        trainer(tmp_path, batch=8).train()
    with pytest.raises(checkpoint.CheckpointError, match="made with run.accumulate 1, this run has 2"):
        trainer(tmp_path, accumulate=2).train()


def test_another_order_of_clips_cannot_continue(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(checkpoint.CheckpointError, match="made with run.seed 0, this run has 1: the order of clips"):
        trainer(tmp_path, seed=1).train()
    # As many clips in a step, but the place in the epoch counts batches.
    with pytest.raises(checkpoint.CheckpointError, match="made with run.batch_size 4, this run has 2"):
        trainer(tmp_path, batch=2, accumulate=2).train()
    newest = checkpoint.checkpoints(tmp_path)[-1][1]
    content = torch.load(newest, weights_only=True)
    del content["trainer"]["seed"], content["trainer"]["batch_size"]  # as older versions left it
    torch.save(content, newest)
    trainer(tmp_path, seed=1).train()


def test_odd_lines_of_a_metrics_log_do_not_stop_a_run(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1.0}\n{not json}\n[1]\n')
    trainer(tmp_path).train()
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 19))


def test_only_the_first_rank_says_what_starts_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    from umt_fast.engine.distributed import distributed_run
    from umt_fast.models.weights import fit

    for rank, expected in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        caplog.clear()
        try:
            with distributed_run(RunConfig(device="cpu")):
                fit(nn.Linear(4, 1), {"weight": torch.ones(1, 4)}, "x.pt", fresh=("bias",))
        finally:
            for name in ("umt_fast", "umt_fast.weights", "kernels"):
                logging.getLogger(name).setLevel(logging.NOTSET)
        assert len(caplog.records) == expected


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    other = trainer(tmp_path)
    other.objective.trainable.weight = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(checkpoint.CheckpointError, match=r"1 tensors differ.* is \(1, 4\) in the file, \(2, 5\)"):
        other.train()


def test_resume_false_does_not_overwrite(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(checkpoint.CheckpointError, match="holds checkpoints"):
        trainer(tmp_path, resume=False).train()


def test_bf16_where_the_cpu_has_none_is_fp32_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert precision.usable_dtype("bf16", cpu) == "fp32" and "no bf16 instructions" in caplog.text
    assert precision.usable_dtype("bf16", torch.device("cuda")) == "bf16"
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert [precision.usable_dtype(name, cpu) for name in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_a_device_that_is_not_used_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    precision._say_left_out.cache_clear()
    assert [precision.pick_device("auto").type for _ in range(2)] == ["cpu"] * 2
    assert [record.getMessage() for record in caplog.records if "mps" in record.getMessage()] == [
        "WARNING: this machine's mps device is not used: umt_fast computes on CUDA GPUs and CPUs"
    ]
    caplog.clear()
    assert precision.pick_device("cpu").type == "cpu" and not caplog.records


def test_step_seeds_differ() -> None:
    seeds = {step_seed(0, rank, step, micro) for rank in range(4) for step in range(200) for micro in range(2)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
