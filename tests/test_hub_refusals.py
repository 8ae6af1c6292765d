"""What models by name and by file refuse, and how they say it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import umt_fast
from tests.test_hub import WORDS, saved, shrink, trained
from tests.videos import write_video
from umt_fast.config import ConfigError
from umt_fast.data.loaders.tokens import load_tokenizer
from umt_fast.data.sources.clip import DataError
from umt_fast.engine.checkpoint import CheckpointError
from umt_fast.models.weights import WeightsError


def test_what_other_models_have_is_told_with_theirs(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "tiny")
    model = umt_fast.load_model(weights=path, device="cpu")
    with pytest.raises(AttributeError) as caught:
        model.predict("clip.mp4")
    assert str(caught.value) == (
        "predict is not for a StudentModel (pretraining); it is for models of the kind ClassifierModel (classification)"
    )
    assert not hasattr(model, "encode_text") and not hasattr(model, "nothing_has_this")


def test_files_are_not_taken_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    student, _ = trained("tiny")
    torch.save(student.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(
        WeightsError, match="bare.pth does not say which model it is of; its tensors look like 'umt_b16_stage1'"
    ):
        umt_fast.load_model(weights=tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match="holds stage-1 weights.*'umt_b16' is of stage-2 or downstream"):
        umt_fast.load_model("umt_b16", weights=tmp_path / "bare.pth")
    path, _ = saved(tmp_path, "tiny")
    with pytest.raises(ConfigError, match="says which model it is of.*leave 'umt_b16_stage1' out"):
        umt_fast.load_model("umt_b16_stage1", weights=path)
    with pytest.raises(ConfigError, match="num_frames is 8, but .* leave it out"):
        umt_fast.load_model(weights=path, num_frames=8)
    with pytest.raises(WeightsError, match="no weights at .*none.pth, and no released file"):
        umt_fast.load_model("umt_b16", weights=tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="did you mean the released file 'b16_25m'"):
        umt_fast.load_model("umt_b16", weights="b16_25")
    with pytest.raises(WeightsError, match=r"is a file; load it by load_model\(weights="):
        umt_fast.from_pretrained(path)
    with pytest.raises(WeightsError, match="holds no config.json"):
        umt_fast.from_pretrained(tmp_path)
    umt_fast.load_model(weights=path, device="cpu").save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="out/config.json is no JSON; give a folder that save_pretrained wrote"):
        umt_fast.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="out holds weights but no config.json, which save_pretrained wrote"):
        umt_fast.load_model(weights=tmp_path / "out")


def test_refused_inputs(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "captions")
    model = umt_fast.load_model(weights=path, device="cpu")
    good = np.zeros((4, 40, 48, 3), np.uint8)
    write_video(tmp_path / "good.mp4", good)
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    for videos, message in (
        (good.astype(np.float32), r"frames are float32 \(4, 40, 48, 3\); give frames as uint8"),
        (torch.zeros(1, 4, 8, 8, 3), "frames are float32"),
        (good.transpose(0, 3, 1, 2), r"shape \(4, 3, 40, 48\).*channels last"),
        (good[0], r"shape \(40, 48, 3\)"),
        (good[:0], "holds no pixel"),
        ([], "the sequence is empty"),
        ([good[None].repeat(2, 0)], "holds one of 2 clips"),
        (3, "of type int"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.mp4", "none.mp4: no such file"),
        ([tmp_path / "good.mp4", tmp_path / "damaged.mp4"], "damaged.mp4"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            model.features(videos)
        assert "\n" not in str(caught.value)
    for layers in ((2,), (-3,), (0.5,)):
        with pytest.raises(ConfigError, match="does not exist; this tower has blocks 0 to 1"):
            model.features(good, layers=layers)
    with pytest.raises(ConfigError, match=r"layers is 1; give a list: layers=\[1\]"):
        model.features(good, layers=1)
    with pytest.raises(ConfigError, match="tokenizer .* is not known; give it: tokenizer="):
        model.encode_text(["a"])
    for device, dtype, message in (("gpu", None, "device is 'gpu'"), ("cpu", "fp16", "dtype is 'fp16'")):
        with pytest.raises(ConfigError, match=message):
            umt_fast.load_model(weights=path, device=device, dtype=dtype)


def test_a_vocabulary_without_words_is_told(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("")
    with pytest.raises(DataError, match=f"the tokenizer in {tmp_path} has no words"):
        load_tokenizer(str(tmp_path))


def test_refused_texts(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(WORDS))
    path, _ = saved(tmp_path, "captions")
    model = umt_fast.load_model(weights=path, device="cpu", tokenizer=words)
    with pytest.raises(ConfigError, match="one text, 'a dog'; give a list"):
        model.encode_text("a dog")
    with pytest.raises(DataError, match="the list is empty"):
        model.encode_text([])
    with pytest.raises(DataError, match="the text '...' has no word"):
        model.encode_text(["a", "..."])
    (words / "vocab.txt").write_text("\n".join([*WORDS, "one", "more"]))
    with pytest.raises(ConfigError, match="has 18 words, but the model knows 16"):
        umt_fast.load_model(weights=path, device="cpu", tokenizer=words).encode_text(["a"])
