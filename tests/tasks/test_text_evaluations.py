"""`eval retrieve`, `choose` and `recognize` on weights of stage 2 and fine-tuned ones, by the command; on one rank and two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

import umt_fast
from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.engine.distributed import Ranks
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import WeightsFile
from umt_fast.tasks import task_of
from umt_fast.tasks.matching import TextOptions, load_matcher
from umt_fast.tasks.multiple_choice import score_options

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = f"{REPOSITORY}/tests/assets/tiny.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "thing", "moves", "left", "right"]
CAPTIONS = [["A red thing!", "red moves"], ["a blue thing"], ["thing moves left", "left"], ["right"], ["a thing"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips, one with captions of its own in two entries; lists of every kind; weights of both tasks."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for number in range(5):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
            for _ in range(10):
                picture = np.kron(rng.integers(0, 256, (3, 3, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    entries = [{"video": f"{number}.mp4", "caption": texts} for number, texts in enumerate(CAPTIONS)]
    entries.append({"video": ["1.mp4", "3.mp4"], "caption": "blue moves"})
    (folder / "captions.json").write_text(json.dumps(entries))
    options = ["a red thing", "a blue thing", "thing moves left"]
    choices = [{"video": f"{n}.mp4", "caption": options[n % 3 :] + options[: n % 3], "answer": n % 2} for n in range(5)]
    (folder / "choices.json").write_text(json.dumps(choices))
    (folder / "labeled.csv").write_text("".join(f"{n}.mp4,{n % 3}\n" for n in range(5)))
    (folder / "names.txt").write_text("a red thing\nblue\nmoves left\n")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for name, config in (("stage2", tiny.captions()), ("tuned", tiny.pairs())):
        torch.manual_seed(3)
        task = task_of(config)
        model = task.untrained(config).trainable
        for module in model.modules():  # at their initial size outputs are too alike for a ranking to mean anything
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.3)
        content = {"model": model.state_dict(), "model_config": task.describe(config)}
        torch.save(content | {"config": {"tokenizer": str(folder)}}, folder / f"{name}.pt")
    return folder


Judge = Callable[..., dict[str, Any]]


@pytest.fixture
def judge(world: Path, capsys: pytest.CaptureFixture) -> Judge:
    def run(name: str, weights: str, table: str, *more: object) -> dict[str, Any]:
        capsys.readouterr()
        words = ["eval", name, world / weights, world / table, "--workers", 0, "--device", "cpu", *more]
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    return run


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def library(world: Path, name: str) -> umt_fast.VideoTextModel:
    return umt_fast.load_model(weights=world / f"{name}.pt", device="cpu")


@pytest.mark.parametrize(("name", "cls"), [("stage2", VideoText), ("tuned", RetrievalModel)])
def test_retrieval_ranks_as_the_librarys_scores_do(
    name: str, cls: type, world: Path, judge: Judge, tmp_path: Path
) -> None:
    """Stage 2's network still has all its heads there, and a tuned one's has none; both are judged without."""
    figures = judge("retrieve", f"{name}.pt", "captions.json", "--scores", tmp_path / "scores.json", "--top_k", 99)
    assert figures["clips"] == 5 and figures["captions"] == 8
    model = library(world, name)
    assert type(model.network) is cls
    clips = [world / f"{number}.mp4" for number in range(5)]
    texts = [text for own in CAPTIONS for text in own] + ["blue moves"]
    scores = model.match(clips, texts)
    found = json.loads((tmp_path / "scores.json").read_text())
    for column, query in enumerate(found["t2v"]):
        names = [Path(path).name for path, _ in query["found"]]
        assert names == [f"{row}.mp4" for row in scores[:, column].argsort(descending=True).tolist()]
    right = [[row for row, own in enumerate(CAPTIONS) if text in own] or [1, 3] for text in texts]
    best = scores.t().argmax(1).tolist()
    hits = [row in rows for row, rows in zip(best, right, strict=True)]
    assert figures["match_t2v_r1"] == pytest.approx(sum(hits) / len(hits))


def test_more_frames_continue_the_positions(world: Path, judge: Judge, capsys: pytest.CaptureFixture) -> None:
    """Of stage-2 weights, as the same tensors in a description of more frames are judged."""
    usual = judge("retrieve", "stage2.pt", "captions.json")
    longer = judge("retrieve", "stage2.pt", "captions.json", "--frames", 8)
    content = torch.load(world / "stage2.pt", weights_only=True)
    content["model_config"]["vit"]["num_frames"] = 8
    torch.save(content, world / "longer.pt")
    assert longer == judge("retrieve", "longer.pt", "captions.json") != usual
    assert judge("retrieve", "stage2.pt", "captions.json", "--frames", 4) == usual


def test_paragraphs_and_texts_cut_short_are_other_texts(judge: Judge) -> None:
    each = judge("retrieve", "tuned.pt", "captions.json")
    whole = judge("retrieve", "tuned.pt", "captions.json", "--captions", "paragraph")
    assert (each["captions"], whole["captions"]) == (8, 6)
    assert judge("retrieve", "tuned.pt", "captions.json", "--max_length", 2) != each
    assert judge("retrieve", "tuned.pt", "captions.json", "--max_seconds", 0.5) != each


def test_choices_are_those_of_the_score(world: Path, judge: Judge, tmp_path: Path) -> None:
    """Against clips and options put through the model by hand, and an official file that does not say what it is."""
    figures = judge("choose", "tuned.pt", "choices.json", "--scores", tmp_path / "scores.json")
    assert figures["clips"] == 5 and figures["options"] == 3
    model, entries = library(world, "tuned"), json.loads((world / "choices.json").read_text())
    right = 0
    for entry, told in zip(entries, json.loads((tmp_path / "scores.json").read_text())["clips"], strict=True):
        ids = torch.full((1, 3, 4), 0)
        for number, text in enumerate(entry["caption"]):
            own = [2, *(WORDS.index(word) for word in text.split())][:6]
            ids[0, number, : len(own)] = torch.tensor(own)
        video = model.pixels([world / entry["video"]])
        scored = score_options(model.network, video, ids, ids > 0)
        assert told["choice"] == scored.choice.item() and told["answer"] == entry["answer"]
        assert told["options"] == entry["caption"] and Path(told["clip"]).name == entry["video"]
        assert told["scores"] == pytest.approx(scored.scores[0].tolist(), abs=1e-4)
        right += told["choice"] == entry["answer"]
    assert figures["accuracy"] == right / 5
    state = torch.load(world / "tuned.pt", weights_only=True)["model"]
    torch.save({"model": state | {"clip_teacher.proj": torch.ones(2)}, "epoch": 4}, world / "official.pth")
    named = ("--model", f"{TINY}:pairs", "--tokenizer", world)
    assert judge("choose", "official.pth", "choices.json", *named) == figures
    assert judge("choose", "stage2.pt", "choices.json").keys() == figures.keys()


def test_recognition_is_the_nearest_name(world: Path, judge: Judge, tmp_path: Path) -> None:
    options = ("--classes", world / "names.txt", "--scores", tmp_path / "scores.json")
    figures = judge("recognize", "stage2.pt", "labeled.csv", *options)
    assert figures["clips"] == 5 and figures["classes"] == 3 and figures["top5"] == 1.0
    model, names = library(world, "stage2"), ["a red thing", "blue", "moves left"]
    clips = [world / f"{number}.mp4" for number in range(5)]

    def top1(texts: Tensor) -> float:
        best = (model.encode_video(clips) @ texts.t()).argmax(1)
        return (best == torch.tensor([n % 3 for n in range(5)])).float().mean().item()

    assert figures["top1"] == pytest.approx(top1(model.encode_text(names)))
    told = json.loads((tmp_path / "scores.json").read_text())["clips"]
    assert [clip["name"] for clip in told] == [names[n % 3] for n in range(5)] and {
        name for clip in told for name, _ in clip["found"]
    } == set(names)
    # With templates a class is the mean of its texts.
    templates = ["a {} thing", "{} moves"]
    found = judge("recognize", "stage2.pt", "labeled.csv", *options, "--templates", *templates)
    each = torch.stack([model.encode_text([t.replace("{}", n) for n in names]) for t in templates]).mean(0)
    again = json.loads((tmp_path / "scores.json").read_text())["clips"]
    assert again != told and found["top1"] == pytest.approx(top1(torch.nn.functional.normalize(each, dim=1)))


def test_bad_input_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(name: str, table: object, *more: object, weights: str = "tuned.pt") -> str:
        return refused(capsys, "eval", name, world / weights, table, "--workers", 0, *more)

    def listed(content: Any) -> Path:
        path = tmp_path / "list.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    video = str(world / "0.mp4")
    for name, content, expected in (
        ("retrieve", [{"video": "gone.mp4", "caption": "a"}], "1 of the 1 files"),
        ("retrieve", [{"video": video, "caption": []}], "its list of captions is empty"),
        ("retrieve", [{"video": video, "caption": "...!"}], "has no word"),
        ("choose", [{"video": "gone.mp4", "caption": ["a", "b"], "answer": 0}], "1 of the 1 files"),
        ("choose", [{"video": video, "caption": ["a", "b"], "answer": 2}], "its answer is 2, but it has 2 choices"),
        ("choose", [{"video": video, "caption": ["a"], "answer": 0}], "at least two texts"),
    ):
        assert expected in said(name, listed(content))
    labeled = world / "labeled.csv"
    for names, expected in (
        (None, "classes is not given"),
        ("a\n", "names 1 classes; it takes at least two"),
        ('[\n "a",\n "b"\n]', "is JSON; write the names of classes as text, a line each"),
        ("a\nb\n", "names no others"),
        ("a\n...\nb\n", "line 2: '...' is no name"),
        ("a\nb\nA!\n", "line 3: 'A!' is the name in line 1 too"),
    ):
        (tmp_path / "names.txt").write_text(names or "")
        more = ("--classes", tmp_path / "names.txt") if names else ()
        assert expected in said("recognize", labeled, *more)
    names = ("--classes", world / "names.txt")
    assert "the template 'thing' has no {}" in said("recognize", labeled, *names, "--templates", "thing")
    assert "max_length is 9; it must lie in [2, 8]" in said("choose", world / "choices.json", "--max_length", 9)
    broken = torch.load(world / "tuned.pt", weights_only=True)
    broken["model"]["itm_head.weight"].fill_(float("nan"))
    torch.save(broken, world / "nan.pt")
    assert "not finite" in said("choose", world / "choices.json", weights="nan.pt")


@pytest.mark.slow
def test_two_ranks_find_and_choose_what_one_does(world: Path, judge: Judge, tmp_path: Path) -> None:
    """An odd number of clips, one a step: the second rank has a turn without any."""
    kinds = (("retrieve", "captions.json"), ("choose", "choices.json"), ("recognize", "labeled.csv"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "umt_fast"]
    for name, table in kinds:
        words = ["eval", name, world / "tuned.pt", world / table, "--workers", 0, "--device", "cpu"]
        words += ["--batch_size", 1, "--scores", tmp_path / f"{name}.json", "--out", tmp_path / f"{name}.out.json"]
        words += ["--classes", world / "names.txt"] if name == "recognize" else []
        done = subprocess.run([*start, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    for name, table in kinds:
        more = ("--classes", world / "names.txt") if name == "recognize" else ()
        figures = judge(name, "tuned.pt", table, *more, "--scores", tmp_path / "one.json")
        assert json.loads((tmp_path / f"{name}.out.json").read_text()) == figures
        one, two = (json.loads((tmp_path / file).read_text()) for file in ("one.json", f"{name}.json"))
        assert [[str(value) for value in row.values()][:3] for row in next(iter(one.values()))] == [
            [str(value) for value in row.values()][:3] for row in next(iter(two.values()))
        ]


def test_texts_with_unknown_words_are_counted_once(world: Path, judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    (world / "odd.txt").write_text("a red thing\na zebra\nan okapi\n")
    judge("recognize", "stage2.pt", "labeled.csv", "--classes", world / "odd.txt", "--templates", "{}")
    said = [record.getMessage() for record in caplog.records if "does not know" in record.getMessage()]
    assert said == ["2 of 3 texts have words that the tokenizer does not know; each is read as [UNK]"]
    caplog.clear()
    content = torch.load(world / "stage2.pt", weights_only=True)
    file = WeightsFile(content["model"], content)
    matcher = load_matcher(file, content["model_config"], world, TextOptions(), Ranks(1, 2, torch.device("cpu")))
    matcher.tokens(["a zebra"])
    assert not caplog.text
