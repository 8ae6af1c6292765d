"""The official code beside ours: what is refused, and, where UMT_OFFICIAL names a copy, the plain step against it."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import official
from umt_fast.bench.finetune import finetune_config
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import ConfigError
from umt_fast.reference.finetune import PlainClassifier, mixed_targets, soft_target_loss
from umt_fast.reference.stage1 import PlainStage1

FOLDER = os.environ.get("UMT_OFFICIAL", "")
needs_official = pytest.mark.skipif(
    not (FOLDER and importlib.util.find_spec("timm")), reason="UMT_OFFICIAL names no official code, or timm is missing"
)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no single_modality/run_umt_pretraining.py; clone"):
        official.load(tmp_path)


def test_another_timm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "single_modality").mkdir()
    (tmp_path / "single_modality" / "run_umt_pretraining.py").touch()
    (tmp_path / "timm.py").write_text("__version__ = '9.9'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ConfigError, match="needs timm 0.4.12, found 9.9"):
        official.load(tmp_path)
    sys.modules.pop("timm")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype is fp16, which a CPU does not train in"):
        official.stage1(Path("nowhere"), device="cpu", dtype="fp16")


@needs_official
def test_the_plain_step_is_the_official_one() -> None:
    torch.manual_seed(0)
    config = stage1_config("tiny", 2, "fp32")
    config.student.drop_path = 0.0
    student, teacher = official.build(official.load(Path(FOLDER)), config)
    plain = PlainStage1(config)
    plain.student.load_state_dict(student.state_dict())
    plain.teacher.load_state_dict(teacher.state_dict())
    video = torch.randn(2, 3, 8, 64, 64)
    mask = torch.rand(2, 8, 16).argsort(-1).ge(4).flatten(1)
    with torch.no_grad():
        features, attention = teacher(video)
    found = plain.teacher(video)
    torch.testing.assert_close(found, (features, attention), rtol=1e-4, atol=1e-5)
    outputs = student(video, mask)
    targets = features[(~mask).expand(len(features), -1, -1)].view_as(outputs)
    loss = (outputs - targets).square().sum(-1).mean()
    loss.backward()
    plain_loss = plain.loss(video, found[0], mask)
    plain_loss.backward()
    torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=1e-6)
    expected = dict(student.named_parameters())
    for name, parameter in plain.student.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp_min(1e-9)
        assert error < 1e-3, f"gradient of {name} differs by {error:.1e}"


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 3; the official Mixup needs an even number"):
        official.finetune(Path("nowhere"), batch_size=3, device="cpu")


@needs_official
def test_the_plain_fine_tuning_step_is_the_official_one() -> None:
    torch.manual_seed(0)
    config = finetune_config("tiny", 2, "fp32", frames=16, checkpoint_blocks=1)
    config.head_scale, config.student.drop_path = 1.0, 0.0
    theirs = official.classifier_of(official.load(Path(FOLDER), official.FINETUNE), config)
    plain = PlainClassifier(config.student, config.num_classes)
    state = theirs.state_dict()
    torch.testing.assert_close(plain.position, state.pop("pos_embed"))
    plain.load_state_dict(state)
    video, label = torch.randn(2, 3, 16, 64, 64), torch.tensor([5, 7])
    targets = mixed_targets(label, config.num_classes, 0.3, config.label_smoothing)
    for model in (theirs, plain):
        soft_target_loss(model(video), targets).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in plain.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp_min(1e-9)
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


@pytest.mark.slow
@needs_official
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_official_fine_tuning_loop_runs(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    official.finetune(Path(FOLDER), "tiny", 2, "cpu", dtype, 1, frames=16, checkpoint_blocks=1)
    line = json.loads(capsys.readouterr().out)
    assert (line["bench"], line["implementation"], line["frames"]) == ("finetune", "official", 16)
    assert list(line["ms_per_part"]) == ["mixing", "classifier forward", "loss and backward", "optimizer"]


@pytest.mark.slow
@needs_official
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_official_loop_runs_and_prints_the_keys_of_our_bench(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    official.stage1(Path(FOLDER), "tiny", 2, "cpu", dtype, 1)
    line = json.loads(capsys.readouterr().out)
    assert line["implementation"] == "official" and line["clips_per_s"] > 0 and line["bench"] == "stage1"
    assert list(line["ms_per_part"]) == ["teacher", "mask", "student forward", "loss and backward", "optimizer"]
