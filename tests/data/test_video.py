"""Decoding of real files: equal to a plain sequential decode, or reported in one line."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from av.error import FFmpegError
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.decode.sampling import sparse_train
from umt_fast.data.decode.video import VideoError, decode_frames, limited, outline
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.prepare.scan import scan
from umt_fast.data.prepare.shards import record_of
from umt_fast.data.sources.lists import Clip, read_list
from umt_fast.data.sources.prepared import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("UMT_SHARED", REPOSITORY.parent / "shared"))
VIDEOS = sorted(path for path in (SHARED / "videos").glob("*") if path.suffix not in (".md", ".txt"))


def plain_decode(path: Path) -> list[np.ndarray]:
    """Every decodable picture of the largest stream, turned as its own metadata says, by the shortest PyAV program."""
    pictures = []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(max(container.streams.video, key=lambda stream: stream.width)):
                picture = frame.to_ndarray(format="rgb24")
                pictures.append(np.rot90(picture, round(frame.rotation / 90) % 4))
        except FFmpegError:
            pass
    return pictures


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_real_file_equals_a_sequential_decode(path: Path) -> None:
    def choose(count: int) -> np.ndarray:
        return sparse_train(count, 8, np.random.default_rng(1))

    try:
        frames = decode_frames(path, choose)
    except VideoError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    plain = plain_decode(path)
    chosen = choose(len(plain))
    assert frames.dtype == np.uint8 and frames.shape[0] == 8
    for frame, number in zip(frames, chosen, strict=True):
        np.testing.assert_array_equal(frame, plain[number])


def test_epoch_over_all_real_files_ends(shared: Path, tmp_path: Path) -> None:
    table = tmp_path / "all.csv"
    table.write_text("".join(f"{path},0\n" for path in VIDEOS))
    data = DataConfig(workers=2)
    clips = read_list(table, data)
    loader = ClipLoader(clips, data, num_frames=4, image_size=32, batch_size=7)
    batches = list(loader)
    assert len(batches) == len(VIDEOS) // 7
    assert all(batch["video"].shape == (7, 4, 32, 32, 3) for batch in batches)
    assert all("\n" not in reason for reason in loader.bad_files.values())


def test_scan_of_real_files(shared: Path, tmp_path: Path) -> None:
    table = tmp_path / "all.csv"
    table.write_text("".join(f"{path},0\n" for path in VIDEOS))
    counts = scan(table, tmp_path / "all.jsonl", workers=2)
    assert counts["good"] + counts["bad"] == len(VIDEOS)
    known = {Path(clip.path).name: clip for clip in read_list(tmp_path / "all.jsonl", DataConfig())}
    for path in VIDEOS:
        if path.name in known:
            assert known[path.name].num_frames == len(plain_decode(path)), path.name


def encode(path: Path, pictures: list[np.ndarray], codec: str = "libx264", **options: str) -> None:
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def gray_clip(path: Path, count: int = 20) -> None:
    encode(path, [np.full((32, 48, 3), 10 * number, np.uint8) for number in range(count)])


def test_frames_are_the_ones_asked_for(tmp_path: Path) -> None:
    gray_clip(tmp_path / "a.mp4")
    frames = decode_frames(tmp_path / "a.mp4", lambda count: np.array([0, 7, 7, count - 1]))
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [0, 70, 70, 190], atol=4)


def two_streams(path: Path, second_is_default: bool) -> None:
    """A dark stream of 32 x 24 pixels and a bright one of 64 x 48, one of them the file's default."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, side in enumerate((32, 64)):
            streams.append(container.add_stream("libx264", rate=10))
            streams[-1].width, streams[-1].height, streams[-1].pix_fmt = side, side * 3 // 4, "yuv420p"
            streams[-1].disposition = int(number == second_is_default)  # AV_DISPOSITION_DEFAULT is 1
        for number in range(12):
            for stream, level in zip(streams, (3, 120), strict=True):
                picture = np.full((stream.height, stream.width, 3), level + 10 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())


@pytest.mark.parametrize("second", [False, True])
def test_of_several_streams_the_default_one_is_read(second: bool, tmp_path: Path) -> None:
    """By training, with and without a manifest, by `scan` and by `prepare`."""
    path, wide, level = tmp_path / "two.mkv", 64 if second else 32, 120 if second else 3
    two_streams(path, second)
    assert decode_frames(path, lambda count: np.array([0, 5, count - 1])).shape == (3, wide * 3 // 4, wide, 3)
    (tmp_path / "list.csv").write_text(f"{path},0\n")
    scan(tmp_path / "list.csv", tmp_path / "list.jsonl", workers=0)
    (clip,) = read_list(tmp_path / "list.jsonl", DataConfig())
    assert (clip.width, clip.height, clip.num_frames) == (wide, wide * 3 // 4, 12)
    frames = decode_frames(path, lambda count: np.array([0, 5, count - 1]), clip.num_frames)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [level, level + 50, level + 110], atol=4)
    assert outline(path).width == wide
    record, _ = record_of(0, clip, Settings(), "")
    jpeg = record[record.index(b"\xff\xd8") :]
    assert Image.open(io.BytesIO(jpeg)).size == (wide, wide * 3 // 4)


def test_the_best_stream_of_a_real_file(shared: Path) -> None:
    """Its first video stream has 320 x 180 pixels; FFmpeg, and with it decord and torchcodec, shows the one of 480 x 270."""
    path = shared / "videos" / "nasa_13013.mp4"
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams[3])]
    frames = decode_frames(path, lambda count: np.array([0, 7, count - 1]))
    assert frames.shape == (3, 270, 480, 3)
    for frame, number in zip(frames, (0, 7, len(expected) - 1), strict=True):
        np.testing.assert_array_equal(frame, expected[number])


@pytest.mark.parametrize("manifest", [False, True])
def test_first_seconds_alone_are_sampled(manifest: bool, tmp_path: Path) -> None:
    """20 gray frames at 10 a second; the rate comes from the container."""
    gray_clip(tmp_path / "a.mp4")
    clip = Clip(path=str(tmp_path / "a.mp4"), num_frames=20 if manifest else 0)
    kind = {"num_frames": 2, "image_size": 32, "seed": 0}

    def levels(train: bool, seconds: float) -> np.ndarray:
        data = DataConfig(sampling="intervals", augment="whole", max_seconds=seconds)
        reader = ClipReader([clip], data, **kind, train=train)
        samples = [reader.read(epoch, 0).video[0].mean((1, 2, 3)) for epoch in range(30 if train else 1)]
        return np.stack(samples) / 10

    # The intervals of 8 frames are 0 to 3 and 4 to 7, without their last ones in training.
    np.testing.assert_allclose(levels(False, 0.8)[0], [1, 5], atol=0.4)
    np.testing.assert_allclose(levels(False, 2.0)[0], levels(False, 0)[0], atol=0)
    drawn = levels(True, 0.8).round()
    assert set(drawn[:, 0]) == {0, 1, 2} and set(drawn[:, 1]) == {4, 5, 6}
    np.testing.assert_allclose(levels(False, 0.01)[0], [0, 0], atol=0.4)


def test_a_file_without_a_rate_has_no_first_seconds() -> None:
    choose = limited("a.mp4", lambda count: np.arange(count), 0.0, 30.0)
    with pytest.raises(VideoError, match="a.mp4: the file tells no frame rate.*data.max_seconds 30.0"):
        choose(20)
    assert choose(1).tolist() == [0]  # a picture


def test_first_seconds_of_folders_of_pictures_are_refused() -> None:
    clips = [Clip(path="x", num_frames=9, frame_folder=True)]
    with pytest.raises(DataError, match="data.max_seconds is 30, but folders of pictures have no frame rate"):
        ClipLoader(clips, DataConfig(max_seconds=30), num_frames=2, image_size=32, batch_size=1)


def test_truncated_file_is_chosen_from_what_decodes(tmp_path: Path) -> None:
    path = tmp_path / "cut.mkv"
    rng = np.random.default_rng(0)
    encode(path, [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(30)], g="5")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    total = len(plain_decode(path))
    assert 0 < total < 30
    # Announced as whole: the choice must be redone over the frames that are there.
    frames = decode_frames(path, lambda count: np.array([0, count - 1]), num_frames=30)
    np.testing.assert_array_equal(frames[1], plain_decode(path)[total - 1])


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100], ids=["empty", "text"])
def test_what_is_no_video_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "wrong.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="wrong.mp4"):
        decode_frames(path, lambda count: np.zeros(1, np.int64))


def test_bad_clips_are_replaced_and_too_many_stop(tmp_path: Path) -> None:
    from umt_fast.data.errors import DataError

    for number in range(6):
        gray_clip(tmp_path / f"{number}.mp4")
    (tmp_path / "5.mp4").write_bytes(b"broken")
    clips = [Clip(path=str(tmp_path / f"{number}.mp4"), label=number) for number in range(6)]
    kind = {"num_frames": 4, "image_size": 32, "batch_size": 2}
    loader = ClipLoader(clips, DataConfig(workers=0, max_bad_share=0.2), **kind)
    seen = [index for batch in loader for index in batch["index"].tolist()]
    assert len(seen) == 6 and 5 not in seen and list(loader.bad_files) == [clips[5].path]
    strict = ClipLoader(clips, DataConfig(workers=0, max_bad_share=0.0), **kind)
    with pytest.raises(DataError, match="max_bad_share"):
        list(strict)


def test_evaluation_does_not_replace(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"broken")
    reader = ClipReader(
        [Clip(path=str(tmp_path / "a.mp4"))], DataConfig(), num_frames=2, image_size=32, seed=0, train=False
    )
    with pytest.raises(VideoError, match="a.mp4"):
        reader.read(0, 0)


def test_frame_folder(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(1, 11):
        Image.fromarray(np.full((40, 40, 3), number * 20, np.uint8)).save(folder / f"img_{number:05d}.png")
    (tmp_path / "list.csv").write_text("clip,10,3\n")
    data = DataConfig(workers=0, frame_pattern="img_{:05d}.png")
    clips = read_list(tmp_path / "list.csv", data)
    loader = ClipLoader(clips, data, num_frames=5, image_size=32, batch_size=1, train=False)
    (batch,) = list(loader)
    assert batch["label"].tolist() == [3]
    np.testing.assert_allclose(batch["video"].float().mean((2, 3, 4))[0], [40, 80, 120, 160, 200], atol=1)


def test_scan_continues_after_a_kill(tmp_path: Path) -> None:
    import json

    for number in range(4):
        gray_clip(tmp_path / f"{number}.mp4")
    (tmp_path / "3.mp4").write_bytes(b"broken")
    (tmp_path / "list.csv").write_text("".join(f"{number}.mp4,{number}\n" for number in range(4)))
    out = tmp_path / "list.jsonl"
    assert scan(tmp_path / "list.csv", out, workers=1) == {"good": 3, "bad": 1, "cut": 0, "resumed": 0}
    whole = out.read_text()
    # As a kill leaves it: two results journalled, a third cut short, no manifest.
    entries = [json.loads(line) for line in whole.splitlines()]
    journal = [json.dumps([n, str(tmp_path / f"{n}.mp4"), entries[n], ""]) for n in range(2)]
    out.with_name("list.jsonl.partial").write_text("\n".join(journal) + '\n[2, "trunc')
    out.unlink()
    assert scan(tmp_path / "list.csv", out, workers=1) == {"good": 3, "bad": 1, "cut": 0, "resumed": 2}
    assert out.read_text() == whole
    assert not out.with_name("list.jsonl.partial").exists()


def test_scan_without_workers(tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("umt_fast.data.prepare.scan.worker_pool")
    assert scan(tiny_list, tiny_list.with_name("manifest.jsonl"), workers=0)["good"] == 2


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_scan_goes_on_and_ends_with_the_same_manifest(tmp_path: Path, tiny_list: Path) -> None:
    """A real SIGKILL to the whole process group, at three places; what was journalled is not decoded again."""
    names = [tiny_list.with_name(f"video{number % 2}.mp4") for number in range(60)]
    table = tmp_path / "sixty.csv"
    table.write_text("".join(f"{name},{number}\n" for number, name in enumerate(names)) + "missing.mp4,0\n")

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "umt_fast", "scan", str(table), "--out", str(out), "--workers", "1"]

    def run(out: Path) -> str:
        done = subprocess.run(command(out), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(whole)
    journal = killed.with_name("killed.jsonl.partial")
    kept = 0
    for wanted in (1, 12, 30):
        with subprocess.Popen(
            command(killed), cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and (not journal.exists() or len(journal.read_text().splitlines()) < wanted):
                time.sleep(0.002)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        kept = len(journal.read_text().splitlines()) if journal.exists() else kept
    assert kept and not killed.exists(), "the scan ended before it could be killed"
    said = run(killed)
    assert "were scanned before" in said, said
    assert killed.read_text() == whole.read_text()
    assert (
        killed.with_name("killed.jsonl.bad.jsonl").read_text() == whole.with_name("whole.jsonl.bad.jsonl").read_text()
    )
    assert not journal.exists()
