"""Lists as users write them: every path is taken as it is written, and what is no list is named in one line."""

import json
import os
import sqlite3
from pathlib import Path

import pytest

from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import read_captions, read_corpora
from umt_fast.data.sources.lists import Clip, read_list


def entries(folder: Path, text: str, separator: str = ",") -> list[Clip]:
    """The clips of a list with this text, their paths as the list has them."""
    (folder / "list.csv").write_text(text, newline="")
    clips = read_list(folder / "list.csv", DataConfig(separator=separator, root="/"))
    return [(clip.path.removeprefix("/"), clip.label, clip.num_frames) for clip in clips]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dir with space/a b, c.mp4,0", ("dir with space/a b, c.mp4", 0, 0)),
        ("a , b , c .mp4,1", ("a , b , c .mp4", 1, 0)),
        (" a.mp4 , 2 ", (" a.mp4 ", 2, 0)),
        ("a\u2028b\x0cc.mp4,3", ("a\u2028b\x0cc.mp4", 3, 0)),
        ("folder, 12, 4", ("folder", 4, 12)),
        ("x,\u00b2,1", ("x,\u00b2", 1, 0)),
        ("x," + "9" * 5000 + ",1", ("x," + "9" * 5000, 1, 0)),
        ("a.mp4,5\r", ("a.mp4", 5, 0)),
    ],
)
def test_paths_are_taken_as_written(line: str, expected: tuple, tmp_path: Path) -> None:
    assert entries(tmp_path, f"first.mp4,7\n{line}\nlast.mp4,8\n") == [
        ("first.mp4", 7, 0),
        expected,
        ("last.mp4", 8, 0),
    ]


def test_blanks_as_separators(tmp_path: Path) -> None:
    assert entries(tmp_path, "dir with space/a  b.mp4 0 \nfolder 12 1\n", " ") == [
        ("dir with space/a  b.mp4", 0, 0),
        ("folder", 1, 12),
    ]
    assert entries(tmp_path, "a b, c.mp4\t0\n", "\t") == [("a b, c.mp4", 0, 0)]


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a.mp4,\u00b2\n".encode(), "line 1: the label"),
        (b"a.mp4," + b"9" * 5000, "line 1: the label"),
        ("a.mp4,0\n".encode("utf-16"), "is not UTF-8 text"),
        ("a.mp4,0\n".encode("utf-16-le"), "is not UTF-8 text"),
        ("a\u00e9.mp4,0\n".encode("latin-1"), "is not UTF-8 text"),
        (f'{{"path": {DEEP}}}'.encode(), "line 1: not a manifest entry"),
    ],
    ids=["power", "long", "utf-16", "utf-16 without a mark", "latin-1", "nested"],
)
def test_what_is_no_list_of_labels_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=expected) as raised:
        read_list(tmp_path / "list.csv", DataConfig())
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (DEEP.encode(), "entry 0 is nested too deeply"),
        (f'[{{"video": {DEEP[50_000:150_000]}, "caption": "x"}}]'.encode(), "entry 0 is nested too deeply"),
        ('[{"video": "a", "caption": "x"}]'.encode("utf-16"), "is not JSON in UTF-8"),
    ],
    ids=["nested", "nested inside", "utf-16"],
)
def test_what_is_no_list_of_captions_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_captions(tmp_path / "list.json")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "list"
    if kind == "pipe":
        os.mkfifo(path)
        os.mkfifo(tmp_path / "list.tar")
        with pytest.raises(DataError, match="1 of 1 tar files cannot be used; .*no regular file"):
            read_captions(tmp_path / "list.tar")
    elif kind == "folder":
        path.mkdir()
        with pytest.raises(DataError, match="holds no prepared clips .*; give a list of clips, or a folder that"):
            read_list(path, DataConfig())
    else:
        path = Path("/dev/zero")
    if kind != "folder":
        with pytest.raises(DataError, match="is a pipe or device, not a list; give a file with"):
            read_list(path, DataConfig())
    with pytest.raises(DataError, match="is a (pipe or device|folder), not a caption list; give a .json list"):
        read_captions(path)


def test_a_prepared_folder_that_is_not_there(tmp_path: Path, tiny_list: Path) -> None:
    from umt_fast.data.loaders.clips import ClipLoader

    data = DataConfig(prepared=(str(tmp_path / "none"),))
    with pytest.raises(DataError, match="no folder of prepared clips at .*/none; make one with"):
        ClipLoader(read_list(tiny_list, data), data, num_frames=2, image_size=32, batch_size=1)


@pytest.mark.parametrize("name", ["a#b.sqlite", "a?b.sqlite", "a%20b.sqlite", "year=2024.sqlite"])
def test_databases_of_any_name(name: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / name) as base:
        base.execute("CREATE TABLE annos (id INTEGER, filename TEXT, caption TEXT)")
        base.execute("INSERT INTO annos VALUES (0, 'a.mp4', 'One')")
    base.close()
    assert list(read_captions(tmp_path / name).captions) == ["one"]


def test_lists_and_folders_with_equals_signs(tmp_path: Path) -> None:
    year, media = tmp_path / "year=2024", tmp_path / "media=video" / "split=train"
    for folder in (year, media):
        folder.mkdir(parents=True)
    for place in (tmp_path, year):
        (place / "list.json").write_text(json.dumps([{"video": "a.mp4", "caption": "a"}]))
    for given, folder in (
        (f"{year}/list.json", year),
        (f"{year}/list.json={media}", media),
        (f"{tmp_path}/list.json={media}", media),
    ):
        assert [clip.path for clip in read_corpora([given]).clips] == [f"{folder}/a.mp4"]
    with pytest.raises(DataError, match=f"no caption list at {year}/none.json"):
        read_corpora([f"{year}/none.json={media}"])
    with pytest.raises(DataError, match="is not a folder; give LIST or LIST=FOLDER"):
        read_corpora([f"{year}/list.json={media}/none"])
    with pytest.raises(DataError, match="year=2024/00.tar: No such file"):
        read_corpora([f"{year}/{{00..01}}.tar"])
