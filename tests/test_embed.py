"""`embed` and `search` from the command line, against direct computation with the trainer's module and loader."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.data.test_cuts import cut_video
from tests.videos import write_video
from umt_fast import recipe
from umt_fast.__main__ import main
from umt_fast.cli.embed import read_features, write_features
from umt_fast.data.decode.sampling import interval_middle
from umt_fast.data.decode.transforms import apply, whole
from umt_fast.data.decode.video import decode_frames
from umt_fast.models.weights import save_state
from umt_fast.tasks import task_of

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "tests" / "assets" / "tiny.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]


def saved(folder: Path, name: str, seed: int = 0) -> tuple[Path, torch.nn.Module]:
    config = recipe.load(f"{TINY}:{name}")
    torch.manual_seed(seed)
    module = task_of(config).untrained(config).trainable.eval()
    with torch.no_grad():  # so that clips and texts differ more than fresh weights make them
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    save_state(module.state_dict(), folder / f"{name}{seed}.safetensors", task_of(config).describe(config))
    return folder / f"{name}{seed}.safetensors", module


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Seven videos of noise with different content in a folder and its subfolder, one of them damaged."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        name = f"more/{number}.mkv" if number > 3 else f"{number}.mp4"
        base = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1).astype(int)
        noisy = [np.clip(base + rng.integers(-30, 30, base.shape), 0, 255).astype(np.uint8) for _ in range(8)]
        write_video(folder / name, noisy)
    (folder / "2b.mp4").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("no video")
    return folder


def good(folder: Path) -> list[Path]:
    return [folder / f"{number}.mp4" for number in range(4)] + [folder / "more" / f"{number}.mkv" for number in (4, 5)]


@torch.no_grad()
def embeddings(module: torch.nn.Module, paths: list[Path]) -> tuple[Tensor, Tensor]:
    """(V, E), (V, C), one clip at a time, frames chosen and cut by the rules of retrieval."""
    found = []
    for path in paths:
        frames = decode_frames(path, lambda count: interval_middle(count, 4))
        video = torch.from_numpy(apply(frames, whole(48, 40), 32))[None]
        tokens, _ = module.vision_encoder.embed(video)
        pooled = module.vision_encoder.pool_norm(tokens.mean(1))
        found.append((module.project_vision(module.vision_encoder.pool(tokens, 4))[0], pooled[0]))
    first, second = zip(*found, strict=True)
    return torch.stack(first), torch.stack(second)


def embed(source: Path, weights: Path, out: Path, *more: object) -> int:
    arguments = ["--weights", str(weights), "--out", str(out), "--device", "cpu", "--workers", "0", *map(str, more)]
    return main(["embed", str(source), *arguments])


def searched(capsys: pytest.CaptureFixture, *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert main(["search", *map(str, arguments), "--json", "--device", "cpu"]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_that_are_cut_are_counted(
    workers: int, tmp_path: Path, clips: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights, _ = saved(tmp_path, "tiny")
    assert embed(clips, weights, tmp_path / "f.safetensors", "--workers", workers) == 0
    assert "cut in the middle" not in caplog.text
    for name in ("7.mkv", "8.mkv"):
        cut_video(clips / name)
    assert embed(clips, weights, tmp_path / "f.safetensors", "--workers", workers) == 0
    said = [record.getMessage() for record in caplog.records if "cut in the middle" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("2 of 9 clips are cut in the middle"), said
    assert re.search(r"the first: .*7\.mkv: \d+ of 40 frames decode", said[0])


@torch.no_grad()
def test_embed_and_search(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    weights, module = saved(tmp_path, "captions")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(WORDS))
    out = tmp_path / "features.safetensors"
    assert embed(clips, weights, out, "--batch_size", 4, "--workers", 2) == 0
    said = capsys.readouterr()
    assert f"{out}: 6 clips, 1 left out that cannot be read: pooled (6, 32), embedding (6, 8)" in said.out
    vectors, names, _ = read_features(out)
    assert names == [str(path) for path in good(clips)]
    embedding, pooled = embeddings(module, good(clips))
    torch.testing.assert_close(vectors["embedding"], embedding)
    torch.testing.assert_close(vectors["pooled"], pooled)

    assert main(["convert", str(out), str(tmp_path / "x.safetensors")]) == 2
    assert "holds features that `embed` wrote" in capsys.readouterr().err
    base = ["--in", out, "--weights", weights, "--tokenizer", tmp_path / "words"]
    assert "have words that the tokenizer does not know" not in caplog.text
    searched(capsys, "zebra a", *base)
    assert "1 of 1 texts have words that the tokenizer does not know; each is read as [UNK]" in caplog.text
    orders = set()
    for text, ids in (("A, b!", [2, 5, 6]), ("k c", [2, 15, 7]), ("e", [2, 9])):
        encoded = module.text_encoder.encode(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        scores = (embedding @ module.project_text(encoded)[0]).tolist()
        expected = sorted(range(6), key=lambda row: -scores[row])
        found = searched(capsys, text, *base)
        assert [line["name"] for line in found] == [names[row] for row in expected]
        assert [line["rank"] for line in found] == [1, 2, 3, 4, 5, 6]
        assert [line["score"] for line in found] == pytest.approx([scores[row] for row in expected], abs=2e-5)
        assert searched(capsys, text, *base, "--top", 2) == found[:2]
        orders.add(tuple(expected))
    assert len(orders) > 1  # texts differ in what they find

    table = F.cosine_similarity(embedding[:, None], embedding[None], dim=-1)
    for row, path in enumerate(good(clips)):
        found = searched(capsys, "--clip", path, "--in", out, "--weights", weights)
        assert [line["name"] for line in found] == [names[other] for other in table[row].argsort(descending=True)]
        assert found[0]["name"] == str(path) and found[0]["score"] == pytest.approx(1.0, abs=1e-4)
    assert main(["search", "a", *map(str, base), "--device", "cpu", "--top", "1"]) == 0
    rank, score, name = capsys.readouterr().out.split()
    assert rank == "1" and name in names and -1 <= float(score) <= 1


def test_a_student_has_pooled_features_alone(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture) -> None:
    weights, _ = saved(tmp_path, "tiny")
    out = tmp_path / "features.safetensors"
    assert embed(clips / "more", weights, out) == 0
    vectors, names, of = read_features(out)
    assert vectors.keys() == {"pooled"} and len(names) == 2 and of["model"]["task"] == "pretraining"
    found = searched(capsys, "--clip", clips / "more" / "5.mkv", "--in", out, "--weights", weights)
    assert found[0]["name"].endswith("5.mkv") and found[0]["score"] == pytest.approx(1.0, abs=1e-4)
    assert main(["search", "a", "--in", str(out), "--weights", str(weights), "--device", "cpu"]) == 2
    assert "reads no texts; search with --clip PATH" in capsys.readouterr().err


def test_sources(tmp_path: Path, clips: Path) -> None:
    """A file, a list with labels, a caption list that names a clip twice, a prepared folder: the same vectors."""
    weights, _ = saved(tmp_path, "tiny")
    (clips / "list.csv").write_text("1.mp4,0\nmore/5.mkv,1\n")
    captions = [
        {"video": "1.mp4", "caption": "a"},
        {"video": "more/5.mkv", "caption": "b"},
        {"video": "1.mp4", "caption": "c"},
    ]
    (clips / "captions.json").write_text(json.dumps(captions))
    found = {}
    for name, source in (
        ("list", clips / "list.csv"),
        ("captions", clips / "captions.json"),
        ("file", clips / "1.mp4"),
    ):
        assert embed(source, weights, tmp_path / f"{name}.safetensors") == 0
        found[name] = read_features(tmp_path / f"{name}.safetensors")
    assert found["list"][1] == found["captions"][1] == [str(clips / "1.mp4"), str(clips / "more" / "5.mkv")]
    assert torch.equal(found["list"][0]["pooled"], found["captions"][0]["pooled"])
    torch.testing.assert_close(found["file"][0]["pooled"], found["list"][0]["pooled"][:1])
    assert not torch.allclose(*found["list"][0]["pooled"], atol=1e-3)
    prepared = tmp_path / "prepared"
    assert main(["prepare", str(clips / "list.csv"), "--out", str(prepared), "--workers", "1"]) == 0
    assert embed(prepared, weights, tmp_path / "prepared.safetensors") == 0
    again = read_features(tmp_path / "prepared.safetensors")
    alike = F.cosine_similarity(again[0]["pooled"][:, None], found["list"][0]["pooled"][None], dim=-1)
    assert again[1] == found["list"][1] and alike.argmax(1).tolist() == [0, 1]


@pytest.mark.process
@pytest.mark.slow
def test_ranks_share_the_clips(tmp_path: Path, clips: Path) -> None:
    weights, _ = saved(tmp_path, "captions")
    assert embed(clips, weights, tmp_path / "one.safetensors") == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "umt_fast",
        "embed",
        str(clips),
        "--weights",
        str(weights),
        "--out",
        str(tmp_path / "two.safetensors"),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--batch_size",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("6 clips, 1 left out") == 1
    one, two = (read_features(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one[1] == two[1]
    for name in one[0]:
        torch.testing.assert_close(one[0][name], two[0][name])


def test_refusals(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture) -> None:
    weights, _ = saved(tmp_path, "captions")
    other, _ = saved(tmp_path, "captions", seed=1)
    out = tmp_path / "features.safetensors"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    shutil.copy(clips / "2b.mp4", tmp_path / "bad" / "a.mp4")
    assert embed(clips / "1.mp4", weights, out) == 0
    before = out.read_bytes()
    base = ["embed", str(clips), "--device", "cpu", "--workers", "0"]
    found = ["search", "a", "--device", "cpu", "--weights", str(weights)]
    for arguments, message in (
        (base, "embed has no output; give --out features.safetensors"),
        ([*base, "--out", str(tmp_path / "f.pt"), "--weights", str(weights)], "give it the suffix .safetensors"),
        ([*base, "--out", str(out)], "embed has no weights"),
        ([*base, "--out", str(weights), "--weights", str(weights)], "is an input of this command"),
        (["embed", str(tmp_path / "empty"), "--out", str(out), "--weights", str(weights)], "holds no video"),
        (["embed", str(tmp_path / "x.mp4"), "--out", str(out), "--weights", str(weights)], "no video at"),
        (
            ["embed", str(tmp_path / "bad"), "--out", str(out), "--weights", str(weights), "--workers", "0"],
            "none of the 1 clips of .*bad can be read",
        ),
        (["search", "--in", str(out), "--weights", str(weights)], "give a text or --clip PATH, one of the two"),
        ([*found, "--in", str(out), "--clip", str(clips / "1.mp4")], "one of the two"),
        (found, "give --in features.safetensors"),
        ([*found, "--in", str(tmp_path / "none.safetensors")], "no features at"),
        ([*found, "--in", str(weights)], "is no file that `embed` wrote"),
        ([*found, "--in", str(clips / "1.mp4")], "is no file that `embed` wrote"),
        (["search", "a", "--in", str(out), "--weights", str(other), "--device", "cpu"], "was made with other weights"),
        ([*found, "--in", str(out)], "tokenizer this model was trained with is not known"),
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err.strip().splitlines()
        assert re.search(message, said[-1]), said
    assert out.read_bytes() == before and not list(tmp_path.glob("*.writing"))


def test_a_file_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "features.safetensors"
    write_features(out, {"pooled": torch.ones(2, 3)}, ["a", "ü\n"], {"fingerprint": "x"})
    vectors, names, of = read_features(out)
    assert torch.equal(vectors["pooled"], torch.ones(2, 3)) and names == ["a", "ü\n"] and of == {"fingerprint": "x"}

    def full(content: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umt_fast.cli.embed.save_file", full)
    with pytest.raises(ValueError, match="cannot be written"):
        write_features(out, {"pooled": torch.zeros(9, 3)}, ["b"], {})
    assert read_features(out)[1] == ["a", "ü\n"] and not list(tmp_path.glob("*.writing"))
