"""`eval detect` and validation during training: what is judged, by which files, by how many ranks."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.detection_world import HEIGHT, NAMES, WIDTH, configured, write_world
from umt_fast.__main__ import main
from umt_fast.config import JudgingConfig
from umt_fast.data.sources.detections import AVA_CLASSES
from umt_fast.tasks.frame_map import frame_map, read_boxes, read_label_map
from umt_fast.tasks.judge import names_of
from umt_fast.train import train

pytest.importorskip("torchvision", reason="the detector needs torchvision")
pytest.importorskip("cv2", reason="views are resized by OpenCV: pip install opencv-python-headless")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The movies, and in run/ a detector trained on them, judged by the same ones after its last epoch."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    config = configured(root, root / "run")
    config.data.validation, config.run.validate_epochs = config.data.train, 10
    config.judging = JudgingConfig(boxes=str(root / "boxes.csv"), label_map=str(root / "classes.pbtxt"))
    train(config)
    return root


def newest(world: Path) -> str:
    return str(max((world / "run").glob("checkpoint-0*.pt")))


def judged(world: Path, capsys: pytest.CaptureFixture, *more: str, file: str = "") -> dict:
    capsys.readouterr()
    words = [*more] if "--boxes" in more else ["--boxes", str(world / "boxes.csv"), *more]
    table = ["eval", "detect", file or newest(world), str(world / "truth.csv"), "--workers", "0", "--device", "cpu"]
    assert main([*table, *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_who_is_red_blue_and_green(world: Path, capsys: pytest.CaptureFixture) -> None:
    scores = world / "found.csv"
    labels = str(world / "classes.pbtxt")
    found = judged(world, capsys, "--label_map", labels, "--scores", str(scores), "--batch_size", "4")
    assert found["map"] > 0.95 and (found["key_frames"], found["boxes"]) == (6, 12)
    assert set(found["per_class"]) == set(NAMES.values())
    rows = list(csv.reader(open(scores, newline="")))
    assert len(rows) == 12 * 3 and all(len(row) == 8 for row in rows)
    again = frame_map(read_boxes(world / "truth.csv"), read_boxes(scores), read_label_map(labels))
    assert again.mean == found["map"]
    # The box that was judged is the detector's, not the widened one that its features were read in.
    truth = {tuple(row[:6]) for row in csv.reader(open(world / "truth.csv", newline=""))}
    corners = {tuple(f"{float(value):.2f}" for value in row[2:6]) for row in rows}
    assert corners == {tuple(f"{float(value):.2f}" for value in row[2:6]) for row in truth}


def test_boxes_of_a_lower_score_and_excluded_frames(world: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Every movie has a third box of score .4."""
    assert judged(world, capsys, "--min_box_score", "0.3")["boxes"] == 18
    (tmp_path / "excluded.csv").write_text("movie1,0902\nmovie4,902\n")
    found = judged(world, capsys, "--excluded", str(tmp_path / "excluded.csv"))
    assert (found["key_frames"], found["boxes"]) == (4, 8)


def test_boxes_as_json(world: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    images, boxes = [], []
    for number, row in enumerate(csv.reader(open(world / "boxes.csv", newline=""))):
        movie, second = row[0], int(row[1])
        if {"id": movie} not in [{"id": image["movie"]} for image in images]:
            images.append({"id": len(images), "movie": movie, "timestamp": second, "width": WIDTH, "height": HEIGHT})
        x1, y1, x2, y2 = (float(value) * size for value, size in zip(row[2:6], (WIDTH, HEIGHT) * 2, strict=True))
        boxes.append({"image_id": images[-1]["id"], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(row[7])})
        assert number < 18
    (tmp_path / "a.json").write_text(json.dumps({"images": images}))
    (tmp_path / "b.json").write_text(json.dumps(boxes))
    files = ("--boxes", str(tmp_path / "b.json"), "--annotations", str(tmp_path / "a.json"))
    assert judged(world, capsys, *files, "--root", str(world)) == judged(world, capsys)


def test_an_official_file_is_judged_when_told_its_model(
    world: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    page = tmp_path / "page.py"
    page.write_text(
        "from pathlib import Path\nfrom tests.detection_world import configured\n"
        "def small():\n    return configured(Path('.'), Path('.'))\n"
    )
    state = torch.load(newest(world), weights_only=True)["model"]
    torch.save({"module": state}, tmp_path / "official.pt")
    # A bare file does not say that its positions were resized from the official grid.
    found = judged(world, capsys, "--model", f"{page}:small", file=str(tmp_path / "official.pt"))
    assert set(found["per_class"]) == {"1", "2", "3"} and 0 < found["map"] <= 1


def test_validation_keeps_the_best_and_continues(world: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = {row["step"]: row["val_map"] for row in rows if "val_map" in row}
    assert sorted(figures) == [20, 40, 60, 80] and figures[80] > 0.95
    best = torch.load(world / "run" / "checkpoint-best.pt", weights_only=True)
    assert best["validation"]["figures"]["map"] == max(figures.values())
    labels = str(world / "classes.pbtxt")
    assert judged(world, capsys, "--label_map", labels)["map"] == pytest.approx(figures[80], abs=1e-12)


def judge_on_a_rank(rank: int, folder: str, out: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": Path(out, "port").read_text(),
    }
    torch.set_num_threads(1)
    world = Path(folder)
    table = ["eval", "detect", newest(world), str(world / "truth.csv"), "--boxes", str(world / "boxes.csv")]
    table += ["--scores", f"{out}/ranks.csv", "--out", f"{out}/ranks.json", "--workers", "0", "--batch_size", "2"]
    assert main([*table, "--device", "cpu"]) == 0


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(world: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    alone = judged(world, capsys, "--scores", str(tmp_path / "alone.csv"), "--batch_size", "2")
    mp.spawn(judge_on_a_rank, (str(world), str(tmp_path)), 2)
    assert json.loads((tmp_path / "ranks.json").read_text()) == alone
    assert (tmp_path / "ranks.csv").read_text() == (tmp_path / "alone.csv").read_text()


@pytest.mark.parametrize(
    "words,said",
    [
        ((), "needs a person detector's boxes; give them: --boxes FILE .train: --judging.boxes"),
        (
            ("--boxes", "b.json"),
            "--boxes b.json names images by number; give the file that lists them as --annotations",
        ),
        (("--boxes", "absent.csv"), "no CSV file at absent.csv"),
        (("--boxes", "BOXES", "--label_map", "absent.pbtxt"), "no label map at absent.pbtxt"),
        (("--boxes", "BOXES", "--annotations", "a.json"), "--annotations is a.json, but no .json boxes"),
        (("--boxes", "BOXES", "--min_box_score", "0.99"), r"no box of score 0.99 or more .*the best score is 0.95"),
        (("--boxes", "BOXES", "--max_seconds", "3"), "max_seconds is 3.0, and key frames are seconds of movies"),
        (
            ("--boxes", "BOXES", "--movies", "whole"),
            "the size of movie 'movie0' is not known; it is missing below --root",
        ),
        (("--boxes", "BOXES", "--root", "absent"), "absent is not a folder; give one as --root .train: --data.root"),
        (("--boxes", "BOXES", "--first_second", "0"), "--first_second is 0, and movies are read as 'seconds'"),
        (("--boxes", "BOXES", "--movies", "frames", "--frame_rate", "-1"), "--frame_rate is -1.0; it must be positive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_missing_is_named(world: Path, words: tuple, said: str, capsys: pytest.CaptureFixture) -> None:
    words = tuple(str(world / "boxes.csv") if word == "BOXES" else word for word in words)
    capsys.readouterr()
    assert main(["eval", "detect", newest(world), str(world / "truth.csv"), "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err

    assert re.search(said, error) and error.count("umt_fast: error") == 1 and "Traceback" not in error


def test_the_judged_classes(tmp_path: Path, world: Path) -> None:
    """AVA's list for its benchmark leaves 20 of 80 out, among them 2 (crawl), 16 and 75."""
    sixty = names_of("", AVA_CLASSES)
    assert len(sixty) == 60 and not {2, 16, 75, 0, 81} & sixty.keys() and {1, 3, 80} <= sixty.keys()
    assert names_of("", 4) == {1: "1", 2: "2", 3: "3", 4: "4"}
    with pytest.raises(ValueError, match="has class 3, and the detector's are 1 to 2"):
        names_of(str(world / "classes.pbtxt"), 2)


def test_movies_are_read_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole movies that begin at second 901: the command needs neither again, and says what it takes."""
    write_world(tmp_path, "whole")
    config = configured(tmp_path, tmp_path / "run", "whole")
    config.run.epochs, config.run.warmup_epochs = 1, 0
    config.optim.warmup_lr = 0.0
    train(config)
    caplog.set_level("INFO")
    found = judged(tmp_path, capsys)
    assert found["key_frames"] == 6
    assert "movies are read as in training: --movies whole --first_second 901" in caplog.text
    assert judged(tmp_path, capsys, "--movies", "whole", "--first_second", "901") == found
    # A bare file has no settings; the recipe that is named has.
    page = tmp_path / "page.py"
    page.write_text(
        "from pathlib import Path\nfrom tests.detection_world import configured\n"
        "def whole():\n    return configured(Path('.'), Path('.'), 'whole')\n"
    )
    torch.save(torch.load(newest(tmp_path), weights_only=True)["model"], tmp_path / "bare.pth")
    bare = judged(tmp_path, capsys, "--model", f"{page}:whole", file=str(tmp_path / "bare.pth"))
    assert bare["key_frames"] == 6
    # A second earlier the key frame is the movie's end, which the run's setting would not tell.
    capsys.readouterr()
    wrong = ["--boxes", str(tmp_path / "boxes.csv"), "--first_second", "900", "--workers", "0", "--device", "cpu"]
    assert main(["eval", "detect", newest(tmp_path), str(tmp_path / "truth.csv"), *wrong]) == 2
    said = capsys.readouterr().err
    assert "--first_second and --frame_rate (train: --clips.first_second" in said, said
