"""A model keeps the tokenizer that it was trained with: files carry it, and another one is refused by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import umt_fast
from umt_fast.__main__ import main
from umt_fast.config import ConfigError
from umt_fast.data.errors import DataError

TINY = f"{Path(__file__).resolve().parents[1]}/assets/tiny.py"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "a", "red", "thing", "blue"]


def vocabulary(folder: Path, words: list[str]) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder


@pytest.fixture
def folder(tiny_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage-2 run of one step, whose tokenizer was given as a path from the folder that the command ran in."""
    rows = [{"video": f"video{number}.mp4", "caption": text} for number, text in enumerate(("a red thing", "a blue"))]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    vocabulary(tmp_path / "words", WORDS)
    monkeypatch.chdir(tmp_path)
    assert main(train("run", "words", 1)) == 0
    return tmp_path


def train(out: str, words: str, steps: int, *more: object) -> list[str]:
    given = ["--videos", "captions.json", "--tokenizer", words, "--run.out", out, "--run.max_steps", steps, *more]
    return [str(word) for word in ("train", f"{TINY}:captions", *given)]


def checkpoint(folder: Path) -> Path:
    return folder / "run" / "checkpoint-00000001.pt"


def judged(file: Path, folder: Path, *more: object) -> int:
    options = ["--workers", "0", "--device", "cpu", *map(str, more)]
    return main(["eval", "retrieve", str(file), str(folder / "captions.json"), *options])


def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another working directory, no folder of words any more, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    shutil.move(folder / "words", folder / "gone")


def test_every_file_is_read_in_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = umt_fast.load_model(weights=checkpoint(folder), device="cpu")
    expected = model.encode_text(["a red thing", "blue"])
    model.save_pretrained(folder / "saved")
    assert main(["convert", str(checkpoint(folder)), str(folder / "converted.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "carries its tokenizer words, 9-" in said, said
    elsewhere(folder, monkeypatch)
    saved = folder / "saved"
    assert json.loads((saved / "config.json").read_text())["tokenizer"] == "."
    for file in (checkpoint(folder), folder / "converted.safetensors", saved, saved / "model.safetensors"):
        again = umt_fast.load_model(weights=file, device="cpu")
        assert torch.equal(again.encode_text(["a red thing", "blue"]), expected), file
        assert judged(file, folder) == 0, file
    # And out again from what carries it.
    umt_fast.load_model(weights=checkpoint(folder), device="cpu").save_pretrained(folder / "again")
    shutil.move(folder / "again", folder / "sent")
    found = umt_fast.from_pretrained(folder / "sent", device="cpu").encode_text(["a red thing", "blue"])
    assert torch.equal(found, expected)


def test_files_of_earlier_versions_carry_it_once_converted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(checkpoint(folder), weights_only=True)
    del content["vocabulary"]
    torch.save(content, folder / "older.pt")
    assert judged(folder / "older.pt", folder) == 0
    assert main(["convert", "older.pt", "older.safetensors"]) == 0
    umt_fast.load_model(weights="older.pt", device="cpu").save_pretrained(folder / "saved")
    elsewhere(folder, monkeypatch)
    assert judged(folder / "older.pt", folder) == 2  # a relative name alone
    assert judged(folder / "older.safetensors", folder) == 0
    assert judged(folder / "saved", folder) == 0


def test_a_vocabulary_file_goes_along_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(checkpoint(folder), weights_only=True)
    del content["vocabulary"]
    content["config"]["tokenizer"] = "words/vocab.txt"
    torch.save(content, folder / "older.pt")
    model = umt_fast.load_model(weights="older.pt", device="cpu")
    expected = model.encode_text(["a red thing"])
    model.save_pretrained(folder / "saved")
    assert main(["convert", "older.pt", "older.safetensors"]) == 0
    elsewhere(folder, monkeypatch)
    for file in (folder / "saved", folder / "older.safetensors"):
        assert torch.equal(umt_fast.load_model(weights=file, device="cpu").encode_text(["a red thing"]), expected)


def test_other_tokens_are_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Another order of the same words fits the sizes, and would make other texts of all."""
    other = vocabulary(folder / "turned", [*SPECIAL, *reversed(WORDS[5:])])
    model = umt_fast.load_model(weights=checkpoint(folder), device="cpu")
    model.save_pretrained(folder / "saved")
    assert main(["convert", str(checkpoint(folder)), "converted.safetensors"]) == 0
    own = torch.load(checkpoint(folder), weights_only=True)["vocabulary"]["fingerprint"]
    assert own.startswith("9-") and len(own) == 14
    for file in (checkpoint(folder), folder / "converted.safetensors", folder / "saved"):
        capsys.readouterr()
        assert judged(file, folder, "--tokenizer", other) == 2
        said = capsys.readouterr().err
        assert "turned has other tokens (9-" in said and own in said and "leave the option out" in said, said
        assert len(said.strip().splitlines()) == 1
        assert judged(file, folder, "--tokenizer", folder / "words") == 0
        wrong = umt_fast.load_model(weights=file, device="cpu", tokenizer=other)
        with pytest.raises((ConfigError, DataError), match="has other tokens"):
            wrong.encode_text(["a"])
    # A saved folder whose words were changed.
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / "saved" / name).unlink(missing_ok=True)
    shutil.copy(other / "vocab.txt", folder / "saved" / "vocab.txt")
    assert judged(folder / "saved", folder) == 2
    assert "has other tokens" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_words(folder: Path, capsys: pytest.CaptureFixture) -> None:
    other = vocabulary(folder / "turned", [*SPECIAL, *reversed(WORDS[5:])])
    capsys.readouterr()
    assert main(train("run", str(other), 2)) == 2
    said = capsys.readouterr().err
    assert "was trained with the tokenizer words (9-" in said and f"{other} has other tokens" in said, said
    os.rename(folder / "words", folder / "moved")
    assert main(train("run", "moved", 2)) == 0


@pytest.mark.parametrize("fresh", ["captions", "pairs"])
def test_a_new_run_starts_from_weights_with_its_words(fresh: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Further words behind those of the weights have rows of their own; any other order is refused."""
    start = ["--init", str(checkpoint(folder)), "--run.device", "cpu", "--data.workers", "0"]
    vocabulary(folder / "turned", [*SPECIAL, *reversed(WORDS[5:])])
    vocabulary(folder / "longer", [*WORDS, "green"])

    def begin(words: str) -> int:
        command = train(f"new-{words}", words, 1, *start)
        command[1] = f"{TINY}:{fresh}"
        return main(command)

    capsys.readouterr()
    assert begin("turned") == 2
    said = capsys.readouterr().err
    assert "tokenizer turned (9-" in said and "does not begin with the tokens of words (9-" in said, said
    assert begin("longer") == 0


def test_a_damaged_record_is_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    content = torch.load(checkpoint(folder), weights_only=True)
    for change, said in (
        ({"fingerprint": "x"}, "record of their tokenizer words is damaged: its fingerprint is 'x'"),
        ({"definition": "{}"}, "the tokenizer words that the weights carry is damaged"),
        ({"fingerprint": "9-000000000000"}, "has other tokens"),
    ):
        torch.save(content | {"vocabulary": content["vocabulary"] | change}, folder / "damaged.pt")
        capsys.readouterr()
        assert judged(folder / "damaged.pt", folder) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1, error
    torch.save(content | {"vocabulary": content["vocabulary"] | {"fingerprint": "x"}}, folder / "damaged.pt")
    assert main(train("new", "words", 1, "--init", "damaged.pt")) == 2
    # What a later version may add is not in the way.
    torch.save(content | {"vocabulary": content["vocabulary"] | {"since": 1}}, folder / "later.pt")
    assert judged(folder / "later.pt", folder) == 0
