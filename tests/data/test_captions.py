"""Caption lists, their cleaning, tokens, and the loader that joins them to clips."""

import json
import sqlite3
from pathlib import Path

import pytest
import torch

from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.tokens import Tokens, fingerprint_of, load_tokenizer, load_vocabulary, vocabulary_of
from umt_fast.data.sources.captions import clean_caption, read_captions, read_corpora
from umt_fast.data.sources.lists import Clip

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing", "moves", "left", "##s"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


def test_cleaning_is_the_official_one() -> None:
    assert clean_caption("A  Red-thing, isn't <person>'s (left/right)!") == "a red thing isnt persons left right"


def test_json_lists_with_several_captions_and_images(tmp_path: Path) -> None:
    entries = [
        {"video": "a.mp4", "caption": "A red thing."},
        {"image": "b.jpg", "caption": ["one", "two"]},
        {"video": "a.mp4", "caption": "again"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    found = read_captions(tmp_path / "list.json")
    assert list(found.captions) == ["a red thing", "one", "two", "again"]
    assert found.sample.tolist() == [0, 1, 1, 0]
    assert [Path(clip.path).name for clip in found.clips] == ["a.mp4", "b.jpg", "b.jpg", "a.mp4"]
    assert read_captions(tmp_path / "list.json", root="/data").clips[0].path == "/data/a.mp4"


def test_sqlite_lists(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "list.sqlite") as base:
        base.execute("CREATE TABLE annos (id INTEGER, filename TEXT, caption TEXT)")
        base.executemany("INSERT INTO annos VALUES (?, ?, ?)", [(1, "b.mp4", "Two"), (0, "a.mp4", "One")])
    base.close()
    found = read_captions(tmp_path / "list.sqlite")
    assert list(found.captions) == ["one", "two"] and Path(found.clips[1].path).name == "b.mp4"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.json", None, "no caption list"),
        ("bad.json", "{", "not JSON"),
        ("object.json", "{}", "must be a list"),
        ("empty.json", "[]", "no captions"),
        ("entry.json", '[{"video": "a", "caption": "x"}, {"caption": "y"}]', "entry 1"),
        ("other.db", "not a database, but long enough to be looked at as one" * 3, "neither .json nor an SQLite"),
    ],
)
def test_bad_lists_are_named(name: str, content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        read_captions(tmp_path / name)


def test_tokens_end_without_sep_unless_asked(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(str(vocabulary))
    ids, mask = Tokens(["a red thing moves", "things"], tokenizer, max_length=4)[torch.tensor([0, 1])]
    assert ids.tolist() == [[2, 5, 6, 7], [2, 7, 10, 0]] and mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    ids, _ = Tokens(["a red thing moves"], tokenizer, max_length=4, sep=True)[torch.tensor([0])]
    assert ids.tolist() == [[2, 5, 6, 3]]
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(str(vocabulary / "missing"))


def test_a_replaced_clip_brings_its_own_caption(tmp_path: Path, tiny_list: Path, vocabulary: Path) -> None:
    """Where a file cannot be read, clip and caption of the one that stands in for it stay together."""
    names = ["video0.mp4", "broken.mp4", "video1.mp4", "video1.mp4"]
    tiny_list.with_name("broken.mp4").write_bytes(b"no video")
    table = tiny_list.with_name("captions.json")
    captions = ["a", "red", "thing", "left"]
    table.write_text(json.dumps([{"video": n, "caption": c} for n, c in zip(names, captions, strict=True)]))
    found = read_captions(table)
    data = DataConfig(workers=0, max_bad_share=0.5)
    loader = CaptionLoader(
        ClipLoader(found.clips, data, num_frames=2, image_size=32, batch_size=4),
        Tokens(found.captions, load_tokenizer(str(vocabulary)), max_length=4),
        found.sample,
    )
    (batch,) = list(loader)
    assert 1 not in batch["index"] and len(loader.bad_files) == 1
    words = {0: 5, 2: 7, 3: 9}
    assert batch["ids"][:, 1].tolist() == [words[row] for row in batch["index"].tolist()]
    assert batch["sample"].tolist() == [2 if row == 3 else row for row in batch["index"].tolist()]


def test_corpora_are_joined_and_keep_their_samples_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        entries = [{"video": "a.mp4", "caption": [name, "again"]}]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    joint = read_corpora([f"{tmp_path}/{name}.json={tmp_path}/{name}" for name in ("one", "two")])
    assert list(joint.captions) == ["one", "again", "two", "again"] and joint.sample.tolist() == [0, 0, 2, 2]
    assert [clip.path for clip in joint.clips[::2]] == [f"{tmp_path}/one/a.mp4", f"{tmp_path}/two/a.mp4"]
    with pytest.raises(DataError, match="not a folder"):
        read_corpora([f"{tmp_path}/one.json={tmp_path}/three"])


def test_compiled_runs_get_texts_of_one_length(vocabulary: Path) -> None:
    tokens = Tokens(["a", "a red thing"], load_tokenizer(str(vocabulary)), max_length=6, fixed=True)
    ids, mask = tokens[torch.tensor([0])]
    assert ids.tolist() == [[2, 5, 0, 0, 0, 0]] and mask.tolist() == [[True, True, False, False, False, False]]
    assert tokens[torch.tensor([1])][0].shape == (1, 6)


def test_captions_without_a_word_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [{"video": "a.mp4", "caption": ["?!", "one", ""]}, {"video": "b.mp4", "caption": "half \ud83d two"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    found = read_captions(tmp_path / "list.json")
    assert list(found.captions) == ["one", "half two"] and [Path(c.path).name for c in found.clips] == [
        "a.mp4",
        "b.mp4",
    ]
    assert "left out 2 captions" in caplog.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [((4, None, "x"), "row with id 4: filename is None"), ((4, "a.mp4", None), "row with id 4: caption is None")],
)
def test_bad_sqlite_rows_are_named(row: tuple, expected: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "list.sqlite") as base:
        base.execute("CREATE TABLE annos (id INTEGER, filename TEXT, caption TEXT)")
        base.execute("INSERT INTO annos VALUES (?, ?, ?)", row)
    base.close()
    with pytest.raises(DataError, match=expected):
        read_captions(tmp_path / "list.sqlite")


def test_columns_come_before_the_first_batch(tiny_list: Path) -> None:
    clips = ClipLoader(
        [Clip(path=str(tiny_list.with_name("video1.mp4")))] * 2,
        DataConfig(workers=0),
        num_frames=2,
        image_size=32,
        batch_size=2,
    )
    clips.add_columns(lambda rows: {"double": 2 * rows})
    (batch,) = list(clips)
    assert torch.equal(batch["double"], 2 * batch["index"])
    with pytest.raises(RuntimeError, match="before the first batch"):
        clips.add_columns(lambda rows: {})


def test_hugging_face_out_of_reach_is_asked_once(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its client reports it; what was fetched before is still found."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import BertTokenizerFast

    tokenizer = load_tokenizer(str(vocabulary))

    def out_of_reach(*_: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    def cached(name: str, *, local_files_only: bool) -> BertTokenizerFast:
        assert local_files_only
        return tokenizer

    monkeypatch.setattr("huggingface_hub.hf_hub_download", out_of_reach)
    monkeypatch.setattr(BertTokenizerFast, "from_pretrained", cached)
    assert load_tokenizer("a-name") is load_tokenizer(str(vocabulary)) is tokenizer


def test_what_lies_here_is_not_asked_for(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> str:
        raise AssertionError("a folder or file of this machine was asked for")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", never)
    words = load_tokenizer(str(vocabulary)).get_vocab()
    assert load_tokenizer(str(vocabulary / "vocab.txt")).get_vocab() == words
    with pytest.raises(AssertionError, match="was asked for"):
        load_tokenizer("a-name")


def test_a_tokenizer_with_names_of_its_own_is_carried_whole(tmp_path: Path) -> None:
    """Other special tokens, and letters whose case counts: what a vocabulary alone does not tell."""
    special = {"cls_token": "<c>", "sep_token": "<s>", "pad_token": "<p>", "unk_token": "<u>", "mask_token": "<m>"}
    (tmp_path / "vocab.txt").write_text("\n".join([*special.values(), "Red", "red", "##s"]))
    config = special | {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    given = load_tokenizer(str(tmp_path))
    carried = vocabulary_of(given, "own")
    again = load_vocabulary(carried)
    for name in ("cls_token_id", "sep_token_id", "pad_token_id", "unk_token_id", "mask_token_id"):
        assert getattr(again, name) == getattr(given, name), name
    texts = ["Reds red", "what"]
    assert [again(text).input_ids for text in texts] == [given(text).input_ids for text in texts]
    assert fingerprint_of(again) == carried.fingerprint and len(again) == len(given) == 8


def test_a_folder_without_a_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither vocab.txt nor tokenizer.json"):
        load_tokenizer(str(tmp_path))
