"""Captions and token ids against the official clean-up and tokenizer: every text_*.safetensors is a case."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.parity_files import parity_files
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.captions import clean_caption

Case = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(params=parity_files("text"), ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    with safe_open(request.param, "pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}


def tokens(texts: list[str], config: dict[str, Any], length: int, folder: Path) -> tuple[Tensor, Tensor]:
    (folder / "vocab.txt").write_text("\n".join(config["vocabulary"]), encoding="utf-8")
    return Tokens(texts, load_tokenizer(str(folder)), max_length=length, fixed=True)[torch.arange(len(texts))]


def test_clean_up(case: Case) -> None:
    config, _ = case
    assert [clean_caption(text) for text in config["raw"]] == config["clean"]


def test_ids_of_captions(case: Case, tmp_path: Path) -> None:
    config, expected = case
    ids, mask = tokens([clean_caption(text) for text in config["raw"]], config, config["max_length"], tmp_path)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask.long(), expected["attention_mask"])


def test_ids_of_answers(case: Case, tmp_path: Path) -> None:
    """Their closing token stands in the text itself, and goes first where an answer is cut."""
    config, expected = case
    ids, mask = tokens(config["answers"], config, config["answer_max_length"], tmp_path)
    assert torch.equal(ids, expected["answer.input_ids"])
    assert torch.equal(mask.long(), expected["answer.attention_mask"])
