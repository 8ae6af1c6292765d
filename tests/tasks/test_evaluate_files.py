"""Checkpoints and bare weights of the sample world's stage 2 and of a classifier: continued, and judged alike."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from umt_fast.__main__ import main
from umt_fast.models.weights import save_state
from umt_fast.sample_world import world as sample_world
from umt_fast.sample_world.quickstart import write_vocabulary

ASSETS = Path(__file__).resolve().parents[1] / "assets"
TINY, STAGE2 = f"{ASSETS}/tiny.py", "quickstart:stage2"
RECORDS = json.loads((ASSETS / "config_records.json").read_text())


def train(out: Path, base: list[str], steps: int, *more: object) -> Path:
    """Runs `train` to a step and returns its checkpoint."""
    assert main(["train", *base, "--run.out", str(out), "--run.max_steps", str(steps), *map(str, more)]) == 0
    return out / f"checkpoint-{steps:08d}.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sample_world.build(tmp_path_factory.mktemp("world"), seed=0, train=6, test=5, labeled=1, workers=1)
    write_vocabulary(folder / "words", folder / "train_captions.json")
    return folder


@pytest.fixture(scope="module")
def stage2(world: Path) -> list[str]:
    """The arguments of a stage-2 run on it, two clips a step."""
    return [
        STAGE2,
        "--videos",
        f"{world}/train_captions.json",
        "--tokenizer",
        f"{world}/words",
        "--run.batch_size",
        "2",
        "--run.device",
        "cpu",
        "--data.workers",
        "0",
    ]


@pytest.fixture(scope="module")
def checkpoint(world: Path, stage2: list[str]) -> Path:
    return train(world / "run", stage2, 2)


Judge = Callable[..., tuple[dict, dict]]


@pytest.fixture
def judge(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Judge:
    def run(file: Path, *more: object, table: Path | None = None) -> tuple[dict, dict]:
        capsys.readouterr()
        table = table or world / "test_captions.json"
        name = "retrieve" if table.suffix == ".json" else "classify"
        arguments = ["eval", name, file, table, "--scores", tmp_path / "scores.json"]
        code = main([str(word) for word in (*arguments, "--workers", 0, "--device", "cpu", *more)])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out), json.loads((tmp_path / "scores.json").read_text())

    return run


def official(path: Path, state: dict, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training file in the official layout: the frozen teacher among the weights, settings of a class of its own."""

    class EasyDict(dict):
        pass

    module = types.ModuleType("utils.easydict")
    EasyDict.__module__, EasyDict.__qualname__, module.EasyDict = "utils.easydict", "EasyDict", EasyDict
    monkeypatch.setitem(sys.modules, "utils", types.ModuleType("utils"))
    monkeypatch.setitem(sys.modules, "utils.easydict", module)
    config = EasyDict({"model": EasyDict(vit_type="vit"), "optimizer": [EasyDict(lr=1e-4)]})
    config.model = config["model"]  # as an attribute, too
    teacher = {"clip_teacher.conv1.weight": torch.ones(4, 3, 1, 2, 2), "clip_teacher.proj": torch.ones(4, 2)}
    content = {"model": state | teacher, "optimizer": {"state": {}}, "config": config, "epoch": 1, "global_step": 5}
    torch.save(content, path)
    monkeypatch.delitem(sys.modules, "utils.easydict")
    return path


@pytest.mark.slow
def test_every_form_of_stage_2_weights_is_judged_alike(
    world: Path,
    checkpoint: Path,
    judge: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = judge(checkpoint)
    assert wanted[0]["clips"] == 5 and len({score for q in wanted[1]["t2v"] for _, score in q["found"]}) > 5
    content = torch.load(checkpoint, weights_only=True)
    state = content["model"]
    named = ["--model", STAGE2, "--tokenizer", world / "words"]
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"module": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "module.pt")
    assert judge(tmp_path / "bare.pth", *named) == wanted
    assert judge(tmp_path / "module.pt", *named) == wanted
    caplog.set_level("INFO")
    assert judge(official(tmp_path / "official.pth", state, monkeypatch), *named) == wanted
    # The teacher, and what only stage 2 trains: the alignment heads and the words' head.
    assert "entries not used: clip_teacher.conv1.weight, clip_teacher.proj, text_encoder.cls" in caplog.text
    # A converted file says what it is of and which words it knows, and needs no name.
    assert main(["convert", str(checkpoint), str(tmp_path / "weights.safetensors")]) == 0
    assert judge(tmp_path / "weights.safetensors") == wanted
    save_state(state, tmp_path / "wordless.safetensors", content["model_config"])
    # Other weights are judged otherwise: the equalities above can fail.
    state["vision_proj.weight"] = state["vision_proj.weight"].flip(0).roll(7, 1)
    torch.save(state, tmp_path / "other.pth")
    assert judge(tmp_path / "other.pth", *named) != wanted
    for arguments, expected in (
        ((tmp_path / "bare.pth",), "does not say which model it is of; say it: --model umt_b16, umt_l16"),
        ((tmp_path / "bare.pth", "--model", STAGE2), "bert-base-uncased"),
        ((tmp_path / "bare.pth", "--model", "umt_b17"), "--model umt_b17 is none of umt_b16, umt_l16, umt_b16_qa"),
        ((tmp_path / "bare.pth", "--model", "umt_b16_ft"), "has no head.weight, so it is no file of this --model"),
        ((tmp_path / "bare.pth", "--num_frames", "8"), "--num_frames is for a file whose model is named"),
        ((checkpoint, "--model", STAGE2), "says which model it is of (task video_text); leave out --model"),
        (
            (tmp_path / "wordless.safetensors",),
            "does not say which tokenizer it was trained with; give it: --tokenizer",
        ),
    ):
        capsys.readouterr()
        assert (
            main(["eval", "retrieve", *map(str, arguments), str(world / "test_captions.json"), "--workers", "0"]) == 2
        )
        said = capsys.readouterr().err
        assert expected in said, said


def test_stage_2_goes_on_as_a_new_run(
    checkpoint: Path,
    stage2: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rate of nothing: after a step every weight is the file's, text encoder and heads too; and a BERT is not asked for."""
    caplog.set_level("INFO")
    before = torch.load(checkpoint, weights_only=True)["model"]
    converted = tmp_path / "weights.safetensors"
    assert main(["convert", str(checkpoint), str(converted)]) == 0
    files = (checkpoint, converted, official(tmp_path / "official.pth", before, monkeypatch))
    still = ["--optim.lr", 1e-30, "--bert", "no/such/bert"]
    for number, file in enumerate(files):
        caplog.clear()
        after = torch.load(train(tmp_path / str(number), stage2, 1, "--init", file, *still), weights_only=True)["model"]
        assert after.keys() == before.keys() and all(
            (after[key] - before[key]).abs().max() < 1e-20 for key in before
        ), file
        assert f"{file} holds stage-2 weights, told by its keys" in caplog.text


@pytest.mark.parametrize("variant", ["classes", "captions"])
def test_checkpoints_older_than_descriptions(
    variant: str, world: Path, tiny_list: Path, tmp_path: Path, judge: Judge, capsys: pytest.CaptureFixture
) -> None:
    """They are judged and continued, whatever became of the options they name."""
    table = tiny_list
    base = [f"{TINY}:{variant}", "--data.train", str(tiny_list)]
    if variant == "captions":
        table = tmp_path / "captions.json"
        table.write_text(
            json.dumps([{"video": f"video{n}.mp4", "caption": "a red thing"[: 3 + 2 * n]} for n in (0, 1)])
        )
        (tmp_path / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"])
        )
        base = [f"{TINY}:captions", "--videos", str(table), "--tokenizer", str(tmp_path)]
    else:  # a classifier had the clip's own table then
        base += ["--student.position_grid", "4", "2", "2"]
    path = train(tmp_path / "run", base, 1)
    wanted = judge(path, table=table)
    content = torch.load(path, weights_only=True)
    assert set(content.pop("model_config")) >= {"task", "vit", "version"}
    record = RECORDS[variant] | {"since_removed": {"a": 1}, "optim": {"rate": 3}}
    if variant == "captions":
        record["tokenizer"] = str(tmp_path)
    content["config"] = record
    torch.save(content, path)
    assert judge(path, table=table) == wanted
    train(tmp_path / "run", base, 2)
    assert "model_config" in torch.load(tmp_path / "run" / "checkpoint-00000002.pt", weights_only=True)
    whole = train(tmp_path / "whole", base, 2)
    states = [torch.load(file, weights_only=True)["model"] for file in (whole, tmp_path / "run" / whole.name)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_description_counts_and_not_the_settings(tiny_list: Path, tmp_path: Path, judge: Judge) -> None:
    path = train(tmp_path / "run", [f"{TINY}:classes", "--data.train", str(tiny_list)], 1)
    wanted = judge(path, table=tiny_list)
    content = torch.load(path, weights_only=True)
    content["config"] = {"all": "renamed"}
    torch.save(content, path)
    assert judge(path, table=tiny_list) == wanted


def test_a_bare_classifier_has_the_classes_of_its_head(tiny_list: Path, tmp_path: Path, judge: Judge) -> None:
    """Those of the named recipe are only usual: official scripts take their number as an option."""
    path = train(tmp_path / "run", [f"{TINY}:classes", "--data.train", str(tiny_list), "--num_classes", "5"], 1)
    wanted = judge(path, table=tiny_list)
    torch.save({"module": torch.load(path, weights_only=True)["model"]}, tmp_path / "bare.pth")
    assert judge(tmp_path / "bare.pth", "--model", f"{TINY}:classes", table=tiny_list) == wanted


def test_a_bare_classifier_with_a_position_table(tiny_list: Path, tmp_path: Path, judge: Judge) -> None:
    """A stored table of the clip's size is used as it is; one of another size is not."""
    path = train(tmp_path / "run", [f"{TINY}:classes", "--data.train", str(tiny_list), "--optim.lr", "0.5"], 3)
    wanted = judge(path, table=tiny_list)
    state = torch.load(path, weights_only=True)["model"]
    named = ["--model", f"{TINY}:classes"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    assert judge(tmp_path / "bare.pth", *named, table=tiny_list) == wanted
    torch.save({"model": state | {"pos_embed": torch.ones(1, 9, 32)}}, tmp_path / "bare.pth")
    assert judge(tmp_path / "bare.pth", *named, table=tiny_list) == wanted
    torch.save({"model": state | {"pos_embed": torch.randn(1, 16, 32)}}, tmp_path / "bare.pth")
    assert judge(tmp_path / "bare.pth", *named, table=tiny_list) != wanted
