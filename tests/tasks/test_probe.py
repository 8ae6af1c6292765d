"""`eval probe` as a whole: features of every kind of model, the command, ranks, refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import umt_fast
from tests import detection_world
from tests.videos import write_video
from umt_fast import recipe
from umt_fast.__main__ import main
from umt_fast.config import QuestionConfig
from umt_fast.data.sources.lists import read_list
from umt_fast.engine.distributed import Ranks
from umt_fast.models.weights import load_state, save_state
from umt_fast.pretrained.passes import embed
from umt_fast.probing import ProbeOptions
from umt_fast.probing.features import Room, features_of, shape_of
from umt_fast.tasks import task_of

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny.py"
CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen videos, dark and bright ones with noise, in a train and a test list; one more that is damaged."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(14):
        base = rng.integers(0, 60, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1).astype(int) + 150 * (number % 2)
        noisy = [np.clip(base + rng.integers(-20, 20, base.shape), 0, 255).astype(np.uint8) for _ in range(8)]
        write_video(folder / f"{number}.mp4", noisy)
        lines.append(f"{number}.mp4,{number % 2}")
    (folder / "bad.mp4").write_bytes(b"damaged")
    (folder / "train.csv").write_text("\n".join([*lines[:5], "bad.mp4,1", *lines[5:10]]))
    (folder / "test.csv").write_text("\n".join(lines[10:]))
    return folder


def saved(folder: Path, name: str) -> Path:
    if name == "boxes":
        config = detection_world.configured(folder, folder)
    elif name == "questions":
        base = recipe.load(f"{TINY}:captions")
        config = QuestionConfig(run=base.run, data=base.data, student=base.student, text=base.text, max_length=6)
    else:
        config = recipe.load(f"{TINY}:{name}")
    torch.manual_seed(0)
    module = task_of(config).untrained(config).trainable.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_state(module.state_dict(), folder / f"{name}.safetensors", task_of(config).describe(config))
    return folder / f"{name}.safetensors"


def probed(weights: Path, world: Path, capsys: pytest.CaptureFixture, *more: object) -> dict:
    capsys.readouterr()
    arguments = [weights, world / "test.csv", "--train", world / "train.csv", "--workers", 0, "--device", "cpu", *more]
    assert main(["eval", "probe", *map(str, arguments)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", ["tiny", "captions", "classes", "pairs", "questions", "boxes"])
def test_cached_features_are_those_of_a_loaded_model(tmp_path: Path, world: Path, name: str) -> None:
    weights = saved(tmp_path, name)
    model = umt_fast.load_model(weights=weights, device="cpu")
    data = ProbeOptions(workers=0).data()
    clips = read_list(world / "train.csv", data)
    for feature, folder in (("pooled", None), ("tokens", None), ("tokens", tmp_path)):
        room = Room(CPU, 16.0 if folder is None else 1e-9, folder)
        room.check(len(clips), shape_of(model, feature), feature)
        assert room.mapped == (folder is not None)
        options = {"feature": feature, "batch_size": 3, "name": "train", "max_bad_share": 1.0}
        found = features_of(model, clips, data, CPU, room, **options)
        assert found.index.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
        assert found.label.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
        assert not list(tmp_path.glob("*.features"))
        for row in found.index.tolist():
            expected = model.features(clips[row].path)
            if feature == "pooled":
                torch.testing.assert_close(found.rows[row], expected.pooled[0])
            else:
                own = expected.tokens[0].flatten(0, 2)
                torch.testing.assert_close(found.rows[row].float(), own, rtol=2**-8, atol=1e-5)
    index, vectors = embed(model, clips, data, CPU, batch_size=3)
    pooled = torch.cat([model.features(clips[row].path).pooled for row in index.tolist()])
    assert len(index) == 10 and pooled.std(0).max() > 1e-3
    torch.testing.assert_close(vectors["pooled"], pooled)


def test_the_command(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture) -> None:
    """Every kind of a stage-1 model; other test labels change the figures and never the choice."""
    weights = saved(tmp_path, "tiny")
    turned = [re.sub(r"\d$", lambda found: str(1 - int(found[0])), line) for line in _lines(world / "test.csv")]
    (world / "turned.csv").write_text("\n".join(turned))
    for kind, more in (
        ("linear", ["--rates", 1e-5, 1e-2]),
        ("attentive", ["--epochs", 5, "--rates", 1e-3]),
        ("knn", []),
    ):
        if kind == "knn":
            more = ["--neighbors", 3]
        scores = tmp_path / f"{kind}.json"
        found = probed(weights, world, capsys, "--kind", kind, *more, "--scores", scores)
        assert found["kind"] == kind and found["clips"] == 4 and found["classes"] == 2
        assert found["train_clips"] == 10 and found["unreadable"] == 1 and found["clips_in_both"] == 0
        assert found["top1"] == 1.0 and found["top5"] == 1.0
        written = json.loads(scores.read_text())
        assert [clip["label"] for clip in written["clips"]] == [0, 1, 0, 1]
        assert all(clip["found"][0][0] == clip["label"] for clip in written["clips"])
        capsys.readouterr()
        arguments = [weights, world / "turned.csv", "--train", world / "train.csv", "--workers", 0, "--device", "cpu"]
        assert main(["eval", "probe", *map(str, [*arguments, "--kind", kind, *more])]) == 0
        other = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert other == found | {"top1": 0.0}
        if kind != "knn":
            assert len(written["heads"]) == found["heads"] == {"linear": 6, "attentive": 2}[kind]
            own = [head for head in written["heads"] if head["rate"] == found["rate"]]
            assert found["weight_decay"] in [head["weight_decay"] for head in own]
    bare = tmp_path / "bare.pth"  # as official files are: tensors alone
    torch.save({name: value for name, value in load_state(weights).items()}, bare)
    more = ["--kind", "knn", "--neighbors", 3]
    assert probed(bare, world, capsys, *more, "--model", f"{TINY}:tiny") == found
    bf16 = probed(weights, world, capsys, *more, "--dtype", "bf16")
    assert bf16 == found


def test_figures_are_the_chosen_head_s(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture) -> None:
    """Labels that pixels do not tell: heads differ, and the one that is best on the test list is not looked for."""
    for name, labels in (("guess", "0120012012"), ("guess_test", "2010")):
        first = 0 if name == "guess" else 10
        lines = [f"{first + number}.mp4,{label}" for number, label in enumerate(labels)]
        (world / f"{name}.csv").write_text("\n".join(lines))
    weights, scores, seen = saved(tmp_path, "tiny"), tmp_path / "scores.json", []
    for seed in range(4):
        capsys.readouterr()
        arguments = ["eval", "probe", weights, world / "guess_test.csv", "--train", world / "guess.csv", "--workers", 0]
        arguments += ["--device", "cpu", "--rates", 1e-5, 1e-1, "--seed", seed, "--scores", scores]
        assert main(list(map(str, arguments))) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        written = json.loads(scores.read_text())
        (own,) = (
            head
            for head in written["heads"]
            if (head["rate"], head["weight_decay"]) == (found["rate"], found["weight_decay"])
        )
        assert own["top1"] == found["top1"] and own["held_out_top1"] == found["held_out_top1"]
        right = sum(clip["found"][0][0] == clip["label"] for clip in written["clips"])
        assert right / 4 == found["top1"]
        seen.append((found["top1"], max(head["top1"] for head in written["heads"])))
    assert any(chosen < best for chosen, best in seen), seen


@pytest.mark.process
@pytest.mark.slow
def test_ranks_share_the_pass(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture) -> None:
    """Two processes find what one does, with features in memory and in a mapped file."""
    weights = saved(tmp_path, "tiny")
    more = ["--kind", "attentive", "--epochs", 3, "--batch_size", 2]
    wanted = probed(weights, world, capsys, *more)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "umt_fast"]
    command += ["eval", "probe", weights, world / "test.csv", "--train", world / "train.csv", *more]
    command += ["--workers", 0, "--device", "cpu"]
    for cache in ([], ["--memory_gib", 1e-9, "--cache", tmp_path]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, [*command, *cache])], cwd=TINY.parents[2], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(wanted, abs=1e-4)
        assert len(done.stdout.splitlines()) == 1 and not list(tmp_path.glob("*.features"))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_refusals(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    weights = saved(tmp_path, "tiny")
    lists = {
        "beyond": "10.mp4,0\n11.mp4,7\n",
        "one": "0.mp4,1\n2.mp4,1\n",
        "negative": "0.mp4,-1\n1.mp4,1\n",
        "damaged": "10.mp4,0\nbad.mp4,1\n",
        "all_bad": "bad.mp4,0\nbad.mp4,1\n",
        "single": "bad.mp4,0\n1.mp4,1\n",
        "empty": "",
        "huge": "0.mp4,0\n1.mp4,10000000000\n",
    }
    for name, text in lists.items():
        (world / f"{name}.csv").write_text(text)
    train, test = world / "train.csv", world / "test.csv"
    for arguments, message in (
        ([test], "train is not given; give the list"),
        ([world / "beyond.csv", "--train", train], "outside 0 to 1, the lowest is 7; .*train.csv has no others"),
        ([test, "--train", train, "--num_classes", 1], "num_classes is 1"),
        ([test, "--train", world / "beyond.csv", "--num_classes", 3], "outside 0 to 2, the lowest is 7"),
        ([test, "--train", world / "one.csv"], "clips of one class alone, 1; a probe needs two"),
        ([test, "--train", world / "negative.csv"], "outside 0 to 1, the lowest is -1"),
        (
            [test, "--train", world / "huge.csv"],
            "huge.csv has labels up to 10000000000; a probe knows at most 100000 classes",
        ),
        ([test, "--train", train, "--num_classes", 10**9], "num_classes is 1000000000; a probe knows at most 100000"),
        ([world / "empty.csv", "--train", train], "empty.csv is empty"),
        ([test, "--train", world / "empty.csv"], "empty.csv is empty"),
        ([test, "--train", world / "none.csv"], "no list at .*none.csv"),
        (
            [world / "damaged.csv", "--train", train],
            "1 of 2 clips are unreadable, and every clip of this list has to be read",
        ),
        ([test, "--train", world / "all_bad.csv"], "none of the 2 clips of the train list can be read"),
        ([test, "--train", world / "single.csv"], "1 clip of the train list can be read; a probe needs two"),
        ([test, "--train", train, "--kind", "knn", "--rates", 0.1], "rates is .*'knn' does not read; leave it out"),
        ([test, "--train", train, "--neighbors", 3], "neighbors is 3, which a probe of kind 'linear' does not read"),
        ([test, "--train", train, "--rates", 0], "a rate is 0.0; it must be a finite number above 0"),
        ([test, "--train", train, "--weight_decays", "nan"], "a weight decay is nan"),
        (
            [test, "--train", train, "--kind", "attentive", "--rates", 1e30, "--epochs", 2],
            "every head diverged at the rates 1e.30",
        ),
        ([test, "--train", train, "--scores", train], "is an input of this command and would be replaced"),
        (
            [test, "--train", train, "--memory_gib", 1e-9],
            "take .* GiB, and memory_gib is 1e-09; raise it, or give a folder",
        ),
        ([test, "--train", train, "--memory_gib", 1e-9, "--cache", test], "test.csv, which is no folder"),
    ):
        said = ["eval", "probe", weights, *arguments, "--device", "cpu"]
        said += [] if "--workers" in arguments else ["--workers", 0]
        assert main([str(each) for each in said]) == 2, arguments
        # tyro puts what is wrong with an option into a box
        error = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert re.search(message, error), error
    assert main(["eval", "classify", str(weights), str(test)]) == 2
    assert "does not judge; `eval probe`, fine-tune it" in capsys.readouterr().err
    found = probed(weights, world, capsys, "--train", test, "--kind", "knn")
    assert found["clips_in_both"] == 4 and "4 of the 4 clips of" in caplog.text
