"""data.reader, and options of `data` that a run would not use."""

import sys
from pathlib import Path

import pytest
import torch

from umt_fast.__main__ import main
from umt_fast.config import ConfigError, DataConfig, from_dict, to_dict
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.opening import open_loader
from umt_fast.data.sources.lists import read_list


def test_dali_on_request_says_what_is_missing(tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.delitem(sys.modules, "umt_fast.data.loaders.dali", raising=False)
    clips = read_list(tiny_list, DataConfig())
    kind = {"device": torch.device("cpu"), "num_frames": 2, "image_size": 32, "batch_size": 1}
    with pytest.raises(DataError, match="not installed.*data.reader cpu"):
        open_loader(clips, DataConfig(reader="dali"), **kind)
    assert type(open_loader(clips, DataConfig(), **kind)) is ClipLoader


def test_checkpoints_of_earlier_versions_name_a_reader_that_was_cpu() -> None:
    assert (
        from_dict(DataConfig, to_dict(DataConfig()) | {"reader": "auto", "flip": True, "augment": "center"}).reader
        == "cpu"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampling_rate": 8}, "data.sampling_rate is 8, but data.sampling sparse has no stride"),
        ({"sampling": "intervals", "sampling_rate": 2}, "data.sampling intervals has no stride"),
        (
            {"augment": "center", "num_sample": 2},
            "data.num_sample is 2, but data.augment center cuts a clip the same way",
        ),
        ({"augment": "whole", "num_sample": 3}, "data.augment whole cuts a clip the same way"),
        ({"augment": "center", "flip": True}, "data.flip is True, but data.augment center mirrors nothing"),
    ],
)
def test_options_that_change_nothing_are_refused(
    options: dict[str, object], expected: str, tiny_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=expected):
        DataConfig(**options).require_used()
    given = [word for name, value in options.items() for word in (f"--data.{name}", str(value))]
    run = ["--data.train", str(tiny_list), "--run.out", str(tmp_path / "run")]
    assert main(["train", "tests/assets/tiny.py", *run, *given]) == 2
    assert expected in capsys.readouterr().err


def test_options_that_change_something_are_taken() -> None:
    for options in (
        {},
        {"augment": "center"},
        {"augment": "center", "flip": False},
        {"sampling": "dense", "sampling_rate": 8},
        {"num_sample": 2, "flip": True},
        {"augment": "random_resized_crop", "flip": True},
        {"flip": False},
    ):
        config = DataConfig(**options)
        config.require_used()
        assert all(getattr(config, name) == value for name, value in options.items())


def test_random_crops_are_mirrored_unless_that_is_switched_off() -> None:
    from umt_fast.data.loaders.reader import ClipReader
    from umt_fast.data.sources.lists import Clip

    for flip, expected in ((None, {False, True}), (True, {False, True}), (False, {False})):
        for augment in ("multi_scale_crop", "random_resized_crop"):
            data = DataConfig(augment=augment, flip=flip)
            reader = ClipReader([Clip(path="x")], data, num_frames=2, image_size=32, seed=0, train=True)
            assert {reader.windows(80, 60, (number,))[0].flip for number in range(40)} == expected
