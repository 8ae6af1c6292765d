"""Official training files, which pickle their settings as objects, and what kind of weights a file holds."""

import argparse
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from umt_fast.config import TextConfig, VitConfig
from umt_fast.models.classifier import Classifier
from umt_fast.models.student import Student
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import (
    WeightsError,
    kind_of,
    load_state,
    load_student,
    read_weights,
    save_state,
    start_video_text,
)

VIT = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=4, drop_path=0.0)
TEXT = TextConfig(width=32, depth=2, fusion_layer=1, num_heads=2, vocab_size=9, max_positions=4)


@pytest.fixture
def easydict(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of the name that official files pickle: a dictionary whose entries are attributes, too, nested and in lists."""

    class EasyDict(dict):
        def __init__(self, values: dict | None = None) -> None:
            for key, value in (values or {}).items():
                self[key] = value

        def __setitem__(self, key: str, value: object) -> None:
            if isinstance(value, dict):
                value = type(self)(value)
            elif isinstance(value, (list, tuple)):
                value = [type(self)(entry) if isinstance(entry, dict) else entry for entry in value]
            super().__setitem__(key, value)
            self.__dict__[key] = value

        def __setstate__(self, state: dict) -> None:
            raise AssertionError("code of the file's class was run")

    package, module = types.ModuleType("utils"), types.ModuleType("utils.easydict")
    EasyDict.__module__, EasyDict.__qualname__ = "utils.easydict", "EasyDict"
    package.easydict, module.EasyDict = module, EasyDict
    monkeypatch.setitem(sys.modules, "utils", package)
    monkeypatch.setitem(sys.modules, "utils.easydict", module)
    return EasyDict


def settings() -> dict:
    return {"model": {"vit": {"name": "b16"}, "layers": [{"a": 1}, {"b": (2, 3)}]}, "lr": 1e-4, "files": ["x", "y"]}


def test_a_training_file_with_an_easydict(easydict: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = Student(VIT, 2, 16).state_dict()
    nested = argparse.Namespace(config=easydict(settings()), more=[easydict({"c": 4})])
    content = {"model": state, "config": easydict(settings()), "args": nested, "epoch": 3}
    torch.save(content, tmp_path / "official.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    # As with us: neither the module nor its class is there.
    monkeypatch.delitem(sys.modules, "utils.easydict")
    monkeypatch.delitem(sys.modules, "utils")
    for name in ("official.pth", "old.pth"):
        file = read_weights(tmp_path / name)
        assert file.state.keys() == state.keys() and all(torch.equal(file.state[key], state[key]) for key in state)
        config = file.rest["config"]
        assert config["model"]["layers"][1]["b"] == [2, 3] and config["lr"] == 1e-4
        assert file.rest["args"].more[0]["c"] == 4 and file.rest["epoch"] == 3
        assert "utils.easydict" not in sys.modules
    # What was allowed while reading is so no longer.
    with pytest.raises(Exception, match="utils.easydict.EasyDict was not an allowed global"):
        torch.load(tmp_path / "official.pth", weights_only=True)


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_other_objects_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "x": Runs(tmp_path / "made")}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="x.pth holds an object of posix.mkdir; only tensors and plain values"):
        read_weights(tmp_path / "x.pth")
    assert not (tmp_path / "made").exists()


def test_a_training_file_is_mapped_and_not_read_whole(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(3)}, "optimizer": torch.zeros(1 << 20)}, tmp_path / "mapped.pth")
    state = read_weights(tmp_path / "mapped.pth").state
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= state["a"].data_ptr() < end:
            assert "mapped.pth" in line
            break
    state["a"].fill_(2)  # a copy of the page: the file stays
    assert read_weights(tmp_path / "mapped.pth").state["a"].tolist() == [1, 1, 1]


def video_text() -> VideoText:
    return VideoText(VIT, TEXT, num_layers=2, output_dim=16, embed_dim=8)


def downstream(state: dict) -> dict:
    """As official fine-tuning leaves a stage-2 model."""
    kept = {key: value for key, value in state.items() if ".cls." not in key and ".clip_decoder." not in key}
    return {key.replace("text_encoder.bert.", "text_encoder."): value for key, value in kept.items()}


def test_kinds_are_told_by_the_keys() -> None:
    stage2 = video_text().state_dict()
    assert kind_of(Student(VIT, 2, 16).state_dict()) == "stage-1"
    assert kind_of(stage2) == kind_of(stage2 | {"clip_teacher.conv1.weight": torch.ones(1)}) == "stage-2"
    assert kind_of(downstream(stage2)) == "downstream" and kind_of(Classifier(VIT, 3).state_dict()) == "classifier"
    assert kind_of({"visual.conv1.weight": torch.ones(1)}) == "CLIP" and kind_of({"a": torch.ones(1)}) == "unknown"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_stage_2_starts_from_stage_2(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first, second = video_text(), video_text()
    teacher = {"clip_teacher.conv1.weight": torch.ones(2, 3, 1, 4, 4), "clip_teacher.proj": torch.ones(2, 2)}
    save_state(first.state_dict() | teacher, tmp_path / f"stage2{suffix}")
    assert start_video_text(second, tmp_path / f"stage2{suffix}")
    for (key, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert "holds stage-2 weights" in caplog.text and "2 entries not used: clip_teacher.conv1.weight" in caplog.text
    assert "fresh" not in caplog.text


def test_stage_2_starts_from_stage_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    student, model = Student(VIT, 2, 16), video_text()
    words = model.text_encoder.bert.embeddings.word_embeddings.weight.clone()
    save_state(student.state_dict(), tmp_path / "stage1.safetensors")
    assert not start_video_text(model, tmp_path / "stage1.safetensors")
    assert torch.equal(model.vision_encoder.encoder.norm.weight, student.encoder.norm.weight)
    weight = student.clip_decoder[1].head.weight
    assert torch.equal(model.vision_encoder.clip_decoder[1].head.weight, weight)
    assert torch.equal(model.text_encoder.bert.embeddings.word_embeddings.weight, words)
    assert "holds stage-1 weights" in caplog.text and "starting fresh: pool_norm.weight, pool_norm.bias" in caplog.text
    assert "starting fresh beside the tower: vision_proj, text_proj, itm_head, temp" in caplog.text


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    stage2 = video_text().state_dict()
    for name, state in (("ft", Classifier(VIT, 3).state_dict()), ("down", downstream(stage2)), ("stage2", stage2)):
        save_state(state, tmp_path / f"{name}.pth")
    for name, kind in (("ft", "classifier"), ("down", "downstream")):
        with pytest.raises(
            WeightsError, match=f"holds {kind} weights .*stage 2 starts from stage-1 or stage-2 weights"
        ):
            start_video_text(video_text(), tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match="holds stage-2 weights .*stage 1 starts from stage-1 weights"):
        load_student(Student(VIT, 2, 16), tmp_path / "stage2.pth")


def test_downstream_keys_as_the_official_loader_maps_them(shared: Path) -> None:
    """The published table: each key of a retrieval model, and the key of the stage-2 file that fills it."""
    import json

    from safetensors import safe_open

    with safe_open(shared / "parity" / "load_downstream_a.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    taken = config["models"]["retrieval"]["taken"]
    ours = downstream({key: torch.ones(1) for key in config["file_keys"] if not key.startswith("clip_teacher.")})
    assert ours.keys() == taken.keys()


def test_safetensors_keep_the_description(tmp_path: Path) -> None:
    save_state({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"task": "video_text", "version": 1})
    file = read_weights(tmp_path / "a.safetensors")
    assert file.rest == {"model_config": {"task": "video_text", "version": 1}} and file.state.keys() == {"a"}
    assert load_file(tmp_path / "a.safetensors").keys() == {"a"}


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    tied = torch.randn(3, 2)
    save_state({"one": tied, "other": tied, "turned": tied.t()}, tmp_path / "tied.safetensors")
    state = load_state(tmp_path / "tied.safetensors")
    for name, expected in (("one", tied), ("other", tied), ("turned", tied.t())):
        assert torch.equal(state[name], expected)


def test_saved_weights_are_as_readable_as_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name in ("a.safetensors", "a.pth"):
            save_state({"weight": torch.ones(2)}, tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_tensors_without_a_name_are_refused(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2), "weight": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="a tensor under 0, which is no name"):
        load_state(tmp_path / "a.pt")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    """What to give in its place: a checkpoint of a run folder, a converted file of a sharded one."""
    sharded = tmp_path / "checkpoint-00000002.sharded"
    sharded.mkdir()
    for path, said in (
        (tmp_path, f"give a checkpoint of the run, as {sharded}"),
        (sharded, f"`convert {sharded} checkpoint-00000002.safetensors`"),
    ):
        with pytest.raises(WeightsError, match=f"{path} is a folder, and weights are one file here; .*{said}"):
            load_state(path)
