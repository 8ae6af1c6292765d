"""`demo`: what it finds, plays and refuses, without a browser (test_page.py has one)."""

import io
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.test_embed import WORDS, embed, saved
from tests.videos import write_video
from umt_fast import recipe
from umt_fast.__main__ import main
from umt_fast.cli.embed import read_features
from umt_fast.demo import clips
from umt_fast.demo.gallery import Gallery
from umt_fast.demo.server import Demo, application
from umt_fast.hub import load_model

# Tokens of a text after the class token.
READ = recipe.load("tests/assets/tiny.py:captions").max_length - 1

pytest.importorskip("flask", reason="the page's server is Flask: pip install 'umt_fast[demo]'")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Features of five videos and a stage-2 model's weights."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "clips").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        base = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(12, 0).repeat(12, 1).astype(int)
        frames = [np.clip(base + rng.integers(-30, 30, base.shape), 0, 255).astype(np.uint8) for _ in range(20)]
        write_video(folder / "clips" / f"{number}.mp4", frames)
    weights, _ = saved(folder, "captions")
    (folder / "words").mkdir()
    (folder / "words" / "vocab.txt").write_text("\n".join(WORDS))
    assert embed(folder / "clips", weights, folder / "features.safetensors") == 0
    return folder / "features.safetensors", weights


@pytest.fixture
def demo(files: tuple[Path, Path]) -> Demo:
    features, weights = files
    vectors, names, _ = read_features(features)
    return Demo(
        Gallery(vectors, names),
        load_model(weights=weights, device="cpu", tokenizer=features.with_name("words")),
    )


@pytest.fixture
def client(demo: Demo):
    return application(demo, {"localhost"}).test_client()


def test_the_best_clips_of_a_text_and_of_a_clip(demo: Demo, client, files: tuple[Path, Path]) -> None:
    vectors, names, _ = read_features(files[0])
    scores = vectors["embedding"] @ demo.model.encode_text(["a b"])[0]
    found = client.post("/search", json={"text": "a b"}).json
    assert [row["row"] for row in found["results"]] == scores.argsort(descending=True).tolist() and not found["note"]
    assert [row["score"] for row in found["results"]] == pytest.approx(scores.sort(descending=True).values.tolist())
    assert [row["name"] for row in found["results"]] == [names[row["row"]] for row in found["results"]]
    unit = F.normalize(vectors["embedding"], dim=1)
    found = client.post("/search", json={"clip": 2, "top": 3}).json["results"]
    expected = [row for row in (unit @ unit[2]).argsort(descending=True).tolist() if row != 2][:3]
    assert [row["row"] for row in found] == expected


def test_queries_that_are_empty_or_long(client) -> None:
    empty = client.post("/search", json={"text": "  "}).json
    assert [row["row"] for row in empty["results"]] == [0, 1, 2, 3, 4] and "Type what happens" in empty["note"]
    long = client.post("/search", json={"text": "a b " * 500}).json
    assert long["note"] == f"Only the first {READ} of 1000 tokens were read." and len(long["results"]) == 5
    refused = client.post("/search", json={"text": "a" * 5001})
    assert refused.status_code == 400 and refused.json["error"] == "the text has 5001 characters; give at most 5000"
    wordless = client.post("/search", json={"text": "?!"})
    assert wordless.status_code == 400 and "has no word" in wordless.json["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        ("/search", {"clip": 5}, 404, "no clip 5; there are 5, from 0"),
        ("/search", {"clip": -1}, 404, "no clip -1"),
        ("/search", {"clip": "1"}, 400, "'clip' is '1'"),
        ("/search", {"clip": True}, 400, "'clip' is True"),
        ("/search", {"text": "a", "top": -3}, 400, "top is -3; it must lie in [1, 60]"),
        ("/search", {"words": "a"}, 400, "'words' is 'a'"),
        ("/search", [1], 400, "not a JSON object"),
        ("/timeline", {"clip": 0}, 400, "type one"),
        ("/timeline", {"clip": 9, "text": "a"}, 404, "no clip 9"),
    ],
)
def test_requests_that_cannot_be_answered(client, path: str, body: object, status: int, expected: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status and expected in answer.json["error"]


def test_a_page_elsewhere_cannot_ask(client) -> None:
    answer = client.post("/search", json={"text": "a"}, headers={"Host": "evil.example:7860"})
    assert answer.status_code == 403 and "evil.example" in answer.json["error"]


def test_previews(client, demo: Demo) -> None:
    answer = client.get("/preview/1.webm")
    assert answer.status_code == 200 and answer.mimetype == "video/webm"
    with av.open(io.BytesIO(answer.data)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name.startswith("vp8")
    with av.open(demo.gallery.names[1]) as container:
        real = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate)
    assert len(shown) == -(-len(real) * clips.RATE // rate)
    assert np.abs(shown[0].astype(int) - real[0]).mean() < 12 < np.abs(shown[0].astype(int) - real[0][::-1]).mean()
    part = client.get("/preview/1.webm", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.data == answer.data[10:20]


def test_files_that_are_gone_or_damaged(client, demo: Demo, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"no video")
    demo.gallery.names = [str(tmp_path / "gone.mp4"), str(damaged), *demo.gallery.names[2:]]
    gone = client.get("/preview/0.webm")
    assert gone.status_code == 404 and "gone.mp4 is not there any more" in gone.json["error"]
    assert client.get("/preview/1.webm").status_code == 422
    assert client.post("/timeline", json={"clip": 0, "text": "a"}).status_code == 404
    assert client.get("/preview/7.webm").status_code == 404


def test_the_time_line_is_of_the_clips_parts(client, demo: Demo, tmp_path: Path) -> None:
    """A clip that is one of the others in its first half and another in its second."""
    first, second = (demo.gallery.names[row] for row in (0, 3))
    frames = []
    for name in (first, second):
        with av.open(name) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    joined = tmp_path / "joined.mp4"
    write_video(joined, frames)
    demo.gallery.names = [*demo.gallery.names[:4], str(joined)]
    scores = client.post("/timeline", json={"clip": 4, "text": "c d"}).json["scores"]
    whole = (demo.model.encode_video([first, second]) @ demo.model.encode_text(["c d"])[0]).tolist()
    assert len(scores) == 8
    for half, score in zip((scores[:4], scores[4:]), whole, strict=True):
        assert np.mean(half) == pytest.approx(score, abs=0.3 * abs(whole[0] - whole[1]))


def test_a_model_that_reads_no_texts(tmp_path: Path, files: tuple[Path, Path]) -> None:
    weights, _ = saved(tmp_path, "tiny")
    assert embed(files[0].with_name("clips"), weights, tmp_path / "f.safetensors") == 0
    vectors, names, _ = read_features(tmp_path / "f.safetensors")
    client = application(
        Demo(Gallery(vectors, names), load_model(weights=weights, device="cpu")), {"localhost"}
    ).test_client()
    assert "pick a clip" in client.post("/search", json={}).json["note"]
    assert len(client.post("/search", json={"clip": 0}).json["results"]) == 4
    assert "reads no texts" in client.post("/search", json={"text": "a"}).json["error"]


def test_a_graph_of_neighbors_finds_what_comparing_all_does(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="pip install 'umt_fast[index]'")
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, 32, generator=generator)
    rows = (centers[:, None] + 0.3 * torch.randn(40, 50, 32, generator=generator)).flatten(0, 1)
    vectors, names = {"pooled": rows, "embedding": rows}, [str(row) for row in range(2000)]
    exact = Gallery(vectors, names)
    graph = Gallery(vectors, names, index="hnsw", beside=tmp_path / "f.safetensors")
    hits = 0
    for query in torch.randn(50, 32, generator=generator):
        expected, found = (dict(gallery.of_text(query, 10)) for gallery in (exact, graph))
        hits += len(expected.keys() & found.keys())
        assert all(found[row] == pytest.approx(expected[row], rel=1e-5) for row in expected.keys() & found.keys())
    assert hits >= 0.95 * 500
    assert [row for row, _ in graph.of_clip(7, 5)] == [row for row, _ in exact.of_clip(7, 5)]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 2 and all(name.endswith(".hnsw") for name in kept)
    again = Gallery(vectors, names, index="hnsw", beside=tmp_path / "f.safetensors")
    assert again.of_text(rows[3], 5) == graph.of_text(rows[3], 5)


def test_what_the_command_refuses(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    features, weights = map(str, files)
    other, _ = saved(tmp_path, "captions", seed=1)
    for arguments, expected in (
        ([], "give --features features.safetensors"),
        (["--features", features], "demo has no weights"),
        (["--features", features, "--weights", str(other)], "was made with other weights"),
        (["--features", str(tmp_path / "none.safetensors"), "--weights", weights], "no features at"),
        (["--features", features, "--weights", weights, "--port", "70000"], "port is 70000"),
        (["--features", features, "--weights", weights, "--host", "192.0.2.1", "--port", "0"], "cannot be listened on"),
    ):
        assert main(["demo", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_names_of_clips_are_never_markup() -> None:
    """The page puts names and messages in as text."""
    page = (Path(clips.__file__).parent / "page.html").read_text()
    assert (
        "innerHTML" not in page
        and "insertAdjacentHTML" not in page
        and "http://" not in page
        and "https://" not in page
    )


def test_folders_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(6):
        Image.new("RGB", (41, 31), (40 * number, 0, 0)).save(tmp_path / f"img_{number:05d}.png")
    with av.open(io.BytesIO(clips.preview(tmp_path))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    frames = clips.parts(tmp_path, 3, 2)
    assert [int(frame[0, 0, 0]) for part in frames for frame in part] == [0, 40, 80, 120, 160, 200]
    shutil.copy(__file__, tmp_path / "img_00001.png")
    with pytest.raises(clips.VideoError, match="img_00001.png: not a readable picture"):
        clips.preview(tmp_path)
