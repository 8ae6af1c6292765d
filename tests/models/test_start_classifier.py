"""Starting a classifier: what is refused, what is named, and deepspeed's checkpoints."""

import argparse
import json
import logging
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from umt_fast.config import VitConfig
from umt_fast.models.classifier import Classifier
from umt_fast.models.student import Student
from umt_fast.models.weights import WeightsError, load_state
from umt_fast.models.weights.finetune import deepspeed_file, head_rows, start_classifier, start_from_state

VIT = VitConfig(width=8, depth=1, num_heads=1, image_size=32, num_frames=2, drop_path=0.0)
STATES = "mp_rank_00_model_states.pt"


def classifier(classes: int = 3, **sizes: int) -> Classifier:
    vit = VitConfig(
        width=8,
        depth=1,
        num_heads=1,
        image_size=sizes.get("image", 32),
        num_frames=sizes.get("frames", 2),
        drop_path=0.0,
    )
    return Classifier(vit, classes)


def same(model: Classifier, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (list(range(599)), "a list of 599; it must be a list of 600"),
        ({"0": 1}, "no list"),
        ([*range(599), 710], "names the row 710"),
        ([*range(599), -1], "names the row -1"),
        ([*range(599), True], "names the row True"),
        ([*range(599), 1.5], r"names the row 1\.5"),
    ],
    ids=["short", "no list", "too large", "negative", "a truth value", "a fraction"],
)
def test_label_maps_that_are_none_are_refused(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        head_rows(710, 600, "file", tmp_path / "map.json")


def test_a_label_map_is_asked_for_and_read_only_where_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"label_mixto700\.json"):
        head_rows(710, 700, "file")
    with pytest.raises(WeightsError, match="leave it out"):
        head_rows(710, 400, "file", tmp_path / "map.json")
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        head_rows(710, 600, "file", tmp_path / "map.json")
    (tmp_path / "map.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read: no JSON"):
        head_rows(710, 600, "file", tmp_path / "map.json")


def test_a_refused_file_leaves_the_model_as_it_was() -> None:
    stored = classifier().state_dict()
    for wrong in (
        {"pos_embed": torch.zeros(1, 9, 8)},
        {"pos_embed": torch.zeros(1, 8, 7)},
        {"surplus": torch.zeros(1)},
        {"head.weight": torch.zeros(5, 8), "head.bias": torch.zeros(5)},
        {"patch_embed.proj.weight": torch.zeros(8, 3, 1, 8, 8)},
    ):
        model = classifier()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(WeightsError):
            start_from_state(model, stored | wrong, "file")
        assert same(model, before)
    without_norm = {key: value for key, value in stored.items() if key != "fc_norm.weight"}
    with pytest.raises(WeightsError, match=r"missing: fc_norm\.weight"):
        start_from_state(classifier(), without_norm, "file")


def test_what_is_left_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "umt_fast.weights")
    start_from_state(classifier(), Student(VIT, 2, 16).state_dict(), "stage1.pth")
    text = caplog.text
    assert "starting fresh: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in text
    assert "stage1.pth: 10 entries not used" in text
    caplog.clear()
    start_from_state(classifier(7), classifier(3).state_dict(), "k.pth", delete_head=True)
    assert "k.pth: the head is deleted" in caplog.text
    caplog.clear()
    large = classifier(frames=8, image=224)
    start_from_state(large, classifier().state_dict() | {"pos_embed": torch.zeros(1, 8 * 24 * 24, 8)}, "k.pth")
    assert "pos_embed not used: a model of 1568 tokens" in caplog.text


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> type:
    """A loss scaler of the name that deepspeed's files pickle, whose code must not run."""

    class DynamicLossScaler:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __getstate__(self) -> tuple:
            return (self.scale,)

        def __setstate__(self, state: tuple) -> None:
            raise AssertionError("code of the file's class was run")

    name = "deepspeed.runtime.fp16.loss_scaler"
    for part in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    DynamicLossScaler.__module__, DynamicLossScaler.__qualname__ = name, "DynamicLossScaler"
    sys.modules[name].DynamicLossScaler = DynamicLossScaler
    return DynamicLossScaler


def test_deepspeed_folders_load(deepspeed: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 parameters under `module` beside objects of deepspeed's own classes, which need not be installed."""
    stored = {key: torch.randn_like(value).half() for key, value in classifier().state_dict().items()}
    content = {
        "module": stored,
        "optimizer": {"loss_scaler": deepspeed(128.0), "scalers": [deepspeed(2.0)]},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-4),
        "param_shapes": [{"head.bias": torch.Size([3])}],
        "ds_version": "0.6",
    }
    folder = tmp_path / "run" / "checkpoint-best"
    folder.mkdir(parents=True)
    torch.save(content, folder / STATES)
    (tmp_path / "run" / "latest").write_text("checkpoint-best")
    monkeypatch.delitem(sys.modules, "deepspeed.runtime.fp16.loss_scaler")
    for path in (folder / STATES, folder, tmp_path / "run"):
        model = classifier()
        started = start_classifier(model, path)
        assert set(started.used) == set(stored) and not started.fresh and not started.unused
        assert same(model, {key: value.float() for key, value in stored.items()})


class Harmful:
    """Runs a command when it is unpickled as usual."""

    def __reduce__(self) -> tuple:
        return exec, ("raise AssertionError('code of the file was run')",)


@pytest.mark.parametrize(
    ("other", "name"), [(Harmful(), "exec"), (Fraction(1, 2), "Fraction")], ids=["code", "a class"]
)
def test_other_objects_beside_those_of_deepspeed_are_refused(
    other: object, name: str, deepspeed: type, tmp_path: Path
) -> None:
    torch.save({"module": classifier().state_dict(), "a": deepspeed(1.0), "b": other}, tmp_path / STATES)
    with pytest.raises(WeightsError, match=rf"an object of \S*{name}"):
        load_state(tmp_path / STATES)


def test_folders_without_one_file_of_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no mp_rank"):
        deepspeed_file(tmp_path)
    for rank in range(2):
        (tmp_path / f"mp_rank_{rank:02d}_model_states.pt").touch()
    with pytest.raises(WeightsError, match="2 files of parameters"):
        deepspeed_file(tmp_path)
    with pytest.raises(WeightsError, match="no weights file"):
        start_classifier(classifier(), tmp_path / "absent.pth")
