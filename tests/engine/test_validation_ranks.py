"""Two ranks judge between epochs: whole and sharded models alike, also where one rank has fewer clips than the other."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import umt_fast.train as train_module
from tests.ranks import run_ranks
from umt_fast.config import FinetuneConfig, OptimConfig, RunConfig
from umt_fast.engine import precision, sharded_checkpoint
from umt_fast.engine import trainer as trainer_module
from umt_fast.engine.checkpoint import read_file
from umt_fast.engine.distributed import distributed_run
from umt_fast.train import train

pytestmark = [pytest.mark.process, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = ("val_top1", "val_top5")


def configured(out: Path, lists: Path, **run: object) -> FinetuneConfig:
    from tests.assets import tiny

    config = tiny.classes()
    config.run.out, config.run.batch_size, config.run.max_steps, config.run.epochs = str(out), 1, 0, 3
    config.optim = OptimConfig(lr=3e-3, lr_batch=0, ema_decay=run.pop("ema_decay", 0.0))
    config.student.drop_path = 0.0
    config.data.train, config.data.validation = str(lists / "tiny.csv"), str(lists / "unseen.csv")
    for name, value in run.items():
        setattr(config.run, name, value)
    return config


def every_run(out: Path, lists: Path) -> None:
    """What each of the two ranks does."""
    trainer_module.measure_matmul_rate = lambda *_: 1e12
    with distributed_run(RunConfig(device="cpu")) as ranks:
        # One process group for all runs: torchrun's store does not take the same names again and again.
        train_module.distributed_run = lambda run: contextlib.nullcontext(ranks)
        each_run(out, lists)


def each_run(out: Path, lists: Path) -> None:
    for parallel in ("ddp", "fsdp"):
        train(configured(out / parallel, lists, parallel=parallel))
        train(configured(out / f"averaged_{parallel}", lists, parallel=parallel, ema_decay=0.5))
    silent = configured(out / "silent", lists, parallel="fsdp", validate_epochs=0)
    silent.data.validation = ""
    train(silent)
    # A sharded model is judged before its first step: the checkpoint was saved and not judged.
    unjudged = configured(out / "late", lists, parallel="fsdp", checkpoint="sharded", max_steps=2, validate_epochs=0)
    unjudged.data.validation = ""
    train(unjudged)
    train(configured(out / "late", lists, parallel="fsdp", checkpoint="sharded", ema_decay=0.5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import av
    import numpy as np

    out = tmp_path_factory.mktemp("runs")
    for number in range(3):
        with av.open(str(out / f"video{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
            for frame in range(12):
                picture = np.full((40, 48, 3), 20 * frame + 5 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    (out / "tiny.csv").write_text("video0.mp4,0\nvideo1.mp4,1\n")
    (out / "unseen.csv").write_text("video0.mp4,0\nvideo1.mp4,1\nvideo2.mp4,1\n")
    program = (
        "import sys; from pathlib import Path\nfrom tests.engine.test_validation_ranks import every_run\n"
        "every_run(Path(sys.argv[1]), Path(sys.argv[1]))\n"
    )
    run_ranks(out / "ranks.py", program, out)
    return out


def rows(folder: Path, judged: bool) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if ("val_top1" in row) == judged]


def test_whole_and_sharded_models_have_the_same_figures(runs: Path) -> None:
    for name in ("ddp", "fsdp", "averaged_ddp", "averaged_fsdp"):
        assert [row["step"] for row in rows(runs / name, True)] == [1, 2, 3]
        # Of three clips: a clip that is counted twice, or not at all, makes other shares.
        assert all(3 * row["val_top1"] in (0, 1, 2, 3) and row["val_top5"] == 1 for row in rows(runs / name, True))
    for one, other in (("ddp", "fsdp"), ("averaged_ddp", "averaged_fsdp")):
        figures = [[[row[key] for key in FIGURES] for row in rows(runs / name, True)] for name in (one, other)]
        assert figures[0] == figures[1]


def test_training_of_a_sharded_model_does_not_notice(runs: Path) -> None:
    losses = [[(row["loss"], row["grad_norm"]) for row in rows(runs / name, False)] for name in ("fsdp", "silent")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_best_file_holds_what_was_judged(parallel: str, runs: Path) -> None:
    for name, key in ((parallel, "model"), (f"averaged_{parallel}", "model_ema")):
        kept = read_file(runs / name / "checkpoint-best.pt")
        step = kept["validation"]["step"]
        saved = runs / name / f"checkpoint-{step:08d}.pt"
        if saved.exists():  # two are kept
            content = read_file(saved)
            assert all(torch.equal(value, content[key][part]) for part, value in kept["model"].items())
        assert kept["validation"]["averaged"] == name.startswith("averaged")


def test_a_sharded_average_is_saved_continued_and_kept(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [row["step"] for row in rows(runs / "late", True)] == [2, 3]
    kept = sharded_checkpoint.read_weights(runs / "late" / "checkpoint-best.sharded")
    assert kept["model_config"]["num_classes"] == 2 and kept["validation"]["averaged"]
    # One process continues it and finds the average.
    monkeypatch.setattr(precision, "measure_matmul_rate", lambda *_: 1e12)
    newest = sharded_checkpoint.read_weights(runs / "late" / "checkpoint-00000003.sharded")
    assert newest["model"].keys() == kept["model"].keys()
    if kept["validation"]["step"] == 3:
        assert any(not torch.equal(value, newest["model"][name]) for name, value in kept["model"].items())
