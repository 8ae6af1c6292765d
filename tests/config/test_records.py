"""Stored configurations: those of checkpoints of earlier versions, and the position tables they stand for."""

import json
import logging
from pathlib import Path

import pytest
import torch

from umt_fast.__main__ import main
from umt_fast.config import FinetuneConfig, Stage1Config, Stage2Config, from_dict, to_dict
from umt_fast.models.classifier import Classifier
from umt_fast.models.student import Student

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "assets" / "tiny.py")
# What to_dict gave before position_grid took the place of table_frames and table_side.
RECORDS = json.loads((REPOSITORY / "tests" / "assets" / "records_0_1.json").read_text())
KINDS = {"tiny": Stage1Config, "captions": Stage2Config, "classes": FinetuneConfig, "classes_resized": FinetuneConfig}


def sinusoid(count: int, width: int) -> torch.Tensor:
    """The table by its definition, channel by channel."""
    place = torch.arange(count, dtype=torch.float64)
    columns = []
    for channel in range(width):
        angle = place / 10000 ** (2 * (channel // 2) / width)
        columns.append(angle.cos() if channel % 2 else angle.sin())
    return torch.stack(columns, 1).float()


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_an_earlier_version(name: str) -> None:
    assert "table_frames" in RECORDS[name]["student"]
    config = from_dict(KINDS[name], RECORDS[name])
    new = to_dict(config)
    assert from_dict(KINDS[name], new) == config
    # All else is as it was.
    for record in (new["student"], old := dict(RECORDS[name]["student"])):
        for field in ("table_frames", "table_side", "position_grid"):
            record.pop(field, None)
    assert new["student"] == old
    for section, values in RECORDS[name].items():
        if section == "student":
            continue
        now = new[section]
        if not isinstance(values, dict):
            assert now == values, section
            continue
        # Options may have been added; reader `auto` always was cpu.
        values = values | {"reader": "cpu"} if section == "data" else values
        assert {key: now[key] for key in values} == values, section


def test_a_classifier_of_an_earlier_version_keeps_its_table() -> None:
    """4 x 2 x 2 tokens of width 32: its own table, unless it was told to resize another."""
    own = Classifier(from_dict(FinetuneConfig, RECORDS["classes"]).student, 2)
    torch.testing.assert_close(own.position, sinusoid(16, 32))
    resized = Classifier(from_dict(FinetuneConfig, RECORDS["classes_resized"]).student, 2)
    maps = sinusoid(8 * 196, 32).view(8, 14, 14, 32).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(maps, (2, 2), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    halves = small.unflatten(0, (4, 2)).mean(1)  # linear, half-pixel centers: the mean of each two
    torch.testing.assert_close(resized.position, halves.flatten(0, 2), atol=1e-6, rtol=1e-5)


def test_pre_training_of_an_earlier_version_keeps_its_table() -> None:
    student = Student(from_dict(Stage1Config, RECORDS["tiny"]).student, 2, 16)
    torch.testing.assert_close(student.encoder.position, sinusoid(16, 32))


def test_pre_training_resizes_both_tables_alike() -> None:
    """The encoder's and the heads', as the official stage 2 does that is told how many frames its weights had."""
    config = from_dict(Stage1Config, RECORDS["tiny"] | {"student": RECORDS["tiny"]["student"] | {"table_frames": 2}})
    student = Student(config.student, 2, 16)
    first, second = sinusoid(8, 32).view(2, 4, 32)  # of two frames, at -1/4, 1/4, 3/4 and 5/4 of the way
    expected = torch.cat([first, 0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second, second])
    torch.testing.assert_close(student.encoder.position, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(student.position, expected, atol=1e-6, rtol=1e-5)


def run(out: Path, table: Path, variant: str, *more: object) -> Path:
    """The newest checkpoint of a run of the tiny page."""
    options = ["--data.train", table, "--run.out", out, *more]
    assert main(["train", f"{TINY}:{variant}", *(str(option) for option in options)]) == 0
    return max(out.glob("checkpoint-*"))


def grid_of(checkpoint: Path) -> tuple[int, ...]:
    path = checkpoint / "rest.pt" if checkpoint.is_dir() else checkpoint
    return tuple(torch.load(path, weights_only=True)["config"]["student"]["position_grid"])


def test_fine_tuning_takes_the_grid_of_its_weights(
    tmp_path: Path, tiny_list: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "umt_fast")
    pretrained = run(tmp_path / "stage1", tiny_list, "tiny")
    converted, flat = tmp_path / "converted.safetensors", tmp_path / "weights.pth"
    assert main(["convert", str(pretrained), str(converted)]) == 0
    torch.save(torch.load(pretrained, weights_only=True)["model"], flat)
    tuned = run(tmp_path / "tuned", tiny_list, "classes", "--init", pretrained, "--student.num_frames", 8)
    assert grid_of(tuned) == (4, 2, 2) and f"4 x 2 x 2 tokens of {pretrained}" in caplog.text
    # A classifier hands on the grid that its own table was made for, not its clips'.
    again = run(tmp_path / "again", tiny_list, "classes", "--init", tuned, "--student.num_frames", 6)
    assert grid_of(again) == (4, 2, 2)
    # What `convert` writes describes its model.
    assert grid_of(run(tmp_path / "converted", tiny_list, "classes", "--init", converted)) == (4, 2, 2)
    # A file of weights alone does not say, and is taken for an official one; the log names the other way.
    caplog.clear()
    assert grid_of(run(tmp_path / "flat", tiny_list, "classes", "--init", flat)) == (8, 14, 14)
    assert "official pre-training and resized to 4 x 2 x 2; --student.position_grid" in caplog.text
    given = ["--student.position_grid", 4, 2, 2]
    assert grid_of(run(tmp_path / "given", tiny_list, "classes", "--init", flat, *given)) == (4, 2, 2)


@pytest.mark.parametrize("layout", ["full", "sharded"])
def test_a_run_of_an_earlier_version_goes_on_with_its_table(layout: str, tmp_path: Path, tiny_list: Path) -> None:
    out, kind = tmp_path / "run", ["--run.checkpoint", layout]
    checkpoint = run(out, tiny_list, "classes", "--run.max_steps", 2, *kind)
    assert grid_of(checkpoint) == (8, 14, 14)
    path = checkpoint / "rest.pt" if layout == "sharded" else checkpoint
    content = torch.load(path, weights_only=True)
    del content["model_config"], content["config"]["student"]["position_grid"]
    content["config"]["student"] |= {"table_frames": 0, "table_side": 0}
    torch.save(content, path)
    newer = run(out, tiny_list, "classes", "--run.max_steps", 4, *kind)
    assert newer.stem == "checkpoint-00000004" and grid_of(newer) == (4, 2, 2)


def test_a_run_from_before_teachers_had_kinds_goes_on(tmp_path: Path, tiny_list: Path) -> None:
    assert "kind" not in RECORDS["tiny"]["teacher"]
    assert from_dict(Stage1Config, RECORDS["tiny"]).teacher.kind == "clip"
    whole, out = run(tmp_path / "whole", tiny_list, "tiny"), tmp_path / "run"
    path = run(out, tiny_list, "tiny", "--run.max_steps", 2)
    content = torch.load(path, weights_only=True)
    assert content["config"]["teacher"].pop("kind") == "clip"
    torch.save(content, path)
    newer = run(out, tiny_list, "tiny")
    states = [torch.load(each, weights_only=True)["model"] for each in (whole, newer)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
