"""Detectors trained by `train` on each layout of movies, whatever the number of processes and ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.detection_world import configured, write_world
from umt_fast.config import ConfigError
from umt_fast.data.errors import DataError
from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.engine.distributed import Ranks, current_ranks
from umt_fast.engine.tune_measure import difference, observe
from umt_fast.plan import work_of
from umt_fast.tasks import task_named, task_of, tuning
from umt_fast.train import train

pytest.importorskip("torchvision", reason="the detector needs torchvision")
pytest.importorskip("cv2", reason="views are resized by OpenCV: pip install opencv-python-headless")
TASK = task_named("detection")


def column(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def losses(folder: Path) -> list[float]:
    return column(folder, "loss")


def figures(folder: Path) -> list[float]:
    return column(folder, "val_map")


@pytest.mark.parametrize("layout", ["seconds", "frames", "whole"])
def test_every_layout_of_movies_gives_the_same_batches(layout: str, tmp_path: Path) -> None:
    write_world(tmp_path, layout)
    config = configured(tmp_path, tmp_path / "run", layout)
    batches = list(TASK.loader(config, current_ranks(config.run)))
    assert len(batches) == 2
    for batch in batches:
        assert batch["video"].shape == (3, 2, 32, 32, 3) and batch["video"].dtype == torch.uint8
        assert batch["boxes"].shape == (12, 4) and batch["labels"].shape == (12, 3)
        assert batch["box_clip"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert batch["box_valid"].view(3, 4).sum(1).tolist() == [2, 2, 2]
        assert "label" not in batch
    again = [batch["boxes"] for batch in TASK.loader(config, current_ranks(config.run))]
    assert all(torch.equal(batch["boxes"], boxes) for batch, boxes in zip(batches, again, strict=True))
    write_world(tmp_path / "plain")
    plain = TASK.loader(configured(tmp_path / "plain", tmp_path / "run"), current_ranks(config.run))
    for batch, other in zip(batches, plain, strict=True):
        assert torch.equal(batch["boxes"], other["boxes"]) and torch.equal(batch["labels"], other["labels"])
        difference_ = (batch["video"].float() - other["video"].float()).abs().mean()
        assert difference_ < 4, difference_  # two compressions of one picture


def test_decoding_processes_change_nothing(tmp_path: Path) -> None:
    write_world(tmp_path)
    config = configured(tmp_path, tmp_path / "run")
    alone = list(TASK.loader(config, current_ranks(config.run)))
    config.data.workers = 2
    for batch, other in zip(alone, TASK.loader(config, current_ranks(config.run)), strict=True):
        assert batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def test_a_run_learns_and_continues_where_it_stopped(tmp_path: Path) -> None:
    write_world(tmp_path)
    config = configured(tmp_path, tmp_path / "whole")
    whole = train(config)
    found = losses(whole)
    assert len(found) == 80 and sum(found[-10:]) < 0.85 * sum(found[:10])
    config.run.out, config.run.max_steps = str(tmp_path / "parts"), 25
    train(config)
    config.run.max_steps = 0
    parts = train(config)
    assert losses(parts) == found
    first, second = (torch.load(max(f.glob("checkpoint-0*.pt")), weights_only=True)["model"] for f in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_list_of_boxes_is_another_run(tmp_path: Path) -> None:
    write_world(tmp_path)
    config = configured(tmp_path, tmp_path / "run")
    config.run.max_steps = 2
    train(config)
    table = tmp_path / "truth.csv"
    table.write_text(table.read_text().replace(",3,0", ",2,0", 1))
    config.run.max_steps = 4
    with pytest.raises(CheckpointError, match="another list of clips"):
        train(config)


def fit_on_a_rank(rank: int, folder: str, parallel: str) -> None:
    import os

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": Path(folder, "port").read_text(),
    }
    torch.set_num_threads(1)
    config = two_steps(Path(folder), "ranks")
    config.run.parallel = parallel
    train(config)


def two_steps(folder: Path, name: str) -> object:
    config = configured(folder, folder / name)
    config.run.batch_size, config.run.epochs = 1, 2
    # Judged by five key frames, one rank more than the other: that one has a turn without a clip.
    config.data.validation = str(folder / "five.csv")
    (folder / "five.csv").write_text("".join(f"movie{n},0902,0.1,0.1,0.5,0.5,{1 + n % 3},0\n" for n in range(5)))
    config.judging.boxes = str(folder / "boxes.csv")
    return config


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_process_trains(parallel: str, tmp_path: Path) -> None:
    """A process that takes the ranks' batches as two micro-steps. The rates of both follow from the same global batch."""
    import socket

    write_world(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    mp.spawn(fit_on_a_rank, (str(tmp_path), parallel), 2)
    config = two_steps(tmp_path, "alone")
    config.run.accumulate = 2
    alone = train(config)
    assert losses(alone) == pytest.approx(losses(tmp_path / "ranks"), rel=1e-5)
    assert figures(alone) == pytest.approx(figures(tmp_path / "ranks"), abs=1e-3) and len(figures(alone)) == 2
    first, second = (
        torch.load(max(f.glob("checkpoint-0*.pt")), weights_only=True)["model"] for f in (alone, tmp_path / "ranks")
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)
    assert not dist.is_initialized()


def test_it_is_planned_tuned_and_described(tmp_path: Path) -> None:
    write_world(tmp_path)
    config = configured(tmp_path, tmp_path / "run")
    assert task_of(config) is TASK and TASK.clips_of_epoch(config) == (6, f"counted in {tmp_path / 'truth.csv'}")
    assert TASK.visible_tokens(config) == 8
    work = work_of(config)
    assert work.trained == sum(p.numel() for p in TASK.untrained(config).parameters()) and work.flops > 0
    drawn, (made,) = next(iter(TASK.loader(config, current_ranks(config.run)))), TASK.random_batches(config)
    assert {name: (v.shape, v.dtype) for name, v in drawn.items()} == {n: (v.shape, v.dtype) for n, v in made.items()}
    config.student.drop_path = 0.5
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    cases = [tuning.build_case("detection", record, exact=True) for _ in range(2)]
    assert not difference(observe(cases[0]), observe(cases[1]), "fp32")
    config = TASK.settled(config)
    described = TASK.describe(config)
    assert described["task"] == "detection" and described["num_classes"] == 3 and "lr" not in described
    assert described["clips"] == {"sparse": False, "frames": "described", "stride": 2, "short_side": 48}
    assert described["vit"]["position_grid"] == [8, 14, 14]
    config.data.train = ""
    assert TASK.clips_of_epoch(config) is None


@pytest.mark.parametrize(
    "change,said",
    [
        ({"data": {"flip": False}}, r"data\.flip is False, but key frames are read and cut as clips\.\* says"),
        ({"data": {"num_sample": 2}}, r"data\.num_sample is 2"),
        ({"clips": {"frame_rate": 8.0}}, r"clips\.frame_rate is 8\.0, but clips\.movies is 'seconds'"),
        ({"clips": {"first_second": 7}}, r"clips\.first_second is 7"),
        ({"clips": {"frames": "still"}}, r"clips\.sparse is False, but clips\.frames is 'still'"),
        ({"clips": {"sparse": True}}, r"clips\.stride is 2, but clips\.frames is 'described'"),
    ],
    ids=str,
)
def test_options_that_are_not_read_are_refused(change: dict, said: str, tmp_path: Path) -> None:
    write_world(tmp_path)
    config = configured(tmp_path, tmp_path / "run")
    for section, values in change.items():
        setattr(config, section, dataclasses.replace(getattr(config, section), **values))
    with pytest.raises(ConfigError, match=said):
        train(config)


def test_what_cannot_be_read_is_replaced_in_training_and_counted(tmp_path: Path) -> None:
    write_world(tmp_path)
    (tmp_path / "movie2" / "901.mp4").write_bytes(b"no video")
    config = configured(tmp_path, tmp_path / "run")
    config.data.max_bad_share = 0.5
    loader = TASK.loader(config, Ranks(0, 1, torch.device("cpu")))
    seen = [index for batch in loader for index in batch["index"].tolist()]
    assert len(seen) == 6 and 2 not in seen
    assert list(loader.bad_files) == ["movie2, second 902"] and "901.mp4" in loader.bad_files["movie2, second 902"]
    config.data.max_bad_share = 0.1
    with pytest.raises(DataError, match=r"1 of 6 clips are unreadable"):
        list(TASK.loader(config, Ranks(0, 1, torch.device("cpu"))))


@pytest.mark.parametrize(
    "layout,gone,said",
    [
        ("seconds", "movie3/902.mp4", r"1 one-second files are missing, the first is .*movie3/902\.mp4"),
        ("frames", "movie3", r"line 7: the size of movie 'movie3' is not known"),
        ("frames", "movie3/movie3_000001.jpg", r"line 7: the size of movie 'movie3' is not known"),
        ("whole", "movie3.mkv", r"line 7: the size of movie 'movie3' is not known"),
    ],
)
def test_missing_movies_are_told_before_the_first_step(layout: str, gone: str, said: str, tmp_path: Path) -> None:
    import shutil

    write_world(tmp_path, layout)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = configured(tmp_path, tmp_path / "run", layout)
    with pytest.raises(DataError, match=said) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_no_list_and_no_folder(tmp_path: Path) -> None:
    config = configured(tmp_path, tmp_path / "run")
    with pytest.raises(DataError, match="no CSV file at .*truth.csv; give one with lines of `movie,second,x1"):
        train(config)
    config.data.root = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match="absent is not a folder; give one as --root .train: --data.root"):
        train(config)
    config.data.train = ""
    with pytest.raises(ConfigError, match="data.train is empty; give AVA's ground truth"):
        train(config)
