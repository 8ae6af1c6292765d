"""`eval` and `convert` take what load_model takes, and a converted file keeps what its source knows."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import umt_fast
from tests.test_hub import WORDS, trained
from tests.videos import write_video
from umt_fast import hub
from umt_fast.__main__ import main
from umt_fast.data.errors import DataError
from umt_fast.models.description import MODELS, TOKENIZERS
from umt_fast.models.weights import load_state
from umt_fast.models.weights.finetune import deepspeed_file
from umt_fast.zoo import ZOO


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """A list of two videos with a caption each."""
    entries = []
    for number, caption in enumerate(("a b", "c")):
        name = f"video{number}.mp4"
        pictures = torch.randint(
            256, (8, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
        )
        write_video(tmp_path / name, pictures.numpy())
        entries.append({"video": name, "caption": caption})
    table = tmp_path / "captions.json"
    table.write_text(json.dumps(entries))
    return table


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of stage 2, as a run would write it, random, and its words."""
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(WORDS))
    module, described = trained("captions")
    content = {"model": module.state_dict(), "model_config": described, "config": {"tokenizer": str(words)}}
    torch.save(content, tmp_path / "run.pt")
    return tmp_path / "run.pt"


def judged(capsys: pytest.CaptureFixture, file: object, table: Path, *more: object) -> list[dict]:
    """The figures and all scores."""
    capsys.readouterr()
    scores = table.with_name("scores.json")
    arguments = ["eval", "retrieve", file, table, "--scores", scores, "--workers", 0, "--device", "cpu", *more]
    assert main([str(word) for word in arguments]) == 0, capsys.readouterr().err
    return [json.loads(capsys.readouterr().out), json.loads(scores.read_text())]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_saved_folder_is_judged_and_converted(
    checkpoint: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wanted, folder = judged(capsys, checkpoint, captions), tmp_path / "folder"
    umt_fast.load_model(weights=checkpoint, device="cpu").save_pretrained(folder)
    assert judged(capsys, folder, captions) == wanted
    assert main(["convert", str(folder), str(tmp_path / "again.safetensors")]) == 0
    assert judged(capsys, tmp_path / "again.safetensors", captions) == wanted
    # Whatever reads weights reads it.
    expected = torch.load(checkpoint, weights_only=True)["model"]
    found = load_state(deepspeed_file(folder))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_converted_file_keeps_its_tokenizer_or_says_so(
    checkpoint: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wanted, words = judged(capsys, checkpoint, captions), tmp_path / "words"
    named, flat = tmp_path / "named.safetensors", tmp_path / "flat.pth"
    assert main(["convert", str(checkpoint), str(named)]) == 0
    assert f"it names its model and carries its tokenizer {words}, " in capsys.readouterr().out
    assert judged(capsys, named, captions) == wanted
    assert umt_fast.load_model(weights=named, device="cpu").words.name == str(words)
    assert main(["convert", str(named), str(flat)]) == 0
    said = capsys.readouterr().out
    assert f"does not name its model and its tokenizer {words}, so `eval` needs --model and --tokenizer" in said
    assert "does not say which model it is of" in refused(capsys, "eval", "retrieve", flat, captions)


def test_a_released_file_by_its_name(
    checkpoint: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = judged(capsys, checkpoint, captions)
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content["model"], tmp_path / "fetched.pth")
    monkeypatch.setattr(
        hub, "_fetched", lambda released: tmp_path / f"{'fetched' if released.name == 'b16_25m' else ''}.pth"
    )
    monkeypatch.setitem(MODELS, "umt_b16", lambda: copy.deepcopy(content["model_config"]))
    monkeypatch.setitem(TOKENIZERS, "umt_b16", str(tmp_path / "words"))
    monkeypatch.setitem(ZOO, "b16_25m", dataclasses.replace(ZOO["b16_25m"], frames=4, image_size=32))
    assert judged(capsys, "b16_25m", captions) == wanted
    assert main(["convert", "b16_25m", str(tmp_path / "out.safetensors")]) == 0
    assert load_state(tmp_path / "out.safetensors").keys() == content["model"].keys()
    assert "did you mean the released file 'b16_25m'" in refused(capsys, "eval", "retrieve", "b16_25", captions)


@pytest.mark.parametrize(
    ("config", "said", "loading"),
    [
        (
            '{"model_type": "bert"}',
            "config.json describes no model of umt_fast",
            "config.json describes no model of umt_fast",
        ),
        ("{", "config.json is no JSON", "config.json is no JSON"),
    ],
)
def test_folders_of_others(
    config: str, said: str, loading: str, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    assert said in refused(capsys, "eval", "retrieve", folder, captions)
    assert said in refused(capsys, "convert", folder, tmp_path / "out.pth")
    assert loading in refused(capsys, "embed", captions, "--weights", folder, "--out", tmp_path / "f.safetensors")


def test_a_model_is_not_saved_without_its_words(checkpoint: Path, tmp_path: Path) -> None:
    model = umt_fast.load_model(weights=checkpoint, device="cpu", tokenizer="runs/of/nobody")
    with pytest.raises(DataError, match="no tokenizer 'runs/of/nobody'.*name a folder that is there"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
