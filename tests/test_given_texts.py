"""What a program hands over in place of texts and names: one line with the remedy, never a stack."""

import re
from pathlib import Path

import pytest

import umt_fast
from tests.test_embed import WORDS, saved
from umt_fast.config import ConfigError
from umt_fast.data.errors import DataError


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([3], "text 0 is 3, of type int; give texts (str)"),
        (["a", None], "text 1 is None, of type NoneType"),
        ([b"a"], "text 0 is b'a', of type bytes"),
        (3, "texts are 3, of type int; give a list of texts"),
        (["a", "?"], "the text '?' has no word; leave it out"),
    ],
)
def test_what_is_no_text(texts: object, said: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "captions")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    model = umt_fast.load_model(weights=path, device="cpu", tokenizer=tmp_path)
    with pytest.raises(DataError, match=re.escape(said)):
        model.encode_text(texts)


def test_a_path_in_place_of_a_name(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "tiny")
    for given in (path, str(path), tmp_path):
        with pytest.raises(ConfigError, match=rf"give it as weights='{re.escape(str(given))}'"):
            umt_fast.load_model(given)
    for options, said in (
        ({"name": 3}, "name is of type int; give a name or a path"),
        ({"weights": 3}, "weights is of type int"),
        ({"weights": path, "tokenizer": object()}, "tokenizer is of type object"),
        (
            {"weights": path, "tokenizer": "words"},
            "tokenizer is 'words', and the model of .* reads no texts; leave it out",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            umt_fast.load_model(**options)
    with pytest.raises(ConfigError, match="unknown model 'no_such'"):
        umt_fast.load_model("no_such")
