"""data.reader where NVIDIA DALI is not installed."""

import sys
from pathlib import Path

import pytest
import torch

from umt_fast.config import DataConfig
from umt_fast.data.loader import ClipLoader, open_loader
from umt_fast.data.manifest import DataError, read_list


def test_dali_on_request_says_what_is_missing(tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.delitem(sys.modules, "umt_fast.data.dali", raising=False)
    clips = read_list(tiny_list, DataConfig())
    kind = {"device": torch.device("cpu"), "num_frames": 2, "image_size": 32, "batch_size": 1}
    with pytest.raises(DataError, match="not installed.*data.reader cpu"):
        open_loader(clips, DataConfig(reader="dali"), **kind)
    assert type(open_loader(clips, DataConfig(), **kind)) is ClipLoader
