"""Prepared shards: the right frames, whatever interrupts their making, read like any list."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.videos import write_video
from umt_fast.config import DataConfig
from umt_fast.data.decode.sampling import sparse_train
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.prepare.scan import scan
from umt_fast.data.prepare.shards import prepare, verify
from umt_fast.data.sources import prepared
from umt_fast.data.sources.captions import read_captions
from umt_fast.data.sources.lists import Clip, read_list
from umt_fast.data.sources.prepared import Settings, StoredChooser, candidates, read_prepared

REPOSITORY = Path(__file__).resolve().parents[2]
KIND = {"num_frames": 4, "image_size": 32, "batch_size": 2, "seed": 3}


def gray_video(path: Path, count: int, first: int = 0) -> None:
    """Frame i is gray of value first + 4 i."""
    write_video(path, (np.full((64, 80, 3), first + 4 * number, np.uint8) for number in range(count)), crf="4")


def stored_frames(clip: Clip, choose: StoredChooser) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in read_prepared(clip, choose)])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Seven clips: two long, one short, one missing, one broken, one named twice."""
    for name, count in (("a.mp4", 60), ("b.mp4", 45), ("short.mp4", 5)):
        gray_video(tmp_path / name, count)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    names = ["a.mp4", "missing.mp4", "b.mp4", "short.mp4", "broken.mp4", "a.mp4"]
    path = tmp_path / "list.csv"
    path.write_text("".join(f"{name},{number}\n" for number, name in enumerate(names)))
    return path


def test_candidates_make_every_frame_of_a_segment_equally_likely() -> None:
    settings, rng = Settings(segments=4, per_segment=3), np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        kept = candidates(39, settings, rng)
        assert len(kept) == 12 and (np.diff(kept) > 0).all()
        drawn.append(kept[sparse_train(12, 4, rng)])
    for segment, column in enumerate(np.stack(drawn).T):
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == list(range(9 * segment, 9 * segment + 9))
        # chi-square with 8 degrees of freedom: 26.1 is exceeded once in a thousand
        assert ((counts - 2000 / 9) ** 2 / (2000 / 9)).sum() < 26.1
    assert candidates(12, settings, rng).tolist() == list(range(12))


def test_candidates_for_intervals_are_what_an_interval_may_give() -> None:
    """41 frames in 4 intervals of 10 or 11, of each all but the last; draws over preparations and epochs are equally likely."""
    settings, rng = Settings(segments=4, per_segment=3, sampling="intervals"), np.random.default_rng(0)
    data = DataConfig(sampling="intervals")
    reader = ClipReader([Clip(path="x")], data, num_frames=4, image_size=32, seed=0, train=True)
    drawn = []
    for number in range(2000):
        kept = candidates(41, settings, rng)
        assert len(kept) == 12 and (np.diff(kept) > 0).all()
        drawn.append(kept[reader.stored_chooser((number,))(12, 41)])
    for column, first, last in zip(np.stack(drawn).T, (0, 10, 20, 30), (8, 18, 28, 39), strict=True):
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == list(range(first, last + 1))
        # Stretches of 9 frames are equal thirds; chi-square with 8 degrees of freedom. The last has stretches of 3, 3 and 4.
        if last < 39:
            assert ((counts - 2000 / 9) ** 2 / (2000 / 9)).sum() < 26.1
    # Of 16 frames an interval of 4 gives one of 3: no choice would be left out. Of 15 some interval has too few.
    assert candidates(16, settings, rng).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]
    assert candidates(15, settings, rng).tolist() == list(range(15))
    assert candidates(1, settings, rng).tolist() == [0]
    # What is kept whole is drawn from as from its file.
    assert (
        set(reader.stored_chooser((0,))(8, 8)) == {0, 2, 4, 6}
        and reader.stored_chooser((0,))(2, 2)[1:].tolist() == [1] * 3
    )


def test_first_seconds_of_prepared_clips(table: Path, tmp_path: Path) -> None:
    """a.mp4 has 60 frames at 10 a second: the first four seconds are 40."""
    settings = Settings(segments=4, max_seconds=4.0)
    prepare(table, tmp_path / "out", settings=settings, workers=0)
    clips = read_list(tmp_path / "out", DataConfig())
    sources = []
    read_prepared(clips[0], lambda stored, source: sources.append(source) or np.arange(stored))
    assert sources == [40]
    with pytest.raises(
        DataError, match="out is a folder, whose clips `prepare` packed into it, and videos would not be"
    ):
        read_list(tmp_path / "out", DataConfig(root="videos"))
    assert len(list(ClipLoader(clips, DataConfig(workers=0, max_seconds=4), **KIND))) == 1
    with pytest.raises(
        DataError, match="candidates for data.max_seconds 4.0, and data.max_seconds is 0.0; `prepare` with"
    ):
        ClipLoader(clips, DataConfig(), **KIND)
    for wrong, expected in (({"sampling": "dense"}, "sampling is 'dense'"), ({"max_seconds": -1}, "max_seconds is -1")):
        with pytest.raises(DataError, match=expected):
            Settings(**wrong)


def test_stored_frames_are_the_candidates(table: Path, tmp_path: Path) -> None:
    settings = Settings(segments=4, per_segment=2, short_side=48)
    counts = prepare(table, tmp_path / "out", settings=settings, workers=0)
    assert (counts["good"], counts["bad"], counts["resumed"]) == (3, 2, 0)
    clips = read_list(tmp_path / "out", DataConfig())
    assert [(Path(clip.path).name, clip.label, clip.num_frames) for clip in clips] == [
        ("a.mp4", 0, 8),
        ("b.mp4", 2, 8),
        ("short.mp4", 3, 5),
    ]
    for clip, number, frames in zip(clips, (0, 2, 3), (60, 45, 5), strict=True):
        pictures = stored_frames(clip, lambda stored, source: np.arange(stored))
        assert pictures.shape[1:] == (48, 60, 3)
        expected = candidates(frames, settings, np.random.default_rng((0, number)))
        np.testing.assert_allclose(pictures.mean((1, 2, 3)), 4 * expected, atol=2)
    bad = [json.loads(line) for line in (tmp_path / "out" / "part-0-of-1.bad.jsonl").read_text().splitlines()]
    assert [(line["number"], Path(line["path"]).name) for line in bad] == [(1, "missing.mp4"), (4, "broken.mp4")]
    assert all(line["reason"] for line in bad)


def test_repeated_rows_are_told(table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    prepare(table, tmp_path / "out", workers=0)
    assert "6 rows name 5 files, each is packed once; of 1 files with several labels the first is kept" in caplog.text
    assert f"{tmp_path}/a.mp4, 0 and not 5); to train on all rows keep {table} as data.train" in caplog.text
    table.write_text("a.mp4,0\nb.mp4,1\na.mp4,0\n")
    caplog.clear()
    prepare(table, tmp_path / "again", workers=0)
    assert "3 rows name 2 files" in caplog.text and "several labels" not in caplog.text
    table.write_text("a.mp4,0\n")
    caplog.clear()
    prepare(table, tmp_path / "once", workers=0)
    assert "rows name" not in caplog.text


def test_bad_clips_are_tried_again(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(table, out, workers=0)["bad"] == 2
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert prepare(table, out, workers=0) == {"good": 3, "bad": 2, "resumed": 3, "bytes": 3} | {
        "bytes": sum(clip.size for clip in read_list(out, DataConfig()))
    }
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    gray_video(tmp_path / "missing.mp4", 30)
    counts = prepare(table, out, workers=0)
    assert (counts["good"], counts["bad"], counts["resumed"]) == (4, 1, 3)
    clips = read_list(out, DataConfig())
    assert [clip.label for clip in clips] == [0, 1, 2, 3] and verify(out) == 4
    assert len(stored_frames(clips[1], lambda stored, source: np.arange(stored))) == 24
    (bad,) = (out / "part-0-of-1.bad.jsonl").read_text().splitlines()
    assert json.loads(bad)["path"].endswith("broken.mp4")


def test_a_folder_of_an_older_version_lists_bad_clips_in_its_index(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(table, out, workers=0)
    index = out / "part-0-of-1-00000.jsonl"
    index.write_text(index.read_text() + json.dumps({"number": 1, "path": "x", "label": 1, "reason": "none"}) + "\n")
    assert len(read_list(out, DataConfig())) == 3 and verify(out) == 3
    gray_video(tmp_path / "missing.mp4", 30)
    assert prepare(table, out, workers=0)["good"] == 4 and len(read_list(out, DataConfig())) == 4


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text.replace('"offset"', '"offs', 1), "line 1: damaged.*run `prepare` again"),
        (lambda text: text.replace('"size"', '"sise"', 1), "line 1: damaged.*run `prepare` again"),
        (lambda text: "".join(text.splitlines(True)[:2]), "lists 2 of its 3 clips.*run `prepare` again"),
    ],
    ids=["not JSON", "a field is missing", "cut"],
)
def test_a_damaged_index_is_one_line(damage: Callable[[str], str], expected: str, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(table, out, workers=0)
    index = out / "part-0-of-1-00000.jsonl"
    index.write_text(damage(index.read_text()))
    with pytest.raises(DataError, match=expected):
        read_list(out, DataConfig())


def test_jpegs_are_close_to_the_frames(tmp_path: Path, shared: Path) -> None:
    from umt_fast.data.decode.video import decode_frames

    name = str(shared / "videos" / "part_0.mp4")
    (tmp_path / "list.csv").write_text(f"{name},0\n")
    prepare(tmp_path / "list.csv", tmp_path / "out", workers=0, settings=Settings(segments=8, per_segment=4))
    (clip,) = read_list(tmp_path / "out", DataConfig())
    stored = stored_frames(clip, lambda stored, source: np.array([0, 31])).astype(float)
    decoded = decode_frames(name, lambda count: np.array([0, 31]))
    assert 10 * np.log10(255**2 / ((stored - decoded) ** 2).mean()) > 35  # dB


def test_a_part_without_a_clip(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--shard 98/99 has no clip: .* use fewer parts"):
        prepare(table, tmp_path / "out", part=(98, 99), workers=0)


def test_parts_from_several_machines_make_the_whole_list(table: Path, tmp_path: Path) -> None:
    prepare(table, tmp_path / "whole", workers=0)
    for part in range(2):
        with pytest.raises(DataError, match="no folder of prepared|is not finished"):
            read_list(tmp_path / "out", DataConfig()) if part else prepared.read_folder(tmp_path / "out")
        prepare(table, tmp_path / "out", part=(part, 2), workers=0)
    first, second = (read_list(tmp_path / name, DataConfig()) for name in ("whole", "out"))
    assert [(clip.path, clip.label, clip.size) for clip in first] == [
        (clip.path, clip.label, clip.size) for clip in second
    ]
    assert [prepared.read_record(clip) for clip in first] == [prepared.read_record(clip) for clip in second]
    assert verify(tmp_path / "out") == 3


def test_another_list_or_setting_in_the_same_folder_is_refused(table: Path, tmp_path: Path) -> None:
    prepare(table, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="settings"):
        prepare(table, tmp_path / "out", settings=Settings(quality=50), workers=0)
    table.write_text("b.mp4,0\n")
    with pytest.raises(DataError, match="another list"):
        prepare(table, tmp_path / "out", workers=0)


def loaded(clips: list[Clip], **changes: object) -> list[dict[str, torch.Tensor]]:
    return list(ClipLoader(clips, DataConfig(workers=0, max_bad_share=1, **changes), **KIND))


def test_training_reads_them_and_resumes_exactly(table: Path, tmp_path: Path) -> None:
    prepare(table, tmp_path / "out", settings=Settings(segments=4), workers=0)
    clips = [replace(clip, label=n) for n, clip in enumerate([*read_list(tmp_path / "out", DataConfig())] * 3)]
    data = DataConfig(workers=0, num_sample=2)
    whole = list(ClipLoader(clips, data, **KIND))
    assert whole[0]["video"].shape == (4, 4, 32, 32, 3) and len(whole) == 4
    first = ClipLoader(clips, data, **KIND)
    iterator = iter(first)
    next(iterator)
    second = ClipLoader(clips, DataConfig(workers=1, num_sample=2), **KIND)
    second.load_state_dict(first.state_dict())
    for resumed, expected in zip(second, whole[1:], strict=True):
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def test_a_list_finds_its_prepared_clips(table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare(table, tmp_path / "out", settings=Settings(segments=4), workers=0)
    clips = read_list(table, DataConfig())
    for name in ("a.mp4", "b.mp4"):  # so that only the shards can have answered
        (tmp_path / name).unlink()
    with caplog.at_level("INFO"):
        batches = loaded(clips, prepared=(str(tmp_path / "out"),))
    assert "4 of 6 clips" in caplog.text
    assert {index for batch in batches for index in batch["index"].tolist()} <= {0, 2, 3, 5}


def test_captions_keep_working(table: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    rows = [{"video": "a.mp4", "caption": ["one", "two"]}, {"video": "b.mp4", "caption": "three"}]
    captions.write_text(json.dumps(rows))
    assert prepare(captions, tmp_path / "out", settings=Settings(segments=4), workers=0)["good"] == 2
    found = read_captions(captions)
    (tmp_path / "a.mp4").unlink(), (tmp_path / "b.mp4").unlink()

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"])
    )
    tokenizer = load_tokenizer(str(tmp_path))
    data = DataConfig(workers=0, prepared=(str(tmp_path / "out"),), max_bad_share=0)
    clips = ClipLoader(found.clips, data, **(KIND | {"batch_size": 3}))
    loader = CaptionLoader(clips, Tokens(found.captions, tokenizer, max_length=4), found.sample)
    (batch,) = list(loader)
    assert sorted(batch["ids"][:, 1].tolist()) == [5, 6, 7] and sorted(batch["sample"].tolist()) == [0, 0, 2]


def test_what_shards_cannot_give_is_refused(table: Path, tmp_path: Path) -> None:
    prepare(table, tmp_path / "out", settings=Settings(segments=4), workers=0)
    clips = read_list(tmp_path / "out", DataConfig())
    with pytest.raises(DataError, match="--segments 8"):
        ClipLoader(clips, DataConfig(), **(KIND | {"num_frames": 8}))
    with pytest.raises(DataError, match="sparse sampling, and data.sampling is dense; leave the folder out"):
        ClipLoader(clips, DataConfig(sampling="dense"), **KIND)
    with pytest.raises(DataError, match="candidates for data.sampling sparse, and data.sampling is intervals"):
        ClipLoader(clips, DataConfig(sampling="intervals"), **KIND)
    ClipLoader(clips, DataConfig(sampling="intervals"), **(KIND | {"num_frames": 1}))  # images


def test_damage_is_found_and_made_good(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(table, out, workers=0, shard_bytes=1)  # a shard for each clip
    whole = {path.name: path.read_bytes() for path in out.glob("*.clips")}
    clips = read_list(out, DataConfig())
    shard = Path(clips[1].shard)
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VideoError, match="b.mp4.*damaged"):
        read_prepared(clips[1], lambda stored, source: np.arange(stored))
    with pytest.raises(DataError, match=rf"{shard.name} \(1 clips\)"):
        verify(out)
    with pytest.raises(DataError, match="holds prepared clips"):
        scan(out, tmp_path / "manifest.jsonl", workers=0)
    shard.unlink(), shard.with_suffix(".jsonl").unlink()
    with pytest.raises(DataError, match="lists 2 of its 3 clips.*run `prepare` again"):
        read_list(out, DataConfig())
    assert prepare(table, out, workers=0, shard_bytes=1)["good"] == 3 and verify(out) == 3
    assert sorted(path.read_bytes() for path in out.glob("*.clips")) == sorted(whole.values())


def test_a_missing_shard_costs_its_clips_alone(table: Path, tmp_path: Path) -> None:
    prepare(table, tmp_path / "out", settings=Settings(segments=4), workers=0, shard_bytes=1)
    clips = [*read_list(tmp_path / "out", DataConfig())] * 2
    Path(clips[0].shard).unlink()
    loader = ClipLoader(clips, DataConfig(workers=0, max_bad_share=1), **KIND)
    assert len(list(loader)) == 3 and list(loader.bad_files) == [clips[0].path]
    strict = ClipLoader(clips, DataConfig(workers=0, max_bad_share=0), **KIND)
    with pytest.raises(DataError, match="Repeat the `prepare` of that folder with --verify"):
        list(strict)


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_preparation_ends_with_the_same_bytes(table: Path, tmp_path: Path) -> None:
    """A real SIGKILL to the whole process group, at two places, the second with torn writes."""
    names = [f"{'ab'[number % 2]}{number}.mp4" for number in range(40)]
    for name in names:
        os.link(tmp_path / f"{name[0]}.mp4", tmp_path / name)
    table.write_text("".join(f"{name},{number}\n" for number, name in enumerate([*names, "missing.mp4"])))

    def command(out: Path) -> list[str]:
        settings = ["--workers", "0", "--segments", "4", "--shard_mib", "1", "--verify"]
        return [sys.executable, "-m", "umt_fast", "prepare", str(table), "--out", str(out), *settings]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(table, whole, settings=Settings(segments=4), workers=1, shard_bytes=1 << 20)
    journal = killed / "part-0-of-1-00000.jsonl.writing"
    for wanted in (1, 15):
        with subprocess.Popen(
            command(killed), cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < wanted):
                time.sleep(0.002)
            assert process.poll() is None, "the preparation ended before it could be killed"
            os.killpg(process.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="not finished"):
            read_list(killed, DataConfig())
    # As a loss of power may leave it: half a record, and a line that was not written to its end.
    with open(killed / "part-0-of-1-00000.clips.writing", "ab") as file:
        file.write(b"half a record")
    with open(journal, "ab") as file:
        file.write(b'{"number": 39, "pa')
    done = subprocess.run(command(killed), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "were prepared before" in done.stderr, done.stderr[-2000:]
    assert "40 clips verified" in done.stderr
    left = {path.name: path.read_bytes() for path in killed.iterdir()}
    assert left == {path.name: path.read_bytes() for path in whole.iterdir()}


@pytest.mark.parametrize("left", ["records", "nothing"])
def test_a_preparation_killed_while_it_closes_a_shard(left: str, table: Path, tmp_path: Path) -> None:
    """Between the two renames that end a shard, or between the two deletions of one without a clip."""
    out = tmp_path / "out"
    prepare(table, out, workers=0)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    if left == "records":
        os.replace(out / "part-0-of-1-00000.jsonl", out / "part-0-of-1-00000.jsonl.writing")
    else:
        (out / "part-0-of-1-00001.jsonl.writing").touch()
    part = out / "part-0-of-1.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"finished": None}))
    (out / "part-0-of-1.bad.jsonl").unlink()
    assert prepare(table, out, workers=0)["resumed"] == 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_pictures_can_be_prepared(tmp_path: Path) -> None:
    Image.fromarray(np.full((300, 400, 3), 77, np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "list.csv").write_text("a.jpg,0\n")
    prepare(tmp_path / "list.csv", tmp_path / "out", workers=0)
    (clip,) = read_list(tmp_path / "out", DataConfig())
    assert clip.num_frames == 1
    pictures = stored_frames(clip, lambda stored, source: np.zeros(1, int))
    assert pictures.shape == (1, 256, 341, 3) and abs(pictures.mean() - 77) < 2
