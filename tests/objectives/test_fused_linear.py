"""run.linear fused: the whole stage-1 step by kernels.linear, interpreted, against the library's; its bytes; refusals."""

import pytest
import torch

from benchmarks.counted import Counter, Counts
from benchmarks.fake_gpu import OLDEST_TORCH, TORCH, fake_gpu
from kernels._launch import interpreted
from umt_fast.bench.measure import random_video
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import (
    AlignConfig,
    ConfigError,
    FinetuneConfig,
    MaskConfig,
    RunConfig,
    Stage1Config,
    TeacherConfig,
    VitConfig,
)
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.optim import build_optimizer
from umt_fast.models.linear import require_linear
from umt_fast.tasks import tuning
from umt_fast.tasks.base import check_used
from umt_fast.tasks.pretraining import UnmaskedAlignment

CPU = torch.device("cpu")
NEEDS_KERNELS = pytest.mark.skipif(
    not (interpreted() or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)


def config_of(linear: str, dtype: str = "fp32", drop_path: float = 0.0, **teacher: object) -> Stage1Config:
    return Stage1Config(
        run=RunConfig(dtype=dtype, linear=linear),
        student=VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=2, drop_path=drop_path),
        teacher=TeacherConfig(
            width=32, depth=3, num_heads=2, patch_size=16, image_size=32, output_dim=16, weights="untrained", **teacher
        ),
        mask=MaskConfig(ratio=0.5),
        align=AlignConfig(num_layers=2),
    )


def step(config: Stage1Config, seed: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients, the same weights whatever run.linear is."""
    torch.manual_seed(0)
    objective = UnmaskedAlignment(config)
    with torch.no_grad():  # zeros hide what is done with them
        for name, parameter in objective.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1 and "ln_" in name:
                parameter.normal_(1, 0.2)
    if config.run.linear == "fused":  # its frozen weights were derived from those before
        for block in objective.teacher.blocks:
            block.fuse(torch.bfloat16 if config.run.dtype == "bf16" else torch.float32)
    objective.train()
    video = torch.randint(256, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    loss = objective({"video": video}, torch.tensor([seed]))["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in objective.student.named_parameters()}


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("dtype", "drop_path", "activation", "tolerance"),
    [("fp32", 0.0, "quick_gelu", 1e-4), ("fp32", 0.5, "gelu", 1e-4), ("bf16", 0.5, "quick_gelu", 5e-2)],
)
def test_the_step_equals_the_librarys(dtype: str, drop_path: float, activation: str, tolerance: float) -> None:
    (expected, theirs), (loss, ours) = (
        step(config_of(linear, dtype, drop_path, activation=activation)) for linear in ("library", "fused")
    )
    torch.testing.assert_close(loss, expected, rtol=tolerance / 10, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        off = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert ours[name].dtype == torch.float32 and off < tolerance, (name, off)


@NEEDS_KERNELS
def test_products_are_the_fused_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the blocks' linear layers is left to a library: without it, nothing of a block would work."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a library's product")

    config = config_of("fused")
    torch.manual_seed(0)
    objective = UnmaskedAlignment(config)
    names = {id(p) for block in objective.student.encoder.blocks for p in block.parameters()}
    library = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        return refuse() if id(weight) in names else library(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    monkeypatch.setattr("kernels.frozen_linear", refuse)
    video = torch.randint(256, (1, 2, 32, 32, 3), dtype=torch.uint8)
    assert torch.isfinite(objective({"video": video}, torch.tensor([1]))["loss"])


def count(config: Stage1Config) -> Counts:
    """What a whole step asks of an H100 that is not there, run eagerly, the optimizer's state already made."""
    with fake_gpu((9, 0)) as device, Counter(device) as counter:
        video = random_video(config.run.batch_size, 8, 224, device)
        objective = UnmaskedAlignment(config).to(device).train()
        optimizer = build_optimizer(objective.trainable, config.optim, lr=1e-4)
        for number in range(2):
            counter.restart()
            seed = torch.full((1,), number, dtype=torch.int64, device=device)
            objective({"video": video}, seed)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return counter.finish()


@pytest.mark.skipif(TORCH < OLDEST_TORCH, reason="counting needs a newer torch")
def test_bytes_of_a_b16_step_of_64_clips() -> None:
    """Counted as an H100 would run it eagerly: 146 GB by the library, 32 GB fewer fused."""
    gb, flops = {}, {}
    for linear in ("library", "fused"):
        config = stage1_config("b16", 64, "bf16")
        config.run.linear = linear
        counted = count(config)
        gb[linear] = sum(operation.bytes for operation in counted.operations) / 1e9
        flops[linear] = sum(operation.products for operation in counted.operations)
        assert counted.waits == 0
    assert flops["fused"] == pytest.approx(flops["library"], rel=1e-3)
    assert gb["library"] - gb["fused"] > 30, gb


def test_fused_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels._launch.interpreted", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.linear is 'fused': backend='triton' needs a CUDA tensor.*library"):
        require_linear(config_of("fused"), CPU)
    require_linear(config_of("library"), CPU)
    check_used(config_of("fused"), 1)
    with pytest.raises(ConfigError, match=r"run\.linear is 'fused', but only stage 1"):
        check_used(FinetuneConfig(run=RunConfig(linear="fused", epochs=35, warmup_epochs=2)), 1)


def test_tune_asks_for_it_on_a_gpu_alone() -> None:
    gpu, cpu = (Ranks(0, 1, torch.device(name)) for name in ("cuda", "cpu"))
    config = config_of("library")
    config.run.tune_axes = ("linear",)
    assert [found["linear"] for found in tuning.space(config, gpu)] == ["library", "fused"]
    assert [found["linear"] for found in tuning.space(config, cpu)] == ["library"]
    assert [found["linear"] for found in tuning.space(FinetuneConfig(run=config.run), gpu)] == ["library"]


@NEEDS_KERNELS
def test_the_fused_step_is_one_graph() -> None:
    torch.manual_seed(0)
    objective = UnmaskedAlignment(config_of("fused"))
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="eager")
    batch, seed = {"video": torch.randint(256, (1, 2, 32, 32, 3), dtype=torch.uint8)}, torch.tensor([5])
    torch.testing.assert_close(compiled(batch, seed)["loss"], objective(batch, seed)["loss"])
