"""The table of released files, against the page made of it, our own names, and the official pages."""

import os
import re
from pathlib import Path

import pytest

import umt_fast
from umt_fast import zoo
from umt_fast.models.description import MODELS, STAGE1_MODELS

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_zoo_is_the_official_one() -> None:
    assert (REPOSITORY / "docs" / "zoo.md").read_text() == zoo.table(), "run python -m umt_fast.zoo > docs/zoo.md"
    assert zoo.ARCHITECTURES.keys() == (MODELS | STAGE1_MODELS).keys()
    names = umt_fast.list_models()
    assert names.keys() >= zoo.ARCHITECTURES.keys() and len(names) == len(zoo.ARCHITECTURES) + len(zoo.ZOO)
    assert len(zoo.ZOO) == 21 + 6 + 14 + 6  # single modality, stage 2, retrieval, question answering
    for entry in zoo.ZOO.values():
        assert not entry.model or entry.model in names
        tells = f"_f{entry.frames}_res{entry.image_size}"
        assert tells in entry.name or "_f" not in entry.name
        assert entry.model[4:7] in ("", entry.name.removeprefix("ret_").split("_")[-2 if "ret_" in entry.name else 0])


def test_the_zoo_agrees_with_the_published_pages() -> None:
    """Every name and score, against the official MODEL_ZOO pages where a copy of the official code is given."""
    official = Path(os.environ.get("UMT_OFFICIAL", "/nonexistent"))
    if not official.is_dir():
        pytest.skip("no official code; set UMT_OFFICIAL to a checkout of it")
    pages = [
        official / "single_modality" / "MODEL_ZOO.md", official / "multi_modality" / "MODEL_ZOO.md",
        official / "single_modality" / "action_detection" / "README.md",
    ]  # fmt: skip
    linked: set[str] = set()
    for page in pages:
        text = page.read_text()
        linked |= set(re.findall(r"/umt/\w+/(\w+)\.pth\)?.?>? ?(?:<b>)?\[?(?:ckpt)?", text))
        for line in text.splitlines():
            row = re.search(r"\| ([\d.]+) \| \[ckpt\]\(\S+/(\w+)\.pth\)", line)
            if row:
                assert zoo.ZOO[row[2]].score == float(row[1]), line
    wrongly_linked = {"ret_ssv2_tpl_l16_25m", "qa_msvd_l16_25m"}
    assert {name for name in linked if not name.endswith("res384_log")} - set(zoo.ZOO) == set()
    assert set(zoo.ZOO) - linked == wrongly_linked
