"""Lists as shared tensors: they give back what went in, and a process that is handed one copies nothing."""

import json
import multiprocessing
import random
import resource
from array import array
from pathlib import Path

import pytest
import torch

from umt_fast.data.errors import DataError
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.columns import Clips, Strings, first_of_each
from umt_fast.data.sources.entries import read_entries
from umt_fast.data.sources.lists import read_list


def test_strings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "a", "ein Käfer", "猫\U0001f408", "", "half \ud83d of a pair", "x" * 1000]
    packed = Strings.of(texts)
    assert list(packed) == texts and packed[-1] == texts[-1] and packed[1:6:2] == texts[1:6:2]
    assert packed.blob.dtype == torch.uint8 and len(Strings.of([])) == 0
    for at_once in (2, 7, 1 << 16):
        monkeypatch.setattr("umt_fast.data.sources.columns._AT_ONCE", at_once)
        assert [text.decode("utf-8", "surrogatepass") for text in packed.encoded()] == texts
    assert list(Strings.of([]).encoded()) == []
    with pytest.raises(IndexError):
        packed[7]


def test_clips_come_back_and_defaults_cost_nothing() -> None:
    clips = [
        Clip(path="a.mp4"),
        Clip(path="b", label=-3, num_frames=12, frame_folder=True),
        Clip(path="c", rate=29.97, codec="h264", checksum="0a"),
        Clip(path="d.tar", member="x/1.jpg", offset=1 << 40, size=7),
        Clip(path="e"),
    ]
    packed = Clips.of(clips)
    assert list(packed) == clips and packed[1].frame_folder is True and packed[::2] == clips[::2]
    assert set(Clips.of(clips[:1]).columns) == {"path"}
    assert packed[3].name == "d.tar/x/1.jpg"


def _change(packed: Clips, texts: Strings) -> None:
    texts.blob[:] = ord("z")
    packed.columns["label"][1] = 77


def test_a_process_is_given_the_same_memory() -> None:
    """What the other process writes is seen here: the pages are the same ones."""
    packed, texts = Clips.of([Clip(path="a", label=1), Clip(path="b", label=2)]), Strings.of(["abc", "d"])
    worker = multiprocessing.get_context("forkserver").Process(target=_change, args=(packed, texts))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and list(texts) == ["zzz", "z"] and packed[1] == Clip(path="b", label=77)


def test_rows_of_one_name_also_where_hashes_collide() -> None:
    names = ["a", "b", "a", "c", "b", "c", "a"]
    assert first_of_each(array("q", map(hash, names)), names.__getitem__).tolist() == [0, 1, 0, 3, 1, 3, 0]
    assert first_of_each(array("q", [5] * 7), names.__getitem__).tolist() == [0, 1, 0, 3, 1, 3, 0]


def test_long_lists_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries and blanks cut at every place by blocks of a few characters; an entry longer than a block."""
    monkeypatch.setattr("umt_fast.data.sources.json_lists._BLOCK", 7)
    rng = random.Random(0)
    entries = [{"video": f"{n}.mp4", "caption": 'ä\\"[{,' * rng.randrange(9)} for n in range(40)]
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(entries, indent=3, ensure_ascii=False) + "\n\n ")
    found = list(read_entries(tmp_path / "list.json"))
    assert [entry.captions for entry in found] == [[entry["caption"]] for entry in entries]
    assert [Path(entry.clips[0].path).name for entry in found] == [entry["video"] for entry in entries]


def test_lists_as_python_writes_them_come_back(tmp_path: Path) -> None:
    """Undecodable bytes of a file name as halves of surrogate pairs, and fields that nobody reads with any number."""
    name = b"caf\xe9?.mp4".decode("utf-8", "surrogateescape")
    rows = [
        {"video": name, "caption": "x", "duration": float("nan"), "id": 1 << 80},
        {"video": "\U0001f408.mp4", "caption": "y", "score": -float("inf")},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    clips = Clips.of(entry.clips[0] for entry in read_entries(tmp_path / "list.json"))
    assert [clip.path for clip in clips] == [f"{tmp_path}/{row['video']}" for row in rows]
    (tmp_path / "list.json").write_text('[{"video": "a", "caption": "x", "video": "b"}]')
    assert [clip.path for entry in read_entries(tmp_path / "list.json") for clip in entry.clips] == [f"{tmp_path}/b"]


def test_nested_too_deeply_is_one_message_and_little_memory(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"video": "a", "caption": "x"}, ' + "[" * 50_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="entry 1 is nested too deeply"):
        list(read_entries(tmp_path / "list.json"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"video": "a", "caption": "x"} {"video": "b"}]', "not JSON .entry 1: expected , or ]"),
        ('[{"video": "a", "caption": "x"}, ', "not JSON .entry 1"),
        ('[{"video": "a", "caption": "x"}', "not JSON .entry 1"),
        ('[{"video": "a", "caption": "x"}] more', "not JSON .entry 1: text after the list"),
        ("", "not JSON"),
        (b"[\xff\xfe]", "not JSON"),
        ('"text"', "holds a JSON str"),
    ],
)
def test_broken_json_is_named(content: str | bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=expected):
        list(read_entries(path))


def test_fields_that_columns_cannot_hold_are_named(tmp_path: Path) -> None:
    from umt_fast.config import DataConfig

    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4", "rate": 30}\n{"path": "b.mp4", "label": "3"}\n')
    with pytest.raises(DataError, match="line 2: .*label is '3'; it must be of type int"):
        read_list(tmp_path / "list.jsonl", DataConfig())
    (tmp_path / "list.csv").write_text(f"a.mp4,{1 << 63}\n")
    with pytest.raises(DataError, match="beyond 64 bits"):
        read_list(tmp_path / "list.csv", DataConfig())


def test_identity_is_of_names_and_order_alone() -> None:
    def identity(*paths: str, **values: object) -> str:
        return Clips.of(Clip(path=path, **values) for path in paths).identity()

    own = identity("/a/b/x/1.mp4", "/a/b/y.mp4", label=3)
    assert own == identity("/b/x/1.mp4", "/b/y.mp4") == identity("b/x/1.mp4", "b/y.mp4", num_frames=9)
    others = [
        identity("/a/b/y.mp4", "/a/b/x/1.mp4"),
        identity("/a/test/x/1.mp4", "/a/test/y.mp4"),
        identity("/a/b/x/1.mp4", "/a/b/z.mp4"),
        identity("/a/b/x/1.mp4", "/a/b/y.mp4", "/a/b/y.mp4"),
        identity("/a/b/x/1.mp4", "/a/c/y.mp4"),
        identity("x/1.mp4y.mp4", ""),
    ]
    assert len({own, *others}) == 7
    # Checkpoints hold it: a run refuses to continue where it changes.
    assert own == "13009bdb940a17f4" and Clips.of([Clip(path="/a/half \ud83d.mp4")]).identity() == "27154fb87cbbc967"
    members = [Clip(path="/a/0.tar", member=name) for name in ("1.jpg", "2.jpg")]
    assert Clips.of(members).identity() != Clips.of(members[::-1]).identity()
