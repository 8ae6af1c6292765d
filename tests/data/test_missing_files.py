"""Files of a list that are not there: counted and named in one message."""

from pathlib import Path

import numpy as np
import pytest

from tests.videos import write_video
from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.clip import Clip, absent
from umt_fast.data.sources.lists import read_list

KIND = {"num_frames": 4, "image_size": 32, "batch_size": 1}


def listed(folder: Path, gone: int) -> Path:
    """A list of one video and of so many that are not there."""
    pictures = (np.full((40, 48, 3), 20 * number, np.uint8) for number in range(8))
    write_video(folder / "here.mp4", pictures)
    table = folder / "list.csv"
    table.write_text("here.mp4,0\n" + "".join(f"gone{number}.mp4,0\n" for number in range(gone)))
    return table


def test_evaluation_names_all_of_them_before_it_begins(tmp_path: Path) -> None:
    clips = read_list(listed(tmp_path, 5), DataConfig())
    with pytest.raises(DataError) as caught:
        ClipLoader(clips, DataConfig(workers=0), train=False, **KIND)
    first = ", ".join(f"{tmp_path}/gone{number}.mp4" for number in range(3))
    assert str(caught.value).startswith(f"5 of the 6 files of the list are not there, the first: {first}; --root")
    assert "\n" not in str(caught.value)


def test_training_counts_them_where_it_gives_up(tmp_path: Path) -> None:
    clips = read_list(listed(tmp_path, 60), DataConfig())
    loader = ClipLoader(clips[1:], DataConfig(workers=0, max_bad_share=1), **KIND)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    said = str(caught.value)
    assert said.startswith("20 clips in a row cannot be read: ") and said.count(": no such file") == 3
    assert f"60 of the 60 files of the list are not there, the first: {tmp_path}/gone0.mp4, " in said


def test_what_holds_a_clip_is_looked_for(tmp_path: Path) -> None:
    here, gone = str(tmp_path), str(tmp_path / "gone")
    clips = [Clip(path=gone, shard=here), Clip(path=here, member="x"), Clip(path=gone), Clip(path=gone)]
    assert absent(clips) == ([gone], 2)


def test_a_list_with_its_folder_where_a_list_alone_is_asked_for(tmp_path: Path) -> None:
    table = listed(tmp_path, 1)
    with pytest.raises(
        DataError, match=f"no list at .*; give the list alone, {table}, and .* option: --root /data/a=b"
    ):
        read_list(f"{table}=/data/a=b", DataConfig())
    with pytest.raises(DataError, match="give a file with one video per line"):
        read_list(f"{tmp_path}/none.csv=/data", DataConfig())
