"""Lists of clips and captions that retrieval is judged on: layouts of the test sets, and what is refused."""

import json
from pathlib import Path

import pytest

from umt_fast.data.errors import DataError
from umt_fast.data.sources.queries import Queries, read_queries


def written(folder: Path, entries: object) -> Path:
    """A list whose files are there."""
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).touch()
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def pairs(found: Queries) -> set[tuple[str, str]]:
    return {(Path(found.clips[clip].path).name, found.captions[text]) for clip, text in found.right.tolist()}


def test_one_caption_each_as_msrvtt_and_lsmdc(tmp_path: Path) -> None:
    found = read_queries(written(tmp_path, [{"video": f"{n}.mp4", "caption": f"It is {n}!"} for n in "ba"]))
    assert pairs(found) == {("a.mp4", "it is a"), ("b.mp4", "it is b")} and found.right.tolist() == [[0, 0], [1, 1]]


def test_paragraphs_as_didemo_and_activitynet(tmp_path: Path) -> None:
    table = written(tmp_path, [{"video": "a.mp4", "caption": ["First, this.", "Then that."]}])
    assert pairs(read_queries(table, joining="paragraph")) == {("a.mp4", "first this then that")}
    assert pairs(read_queries(table)) == {("a.mp4", "first this"), ("a.mp4", "then that")}


def test_several_captions_of_a_clip_as_msvd(tmp_path: Path) -> None:
    entries = [{"video": "a.mp4", "caption": ["x", "y"]}, {"video": "b.mp4", "caption": "z"}]
    found = read_queries(written(tmp_path, [*entries, {"video": "a.mp4", "caption": "w"}]))
    assert len(found.clips) == 2 and list(found.captions) == ["x", "y", "z", "w"]
    assert found.right.tolist() == [[0, 0], [0, 1], [0, 3], [1, 2]]


def test_several_clips_of_a_caption_as_ssv2(tmp_path: Path) -> None:
    entries = [{"video": ["a.mp4", "b.mp4"], "caption": "x"}, {"video": ["b.mp4", "c.mp4", "b.mp4"], "caption": "y"}]
    found = read_queries(written(tmp_path, entries))
    assert len(found.clips) == 3 and found.right.tolist() == [[0, 0], [1, 0], [1, 1], [2, 1]]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"video": "a.mp4"}, 'entry 1 has no "caption"'),
        ({"caption": "x"}, 'entry 1 has no "video" or "image"'),
        ({"video": "a.mp4", "caption": None}, 'entry 1 has no "caption"'),
        ({"video": "a.mp4", "caption": 3}, 'entry 1: "caption" is 3; it must be a text'),
        ({"video": "a.mp4", "caption": ["x", 3]}, 'entry 1: "caption" is'),
        ({"video": 7, "caption": "x"}, 'entry 1: "video" is 7'),
        ({"video": "", "caption": "x"}, 'entry 1: "video" is ""; it must name a file'),
        ({"video": [], "caption": "x"}, r'entry 1: "video" is \[\]; it must name a file'),
        ({"video": "a.mp4", "caption": "?!"}, r"entry 1: the caption '\?!' has no word"),
        ({"video": "a.mp4", "caption": ["x", ""]}, "entry 1: the caption '' has no word"),
        ({"video": "a.mp4", "caption": []}, "entry 1: its list of captions is empty"),
        ({"video": "none.mp4", "caption": "x"}, "1 of the 2 files of .* are not there, the first: .*none.mp4"),
        (17, "entry 1: it is 17; expected"),
        ("a.mp4", 'entry 1: it is "a.mp4"; expected'),
    ],
)
def test_entries_that_cannot_be_judged_are_named(entry: object, expected: str, tmp_path: Path) -> None:
    table = written(tmp_path, [{"video": "a.mp4", "caption": "x"}, entry])
    with pytest.raises(DataError, match=expected):
        read_queries(table)


def test_roots_and_empty_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no captions"):
        read_queries(written(tmp_path, []))
    with pytest.raises(DataError, match="not a folder"):
        read_queries(written(tmp_path, []), str(tmp_path / "none"))
