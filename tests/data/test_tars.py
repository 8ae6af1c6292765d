"""Captioned pictures and clips in tar files."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.captions import read_captions, read_corpora
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.tars import expand


def picture(color: tuple[int, int, int], kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 36), color).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path: Path, tiny_list: Path) -> str:
    """Six good samples in two tars, with what real ones also hold."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    write_tar(
        tmp_path / "09.tar",
        {
            "0.jpg": picture((255, 0, 0), "JPEG"),
            "0.txt": b"A.",
            "0.json": b'{"caption": "not this one"}',
            "sub/0.PNG": picture((0, 255, 0), "PNG"),
            "sub/0.json": json.dumps({"caption": "B", "url": "x"}).encode(),
            "2.txt": b"c",
            "2.webp": picture((0, 0, 255), "WEBP"),
        },
    )
    write_tar(
        tmp_path / "10.tar",
        {
            "3.mp4": (tmp_path / "video1.mp4").read_bytes(),
            "3.txt": b"d",
            "4.jpg": b"no picture",
            "4.txt": b"e",
            "5.jpg": picture((9, 9, 9), "JPEG"),
            "5.txt": b"f",
            "6.jpg": picture((9, 9, 9), "JPEG"),
            "7.txt": b"a",
            "8.jpg": picture((9, 9, 9), "JPEG"),
            "8.json": b'{"title": "a"}',
        },
    )
    return str(tmp_path / "{09..10}.tar")


def test_patterns() -> None:
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{0..1}/{9..10}.tar") == ["0/9.tar", "0/10.tar", "1/9.tar", "1/10.tar"]
    assert expand("one.tar") == ["one.tar"]
    with pytest.raises(DataError, match=r"write \{1..3\}"):
        expand("{3..1}.tar")


def test_samples_are_paired_by_base_name_and_indexed_once(
    tars: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "umt_fast"):
        found = read_captions(tars, workers=2)
    assert [clip.member for clip in found.clips] == ["0.jpg", "sub/0.PNG", "2.webp", "3.mp4", "4.jpg", "5.jpg"]
    assert list(found.captions) == list("abcdef") and found.sample.tolist() == list(range(6))
    assert "left out 3 samples" in caplog.text
    indices = sorted(tmp_path.glob("*.index.json"))
    assert len(indices) == 2 and not list(tmp_path.glob("*.writing"))

    def again(*arguments: object) -> None:
        raise AssertionError("the index was to be used")

    with monkeypatch.context() as patch:
        patch.setattr("umt_fast.data.sources.tars._index", again)
        assert list(read_captions(tars).clips) == list(found.clips)
        write_tar(tmp_path / "10.tar", {"9.jpg": b"..", "9.txt": b"new"})
        with pytest.raises(AssertionError):
            read_captions(tars)
    indices[0].write_text("{")  # an index that was damaged is made anew
    assert [clip.member for clip in read_captions(tars).clips] == ["0.jpg", "sub/0.PNG", "2.webp", "9.jpg"]


def test_members_are_decoded_like_files(tars: str, tmp_path: Path) -> None:
    found = read_captions(tars)
    reader = ClipReader(found.clips, DataConfig(), num_frames=2, image_size=32, seed=0, train=False)
    for row, color in enumerate(np.eye(3) * 255):
        assert np.abs(reader.read(0, row).video[0, 0, 5, 5] - color).max() < 4
    file = ClipReader(
        [Clip(path=str(tmp_path / "video1.mp4"))], DataConfig(), num_frames=2, image_size=32, seed=0, train=False
    )
    np.testing.assert_array_equal(reader.read(0, 3).video, file.read(0, 0).video)
    with pytest.raises(VideoError, match=r"^\S*10.tar/4.jpg: "):
        reader.read(0, 4)
    handles = len(os.listdir("/proc/self/fd"))
    reader.read(0, 0)
    assert len(os.listdir("/proc/self/fd")) == handles


def test_batches_go_on_exactly_and_bad_members_are_counted(tars: str, tmp_path: Path) -> None:
    """The tokens are those that decoding processes made, of the picture that stood in for the bad one."""
    found = read_corpora([tars])

    def loader(workers: int) -> CaptionLoader:
        data = DataConfig(workers=workers, max_bad_share=0.5, num_sample=2)
        clips = ClipLoader(found.clips, data, num_frames=1, image_size=32, batch_size=2)
        return CaptionLoader(clips, Tokens(found.captions, load_tokenizer(str(tmp_path)), max_length=4), found.sample)

    first, second = loader(0), loader(2)
    whole = list(first)
    it = iter(second)
    next(it)
    it.close()
    third = loader(2)
    third.load_state_dict(second.state_dict())
    rest = list(third)
    assert len(whole) == 3 and len(rest) == 2
    for here, there in zip(whole[1:], rest, strict=True):
        assert all(torch.equal(here[key], there[key]) for key in ("video", "index", "ids", "mask", "sample"))
    for batch in whole:
        assert batch["video"].shape[0] == 4 and batch["ids"][:, 1].tolist() == [
            5 + row for row in batch["index"].tolist()
        ]
    assert list(first.bad_files) == [str(tmp_path / "10.tar") + "/4.jpg"]
    assert first.name_of(1).endswith("09.tar/sub/0.PNG")


@pytest.mark.parametrize("damage", ["short", "header", "text", "gzip", "missing"])
def test_damaged_tars_are_one_line(damage: str, tars: str, tmp_path: Path) -> None:
    path = tmp_path / "10.tar"
    content = path.read_bytes()
    if damage == "short":
        path.write_bytes(content[:1500])
    elif damage == "header":  # tarfile alone would take this for the end
        with tarfile.open(path) as tar:
            place = tar.getmember("5.jpg").offset
        path.write_bytes(content[:place] + b"\xff" * 512 + content[place + 512 :])
    elif damage == "text":
        path.write_text("no tar" * 200)
    elif damage == "gzip":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"^1 of 2 tar files cannot be used; \S*10.tar: .*Fetch") as raised:
        read_captions(tars)
    assert "\n" not in str(raised.value)


def test_a_folder_beside_tars_is_refused(tars: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave the folder out"):
        read_corpora([f"{tars}={tmp_path}"])


def test_a_folder_that_cannot_be_written_is_told(
    tars: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with caplog.at_level(logging.WARNING, "umt_fast"):
        assert len(read_captions(tars, workers=1).clips) == 6
    assert "2 indices of tar files could not be written" in caplog.text
