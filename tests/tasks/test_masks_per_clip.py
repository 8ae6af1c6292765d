"""mask.per_clip: one pass of the teacher, several masks of each clip, and the step that the masks apart would make."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.engine.test_trainer import Toy, trainer
from tests.objectives.test_one_graph import imagined
from umt_fast.__main__ import main
from umt_fast.bench.stage1 import costs
from umt_fast.config import (
    AlignConfig,
    ConfigError,
    MaskConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    VitConfig,
)
from umt_fast.masking import seed_of_view
from umt_fast.plan import PlanOptions, report, work_of
from umt_fast.tasks.pretraining import UnmaskedAlignment


def config_of(per_clip: int, kind: str = "semantic", attention: str = "joint", ratio: float = 0.8) -> Stage1Config:
    return Stage1Config(
        run=RunConfig(dtype="fp32"),
        student=VitConfig(
            width=32,
            depth=3,
            num_heads=2,
            patch_size=8,
            image_size=32,
            num_frames=4,
            drop_path=0.0,
            attention=attention,
        ),
        teacher=TeacherConfig(
            width=32, depth=3, num_heads=2, patch_size=8, image_size=32, output_dim=16, weights="untrained"
        ),
        mask=MaskConfig(kind=kind, ratio=ratio, per_clip=per_clip),
        align=AlignConfig(num_layers=2),
    )


def clips(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)


def objective_of(config: Stage1Config) -> UnmaskedAlignment:
    torch.manual_seed(0)
    return UnmaskedAlignment(config).train()


@pytest.mark.parametrize("kind", ["semantic", "tube", "random"])
# At 0.5 two views see as many tokens as a frame has: its last block is then finished whole.
@pytest.mark.parametrize(("attention", "ratio", "views"), [("joint", 0.8, 3), ("spatial", 0.5, 2), ("joint", 0.5, 4)])
def test_a_step_is_the_mean_of_steps_with_the_same_masks(kind: str, attention: str, ratio: float, views: int) -> None:
    if kind == "random" and attention == "spatial":
        pytest.skip("random masks leave frames of different lengths")
    together = objective_of(config_of(views, kind, attention, ratio))
    apart = copy.deepcopy(together)
    apart.config = dataclasses.replace(apart.config, mask=dataclasses.replace(apart.config.mask, per_clip=1))
    seed, video = torch.tensor([2**62 + 5]), clips()
    found = together({"video": video}, seed)
    found["loss"].backward()
    drawn = together.teacher(video, together.config.mask, seed).visible.view(len(video), views, -1)
    losses, layers = [], []
    for view in range(views):
        other = seed_of_view(seed, view)
        assert torch.equal(apart.teacher(video, apart.config.mask, other).visible, drawn[:, view])
        one = apart({"video": video}, other)
        (one["loss"] / views).backward()
        losses.append(one["loss"].detach())
        layers.append(one["loss_layer_1"])
    torch.testing.assert_close(found["loss"].detach(), torch.stack(losses).mean(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["loss_layer_1"], torch.stack(layers).mean(), rtol=1e-6, atol=1e-7)
    assert torch.stack(losses).std() > 1e-4, "the views must differ, or the test compares a mask with itself"
    for (name, mine), theirs in zip(together.student.named_parameters(), apart.student.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: name + text
        )


def test_masks_of_a_clip_differ_and_the_first_is_that_of_a_single_one() -> None:
    objective = objective_of(config_of(1))
    video, seed = clips(), torch.tensor([7])
    one = objective.teacher(video, MaskConfig(), seed)
    four = objective.teacher(video, MaskConfig(per_clip=4), seed)
    views = four.visible.view(3, 4, -1)
    assert torch.equal(views[:, 0], one.visible)
    torch.testing.assert_close(four.targets.unflatten(1, (3, 4))[:, :, 0], one.targets)
    assert len({tuple(view.flatten().tolist()) for view in views.unbind(1)}) == 4


def test_seeds_of_views_stay_within_64_bits() -> None:
    seeds = [seed_of_view(torch.tensor([2**63 - 1]), view).item() for view in range(64)]
    assert seeds[0] == 2**63 - 1 and len(set(seeds)) == 64


class _Counting(torch.utils.flop_counter.FlopCounterMode):
    def of(self, run: Any) -> int:
        with self, sdpa_kernel(SDPBackend.MATH):  # torch 2.11 counts no fused attention on a CPU
            run()
        return self.get_total_flops()


@pytest.mark.parametrize("kind", ["semantic", "random"])
@pytest.mark.parametrize("views", [2, 4, 6])
def test_flops_of_a_clip_count_every_view_and_the_teacher_once(kind: str, views: int) -> None:
    config = config_of(views, kind)
    objective, video = objective_of(config), clips(1)

    def step() -> None:
        objective({"video": video}, torch.tensor([3]))["loss"].backward()

    counted = _Counting(display=False).of(step)
    assert objective.flops_per_clip() == pytest.approx(counted, rel=0.02)
    parts = sum(cost.flops for cost in costs(dataclasses.replace(config, run=RunConfig(batch_size=1)), 1000).values())
    if kind == "semantic":
        assert parts == pytest.approx(objective.flops_per_clip(), rel=1e-6)
    once = objective_of(config_of(1, kind)).flops_per_clip()
    assert once < objective.flops_per_clip() < views * once


def test_work_of_a_view_at_b16() -> None:
    """455 GFLOP a view become 315 and 245: the teacher's are shared."""
    for views, expected in ((1, 455e9), (2, 315e9), (4, 245e9)):
        config = Stage1Config(mask=MaskConfig(per_clip=views))
        assert UnmaskedAlignment.flops_of(config) / views == pytest.approx(expected, rel=0.03)


def test_a_plan_counts_views_and_their_memory() -> None:
    one, four = (work_of(config_of(views)) for views in (1, 4))
    assert four.activation_bytes == 4 * one.activation_bytes and (one.views, four.views) == (1, 4)
    assert one.flops < four.flops < 4 * one.flops and 0 < one.backward < four.backward < 2 / 3
    text = report("x", config_of(4), PlanOptions(clips=1000))
    assert "the student sees each clip 4 times in a step" in text
    assert "views/s" not in report("x", config_of(1), PlanOptions(clips=1000))


def test_refusals_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"mask\.per_clip is 0; it must be at least 1"):
        MaskConfig(per_clip=0)
    for name in ("mask", "image_mask"):
        with pytest.raises(ConfigError, match=rf"{name}\.per_clip is 2; stage 2 draws one mask of each clip"):
            Stage2Config(**{name: MaskConfig(per_clip=2)})


def test_several_masks_are_one_graph_without_a_wait() -> None:
    objective = objective_of(config_of(3))
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="eager")
    batch, seed = {"video": clips()}, torch.tensor([11])
    assert torch.equal(compiled(batch, seed)["loss"], objective(batch, seed)["loss"])
    with imagined("cuda") as waits:
        imaginary = UnmaskedAlignment(config_of(3))
        video = torch.empty(3, 4, 32, 32, 3, dtype=torch.uint8)
        waits.found.clear()
        imaginary({"video": video}, torch.empty(1, dtype=torch.int64))
    assert waits.count > 100 and not waits.found, waits.found


def test_bench_and_trainer_tell_clips_and_views_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", "stage1", "--model", "tiny", "--batch_size", "2", "--device", "cpu", "--steps", "1"]
    assert main([*arguments, "--dtype", "fp32", "--per_clip", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["views_per_s"] == pytest.approx(3 * found["clips_per_s"], rel=1e-3) and found["per_clip"] == 3
    assert main([*arguments, "--implementation", "plain", "--per_clip", "3"]) == 2
    assert "per_clip" in capsys.readouterr().err
    monkeypatch.setattr(Toy, "views_per_clip", 3, raising=False)
    trainer(tmp_path, max_steps=1).train()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["views_per_s"] == pytest.approx(3 * row["clips_per_s"], rel=1e-3)
