"""Input that stage 2 cannot use ends `train` and `eval` with one line that names it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.tokens import load_tokenizer
from umt_fast.models.student import Student
from umt_fast.models.weights import save_state

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]
VIDEO, IMAGE = {"video": "video0.mp4", "caption": "red"}, {"image": "red.png", "caption": "red"}


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Runs a command that must fail, and returns the one line it says so in."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert line.startswith("umt_fast: error: ") and error.count("umt_fast: error: ") == 1 and "Traceback" not in error
    return line


@pytest.fixture
def world(tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two videos, an image, two files that are neither, and a vocabulary."""
    monkeypatch.chdir(REPOSITORY)
    folder = tiny_list.parent
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    Image.new("RGB", (50, 40), "red").save(folder / "red.png")
    for name in ("broken.mp4", "broken.png"):
        (folder / name).write_bytes(b"neither a video nor an image")
    return folder


def training(folder: Path, videos: object = None, images: object = None) -> list[object]:
    """The arguments of a run of one step with these lists."""
    arguments: list[object] = [
        "train",
        "tests/assets/tiny.py:captions",
        "--tokenizer",
        folder,
        "--run.out",
        folder / "run",
    ]
    arguments += ["--run.max_steps", 1]
    for name, entries in (("videos", videos), ("images", images)):
        if entries is not None:
            (folder / f"{name}.json").write_text(json.dumps(entries))
            arguments += [f"--{name}", folder / f"{name}.json"]
    return arguments


@pytest.mark.parametrize(
    ("videos", "images", "expected"),
    [
        ([VIDEO, {"video": "video1.mp4"}], None, 'entry 1 has no "caption"'),
        ([VIDEO, {"caption": "red"}], None, 'entry 1 has no "video" or "image"'),
        ([VIDEO, VIDEO | {"caption": 3}], None, '"caption" is 3; it must be a text'),
        ([VIDEO, VIDEO | {"video": {"name": "video1.mp4"}}], None, "it must be a text or a list of texts"),
        ({"videos": [VIDEO]}, None, "it must be a list of entries"),
        ([VIDEO, "video1.mp4"], None, 'entry 1: it is "video1.mp4"; expected'),
        (None, [IMAGE, IMAGE | {"image": "none.png"}], "none.png: no such file"),
        (None, [IMAGE, IMAGE | {"image": "broken.png"}], "broken.png"),
        ([VIDEO, VIDEO | {"video": "broken.mp4"}], None, "broken.mp4"),
        ([VIDEO, VIDEO | {"video": "none.mp4"}], None, "none.mp4: no such file"),
        ([VIDEO | {"caption": "?!"}] * 2, None, "holds no captions"),
        ([VIDEO], None, "1 clips do not fill one step of 2"),
        (None, None, "videos and images are both empty"),
    ],
)
def test_lists_that_cannot_be_trained_on(
    videos: object, images: object, expected: str, world: Path, capsys: pytest.CaptureFixture
) -> None:
    assert expected in error_of(capsys, *training(world, videos, images))
    assert not list(world.glob("run/checkpoint*"))


@pytest.mark.parametrize(("name", "width", "depth"), [("narrower", 16, 2), ("deeper", 32, 3)])
def test_first_stage_weights_of_another_size(
    name: str, width: int, depth: int, world: Path, capsys: pytest.CaptureFixture
) -> None:
    vit = tiny.tiny().student
    vit.width, vit.depth = width, depth
    save_state(Student(vit, 2, 16).state_dict(), world / f"{name}.safetensors")
    error = error_of(capsys, *training(world, [VIDEO] * 2), "--init", world / f"{name}.safetensors")
    assert f"{name}.safetensors does not fit the configured model" in error and len(error) < 1200
    if width == 16:
        assert "encoder.patch_embed.proj.bias is (16,) in the file and (32,) in the model" in error
    else:
        assert "not known to the model: encoder.blocks.2." in error and "more" in error


def test_text_projection_of_an_untrained_teacher(world: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = (*training(world, [VIDEO] * 2), "--losses.text_projection", 1, "--embed_dim", 16)
    assert "untrained: losses.text_projection needs a trained CLIP" in error_of(capsys, *arguments)


@pytest.mark.parametrize("co_training", ["alternating", "packed"])
def test_training_without_masks(co_training: str, world: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = training(world, [VIDEO] * 4, [IMAGE] * 2)
    arguments += ["--co_training", co_training, "--mask.ratio", 0, "--image_mask.ratio", 0, "--run.max_steps", 3]
    arguments += ["--mask.kind", "tube"]
    assert main([str(argument) for argument in arguments]) == 0
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(0 < row["uta"] < 4 for row in rows)


def test_whole_clip_on_the_command_line(world: Path) -> None:
    """A CLIP with its text tower as teacher: the loss is in every row, and retrieval takes the checkpoint."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=32)
    clip = open_clip.CLIP(16, vision, CLIPTextCfg(width=64, heads=1, layers=1), quick_gelu=True)
    save_state(clip.state_dict(), world / "clip.safetensors")
    arguments = training(world, [VIDEO] * 4, [IMAGE] * 2) + ["--teacher.weights", world / "clip.safetensors"]
    arguments += ["--embed_dim", 16, "--losses.text_projection", 1, "--run.max_steps", 3]
    assert main([str(argument) for argument in arguments]) == 0
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(0 < row["text_projection"] < 2 for row in rows)
    saved = torch.load(next((world / "run").glob("checkpoint-*3.pt")), weights_only=True)
    assert not any("teacher" in key for key in saved["model"])
    assert saved["config"]["losses"]["text_projection"] == 1


def test_more_queries_than_clips_and_more_candidates_than_there_are(world: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(argument) for argument in training(world, [VIDEO] * 2)]) == 0
    (checkpoint,) = (world / "run").glob("checkpoint-*.pt")
    entries = [
        VIDEO | {"caption": ["red", "a thing", "a"]},
        {"video": "video1.mp4", "caption": ["a red thing", "thing"]},
    ]
    (world / "test.json").write_text(json.dumps(entries))
    evaluating = ["eval", "retrieve", str(checkpoint), str(world / "test.json"), "--workers", "0", "--device", "cpu"]
    figures = []
    for top_k in (5, 128):
        capsys.readouterr()
        assert main([*evaluating, "--top_k", str(top_k)]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1] and (figures[0]["clips"], figures[0]["captions"]) == (2, 5)
    assert figures[0]["match_t2v_r5"] == figures[0]["match_v2t_r5"] == 1.0
    for entry, expected in (
        ({"video": "video1.mp4"}, 'entry 1 has no "caption"'),
        ({"image": "none.png", "caption": "a"}, "1 of the 2 files of"),
        ({"video": "broken.mp4", "caption": "a"}, "broken.mp4"),
        ({"video": "video1.mp4", "caption": " "}, "the caption ' ' has no word"),
        ({"video": "video1.mp4", "caption": 7}, '"caption" is 7'),
    ):
        (world / "test.json").write_text(json.dumps([VIDEO, entry]))
        assert expected in error_of(capsys, *evaluating)


def test_a_tokenizer_that_has_moved(world: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(argument) for argument in training(world, [VIDEO] * 2)]) == 0
    (checkpoint,) = (world / "run").glob("checkpoint-*.pt")
    content = torch.load(checkpoint, weights_only=True)
    del content["vocabulary"]  # as files were that only named it
    torch.save(content, checkpoint)
    evaluating = ["eval", "retrieve", str(checkpoint), str(world / "videos.json"), "--workers", "0", "--device", "cpu"]
    moved = world / "moved"
    moved.mkdir()
    (world / "vocab.txt").rename(moved / "vocab.txt")
    said = error_of(capsys, *evaluating)
    assert "holds no tokenizer" in said and "if it has moved, say where: --tokenizer" in said
    assert main([*evaluating, "--tokenizer", str(moved)]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 2
    (moved / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(20))]))
    assert "has 28 words, but the model of" in error_of(capsys, *evaluating, "--tokenizer", moved)


def test_a_tokenizer_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes one of the special tokens alone, to which every word is unknown."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no tokenizer 'no-such-tokenizer'"):
        load_tokenizer("no-such-tokenizer")
    with pytest.raises(DataError, match="tokenizer is empty; give a name"):
        load_tokenizer("")
