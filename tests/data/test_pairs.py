"""Caption lists as fine-tuning reads them, and lists of choices: official layouts, what is left out, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umt_fast.data.errors import DataError
from umt_fast.data.sources.choices import read_choices
from umt_fast.data.sources.pairs import read_pairs

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(entries: Any, name: str = "list.json") -> Path:
        path = tmp_path / name
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return path

    return written


def rows(path: Path, **options: str) -> list[tuple[str, str, int]]:
    found = read_pairs([str(path)], **options)
    names = [Path(clip.path).name for clip in found.clips]
    return list(zip(names, found.captions, found.sample.tolist(), strict=True))


def test_every_caption_is_a_row_and_rows_of_a_file_name_belong_together(write: Write) -> None:
    """MSVD's layout; as officially the folder does not count."""
    path = write(
        [
            {"video": "a/1.mp4", "caption": ["A man.", "He's here!"]},
            {"video": "b/2.mp4", "caption": "a man"},
            {"video": "b/1.mp4", "caption": "again"},
        ]
    )
    assert rows(path) == [("1.mp4", "a man", 0), ("1.mp4", "hes here", 0), ("2.mp4", "a man", 1), ("1.mp4", "again", 0)]


def test_a_paragraph_is_one_row(write: Write) -> None:
    path = write([{"video": "1.mp4", "caption": ["One.", "Two, three."]}, {"video": "2.mp4", "caption": "four"}])
    assert rows(path, joining="paragraph") == [("1.mp4", "one two three", 0), ("2.mp4", "four", 1)]


def test_rows_of_one_caption_belong_together_as_it_is_written(write: Write) -> None:
    """SSV2's layout: several clips of a caption, one to an entry or all in one."""
    path = write(
        [
            {"video": "1.webm", "caption": "Moving it."},
            {"video": ["2.webm", "3.webm"], "caption": "Moving it."},
            {"video": "1.webm", "caption": "moving it"},
        ]
    )
    assert [sample for *_, sample in rows(path, same_sample="caption")] == [0, 0, 0, 1]
    assert [sample for *_, sample in rows(path)] == [0, 1, 2, 0]


def test_lists_are_joined_and_names_meet_across_them(write: Write, tmp_path: Path) -> None:
    first = write([{"video": "1.mp4", "caption": "x"}])
    second = write([{"video": "sub/1.mp4", "caption": "y"}, {"video": "2.mp4", "caption": "z"}], "second.json")
    found = read_pairs([str(first), f"{second}={tmp_path}"])
    assert found.sample.tolist() == [0, 0, 1]
    assert found.clips[1].path == f"{tmp_path}/sub/1.mp4"


def test_captions_without_words_are_left_out_and_counted(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write([{"video": "1.mp4", "caption": ["...", "word", "?!"]}, {"video": "2.mp4", "caption": "-"}])
    assert rows(path) == [("1.mp4", "word", 0)]
    assert "left out 3 captions without any word" in caplog.text


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"video": "1.mp4", "caption": []}], "entry 0: its list of captions is empty"),
        ([{"video": "1.mp4", "caption": "..."}], "holds no captions"),
        ([], "holds no captions"),
        ([{"caption": "x"}], 'has no "video" or "image"'),
    ],
)
def test_unusable_lists_are_refused(write: Write, entries: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_pairs([str(write(entries))])


def test_a_folder_that_is_none_is_named(write: Write) -> None:
    path = write([{"video": "1.mp4", "caption": "x"}])
    with pytest.raises(DataError, match="/no/such is not a folder"):
        read_pairs([f"{path}=/no/such"])


def test_choices_of_the_official_layout(write: Write, tmp_path: Path) -> None:
    (tmp_path / "1.mp4").touch()
    path = write(
        [
            {"video": "1.mp4", "caption": ["A dog.", "a Cat", "-", "x", "y"], "answer": 1, "qid": "further keys stay"},
            {"video": str(tmp_path / "1.mp4"), "caption": list("abcde"), "answer": 4},
        ]
    )
    found = read_choices(path)
    assert found.count == 5 and found.answer.tolist() == [1, 4] and len(found.clips) == 2
    assert list(found.options) == ["a dog", "a cat", "", "x", "y", *"abcde"]
    assert {clip.path for clip in found.clips} == {str(tmp_path / "1.mp4")}


def choice(**changes: Any) -> dict[str, Any]:
    return {"video": "1.mp4", "caption": ["a", "b", "c"], "answer": 0} | changes


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([choice(), choice(caption=["a", "b"])], r"entry 1 has 2 choices, and the first entry 3"),
        ([choice(answer=3)], r"entry 0: its answer is 3, but it has 3 choices; answers count from 0"),
        ([choice(answer=-1)], r"its answer is -1"),
        ([choice(answer="0")], r'"answer" is "0"; it must be a whole number'),
        ([choice(answer=True)], r'"answer" is true'),
        ([choice(caption="a")], r"must be a list of at least two texts"),
        ([choice(caption=["a"])], r"must be a list of at least two texts"),
        ([choice(caption=["a", 3])], r"must be a list of at least two texts"),
        ([choice(caption=["...", "b", "c"])], r"right choice '...' has no word"),
        ([choice(video="")], r'"video" is ""; it must name a file'),
        ([{"video": "1.mp4", "caption": ["a", "b"]}], r"entry 0: it is .* expected"),
        (
            [choice(), choice(video="2.mp4"), choice(video="3.mp4")],
            r"2 of the 3 files of .* the first: .*2\.mp4, .*3\.mp4; --root",
        ),
        ([], "holds no choices"),
        ("{}", "must be a list"),
    ],
)
def test_unusable_choices_are_refused(write: Write, tmp_path: Path, entries: Any, expected: str) -> None:
    (tmp_path / "1.mp4").touch()
    with pytest.raises(DataError, match=expected):
        read_choices(write(entries))
    with pytest.raises(DataError, match=r"no list of choices at"):
        read_choices(tmp_path / "none.json")
