"""Two ranks: DDP, FSDP2 and one process train alike, and each continues what another saved.

All runs of two ranks happen once, in one launch (`every_run`), and the tests read what they left.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.small_models import small_text
from umt_fast.__main__ import main
from umt_fast.config import (
    AlignConfig,
    ConfigError,
    MaskConfig,
    OptimConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    VitConfig,
)
from umt_fast.engine import checkpoint, sharded_checkpoint, sharding
from umt_fast.engine import trainer as trainer_module
from umt_fast.engine.distributed import distributed_run
from umt_fast.engine.trainer import NonFiniteError, Stopped, Trainer
from umt_fast.models.weights import load_state
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.tasks.video_text import VideoTextPretraining

REPOSITORY = Path(__file__).resolve().parents[2]
# Without drop path and with every token visible a rank's place decides nothing: two ranks see what one process sees.
VIT = {"width": 32, "depth": 2, "num_heads": 2, "image_size": 32, "num_frames": 2, "drop_path": 0.0}
TEACHER = {
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 16,
    "image_size": 32,
    "output_dim": 16,
    "weights": "untrained",
}


def stage1(run: RunConfig) -> nn.Module:
    return UnmaskedAlignment(
        Stage1Config(
            run=run,
            student=VitConfig(**VIT, checkpoint_blocks=1),
            teacher=TeacherConfig(**TEACHER),
            mask=MaskConfig(ratio=0.0),
            align=AlignConfig(num_layers=2),
        )
    )


def stage2(run: RunConfig) -> nn.Module:
    text = small_text(depth=2, vocab_size=20)
    config = Stage2Config(
        run=run,
        student=VitConfig(**VIT),
        teacher=TeacherConfig(**TEACHER),
        align=AlignConfig(num_layers=2),
        text=text,
        bert="untrained",
        embed_dim=8,
        max_length=6,
    )
    return VideoTextPretraining(config, mask_id=4, special=(0, 2, 3))


class Loader:
    """Sixteen random captioned clips in a fixed order. bad: the clip that is not a number; stop_at: SIGTERM before it."""

    def __init__(self, batch: int, rank: int, world_size: int, *, bad: int = -1, stop_at: int = -1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.video = torch.randn(16, 3, 2, 32, 32, generator=generator)
        self.ids = torch.randint(5, 20, (16, 6), generator=generator)
        if bad >= 0:
            self.video[bad] = float("nan")
        self.batch, self.rank, self.world_size, self.stop_at, self.position = batch, rank, world_size, stop_at, 0

    def __len__(self) -> int:
        return 12 * 4 // self.batch // self.world_size

    def set_epoch(self, epoch: int) -> None:
        pass

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def __iter__(self):
        while self.position < len(self):
            first = (self.position * self.world_size + self.rank) * self.batch
            index = torch.arange(first, first + self.batch) % 16
            if self.stop_at in index.tolist() and self.position > 0:
                os.kill(os.getpid(), signal.SIGTERM)
            self.position += 1
            ids = self.ids[index]
            yield {
                "video": self.video[index],
                "index": index,
                "ids": ids,
                "mask": torch.ones_like(ids, dtype=torch.bool),
                "sample": index,
            }


def make(
    out: Path,
    build=stage1,
    *,
    batch: int = 2,
    rank: int = 0,
    world_size: int = 1,
    bad: int = -1,
    stop_at: int = -1,
    clip_grad: float = 0.5,
    **run: object,
) -> Trainer:
    values = {"epochs": 1, "warmup_epochs": 0, "device": "cpu", "dtype": "fp32", "log_every": 1, "tensorboard": False}
    config = RunConfig(out=str(out), batch_size=batch, **(values | run))
    optim = OptimConfig(lr=3e-3, lr_batch=0, clip_grad=clip_grad)
    torch.manual_seed(0)
    loader = Loader(batch, rank, world_size, bad=bad, stop_at=stop_at)
    return Trainer(config, optim, build(config), loader)


def train(out: Path, build=stage1, **values: object) -> Trainer:
    trainer = make(out, build, **values)
    trainer.train()
    return trainer


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def held_values(owner: Trainer | dict) -> int:
    """How many values of the trained parameters, or of one parameter's moments, this rank holds."""
    tensors = owner.parameters if isinstance(owner, Trainer) else [owner["exp_avg"], owner["exp_avg_sq"]]
    return sum(local(tensor).numel() for tensor in tensors)


def act_as_a_gpu() -> None:
    """What a GPU does and this CPU would not: units are gathered as bf16, and autocast takes LayerNorms to fp32."""
    nn.LayerNorm.forward = lambda norm, x: F.layer_norm(
        x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
    )
    sharding.unit_dtype = lambda run, device: torch.bfloat16 if run.dtype == "bf16" else None


def every_run(out: Path) -> None:
    """What each of the two ranks does."""
    trainer_module.measure_matmul_rate = lambda *_: 1e12  # takes longer than the steps
    act_as_a_gpu()
    with distributed_run(RunConfig(device="cpu")) as ranks:
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        for parallel in ("ddp", "fsdp"):
            whole = train(out / parallel, accumulate=2, parallel=parallel, **place)
            held = [held_values(whole), *(held_values(state) for state in whole.optimizer.state.values())]
            (out / f"held_{parallel}_{ranks.rank}").write_text(json.dumps([held[0], sum(held[1:])]))
            train(out / f"stage2_{parallel}", stage2, parallel=parallel, max_steps=4, **place)
            train(out / f"bf16_{parallel}", accumulate=2, compress="bf16", parallel=parallel, max_steps=4, **place)
            train(out / f"half_{parallel}", dtype="bf16", parallel=parallel, max_steps=3, **place)
        train(out / "static", max_steps=5, **place)
        for kind in ("full", "sharded", "background"):
            form = {"checkpoint": "full"} if kind == "full" else {"checkpoint": "sharded"}
            form["async_save"] = kind == "background"
            for parallel, last in (("fsdp", 2), ("ddp", 4), ("fsdp", 6)):
                run = {"parallel": parallel, "max_steps": last, "save_every": 5, **form}
                train(out / f"crossing_{kind}", accumulate=2, **run, **place)
        # Stage 2 has a scalar, which is not cut, and a matrix under two names.
        for parallel, last in (("fsdp", 1), ("ddp", 2), ("fsdp", 4)):
            run = {"parallel": parallel, "checkpoint": "sharded", "max_steps": last}
            train(out / "stage2_crossing", stage2, **run, **place)
        newest = out / "crossing_sharded" / "checkpoint-00000006.sharded"
        if ranks.first:
            part = next(newest.glob("*.distcp"))
            part.write_bytes(part.read_bytes()[:100])
        train(out / "crossing_sharded", accumulate=2, parallel="fsdp", checkpoint="sharded", max_steps=6, **place)
        for stop_at in (7, -1):
            heard = stop_at if ranks.rank == 1 else -1  # the other rank hears nothing
            try:
                train(out / "stopped", accumulate=2, parallel="fsdp", stop_at=heard, log_every=2, **place)
            except Stopped as stop:
                (out / f"stopped_{ranks.rank}").write_text(str(stop))
        run = make(out / "bad", parallel="fsdp", bad=6, log_every=4, **place)
        try:
            run.train()
        except NonFiniteError as error:
            sound = all(torch.isfinite(local(parameter)).all() for parameter in run.parameters)
            (out / f"bad_{ranks.rank}").write_text(f"weights sound: {sound}. {error}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.engine.test_sharding import every_run\nevery_run(Path(sys.argv[1]))\n"
    )
    (out / "stderr").write_text(run_ranks(out / "ranks.py", program, out).stderr)
    return out


def rows(folder: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.process
@pytest.mark.slow
def test_ddp_fsdp_and_one_process_have_the_same_losses(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, batch=4, accumulate=2)
    one = rows(tmp_path)
    assert len(one) == 6 and one[0] - one[-1] > 0.3, "the run must learn something"
    assert max(rows(tmp_path, "grad_norm")) > 0.5, "clipping must have acted"
    for parallel in ("ddp", "fsdp"):
        assert rows(runs / parallel) == pytest.approx(one, rel=2e-6)
        assert rows(runs / parallel, "grad_norm") == pytest.approx(rows(tmp_path, "grad_norm"), rel=2e-5)


@pytest.mark.process
@pytest.mark.slow
def test_each_rank_holds_its_shard(runs: Path) -> None:
    (whole, moments), *shards = [
        json.loads((runs / f"held_{name}").read_text()) for name in ("ddp_0", "fsdp_0", "fsdp_1")
    ]
    assert moments == 2 * whole
    assert [shards[0][k] + shards[1][k] for k in range(2)] == [whole, moments]
    assert all(0.4 < shard[0] / whole < 0.6 for shard in shards)


@pytest.mark.process
@pytest.mark.slow
def test_static_graph_has_the_losses_of_one_process(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, batch=4, max_steps=5)
    assert rows(runs / "static") == pytest.approx(rows(tmp_path), rel=2e-6)


@pytest.mark.process
@pytest.mark.slow
def test_stage_2_under_fsdp(runs: Path) -> None:
    """Its temperature is a scalar outside the shards: a gradient not averaged would part the ranks and the losses."""
    ddp = rows(runs / "stage2_ddp")
    assert len(set(ddp)) == 4
    assert rows(runs / "stage2_fsdp") == pytest.approx(ddp, rel=5e-6)
    assert rows(runs / "stage2_crossing") == pytest.approx(ddp, rel=5e-6)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded", "background"])
def test_each_layout_continues_the_other(kind: str, runs: Path) -> None:
    folder = runs / f"crossing_{kind}"
    assert rows(folder) == pytest.approx(rows(runs / "ddp"), rel=5e-6)
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    suffix = "pt" if kind == "full" else "sharded"
    assert names == [f"checkpoint-{step:08d}.{suffix}" for step in (5, 6)], "keep 2, nothing partial left"


def test_shards_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match="run.parallel fsdp"):
        RunConfig(parallel="fsdp", compile=True)


@pytest.mark.process
@pytest.mark.slow
def test_a_cut_shard_is_damage(runs: Path) -> None:
    """It was passed over on both ranks, the step repeated, and the folder replaced by a sound one."""
    assert (runs / "stderr").read_text().count("checkpoint-00000006.sharded is damaged") == 2
    assert sharded_checkpoint.read_weights(runs / "crossing_sharded" / "checkpoint-00000006.sharded")["model"]


@pytest.mark.process
@pytest.mark.slow
def test_sharded_and_full_hold_the_same_weights(runs: Path) -> None:
    whole = checkpoint.load_newest(runs / "crossing_full")[1]["model"]
    parts = sharded_checkpoint.read_weights(runs / "crossing_sharded" / "checkpoint-00000006.sharded")
    assert parts["trainer"]["step"] == 6 and parts["model"].keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts["model"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert all(isinstance(value, Tensor) and type(value) is Tensor for value in whole.values())


@pytest.mark.process
@pytest.mark.slow
def test_the_commands_read_a_sharded_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = runs / "crossing_sharded" / "checkpoint-00000006.sharded"
    assert main(["convert", str(folder), str(tmp_path / "out.safetensors")]) == 0
    whole = sharded_checkpoint.read_weights(folder)["model"]
    converted = load_state(tmp_path / "out.safetensors")
    assert converted.keys() == whole.keys() and all(torch.equal(converted[name], whole[name]) for name in whole)
    assert main(["eval", "classify", str(folder), "list.csv"]) == 2
    assert "is of a stage-1 run" in capsys.readouterr().err
    assert main(["eval", "classify", str(tmp_path), "list.csv"]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.slow
def test_another_model_does_not_fit_a_sharded_checkpoint(runs: Path) -> None:
    folder = runs / "crossing_sharded" / "checkpoint-00000006.sharded"
    model = nn.Linear(3, 3)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the configured model"):
        sharded_checkpoint.read(folder, model, torch.optim.AdamW(model.parameters()))


def test_an_index_that_calls_something_is_refused(tmp_path: Path) -> None:
    import pickle

    (tmp_path / ".metadata").write_bytes(pickle.dumps(os.system))
    with pytest.raises(pickle.UnpicklingError, match="has no place for"):
        sharded_checkpoint.read_weights(tmp_path)


@pytest.mark.process
@pytest.mark.slow
def test_sigterm_on_one_rank_saves_the_shards_of_all(runs: Path) -> None:
    for rank in range(2):
        assert "stopped by signal 15 at step 2" in (runs / f"stopped_{rank}").read_text()
    assert rows(runs / "stopped") == pytest.approx(rows(runs / "fsdp"), rel=1e-6)


@pytest.mark.process
@pytest.mark.slow
def test_a_bad_clip_on_one_rank_reaches_no_shard(runs: Path) -> None:
    errors = [(runs / f"bad_{rank}").read_text() for rank in range(2)]
    assert all("weights sound: True" in error and "is not finite at step 2" in error for error in errors)
    assert "on another rank" in errors[0] and "6, 7" in errors[1]
    assert not checkpoint.checkpoints(runs / "bad")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_sent_as_bf16_train_alike(parallel: str, runs: Path) -> None:
    exact, rounded = rows(runs / "ddp")[:4], rows(runs / f"bf16_{parallel}")
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded[1:] != pytest.approx(exact[1:], rel=1e-6), "nothing was rounded"


@pytest.mark.process
@pytest.mark.slow
def test_bf16_compute_is_alike(runs: Path) -> None:
    """Sharding rounds the blocks' norms and biases to bf16 too, which DDP does only to what is multiplied."""
    assert rows(runs / "half_fsdp") == pytest.approx(rows(runs / "half_ddp"), rel=2e-2)
