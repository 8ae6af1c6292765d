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
from umt_fast.models.teachers.quantized import QuantizedBlock, QuantizedLinear
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
    """Counted as an H100 would run it eagerly: 146 GB by the library, 45 GB fewer fused."""
    gb, flops = {}, {}
    for linear in ("library", "fused"):
        config = stage1_config("b16", 64, "bf16")
        config.run.linear = linear
        counted = count(config)
        gb[linear] = sum(operation.bytes for operation in counted.operations) / 1e9
        flops[linear] = sum(operation.products for operation in counted.operations)
        assert counted.waits == 0
    assert flops["fused"] == pytest.approx(flops["library"], rel=1e-3)
    assert gb["library"] - gb["fused"] > 44, gb


@NEEDS_KERNELS
@pytest.mark.parametrize(("activation", "dtype"), [("quick_gelu", "fp32"), ("gelu", "fp32"), ("quick_gelu", "bf16")])
def test_the_8_bit_teacher_is_as_faithful_fused(activation: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the exact teacher in fp32: rows and blocks of 128 have scales of their own, the norm is not rounded before."""
    monkeypatch.setattr(QuantizedLinear, "backend", "reference")
    video = torch.randint(256, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, linear, options in (
        ("exact", "library", {}),
        ("library", "library", {"precision": "int8"}),
        ("fused", "fused", {"precision": "int8"}),
    ):
        torch.manual_seed(0)
        kind = "fp32" if name == "exact" else dtype
        objective = UnmaskedAlignment(config_of(linear, kind, activation=activation, **options))
        with torch.no_grad():
            for block in objective.teacher.blocks:
                for norm in (block.ln_1, block.ln_2):
                    norm.weight.copy_(torch.linspace(0.3, 2, 32))
                    norm.bias.copy_(torch.linspace(1, -1, 32))
        if name == "fused":  # the last block is exact, and derived its weights from the norms before
            objective.teacher.blocks[-1].fuse(torch.float32 if kind == "fp32" else torch.bfloat16)
        found[name] = objective.teacher.features(video)[0].double()
    off = {name: (values - found["exact"]).norm() / found["exact"].norm() for name, values in found.items()}
    # The interpreter cuts bf16 off where a GPU rounds it.
    assert 1e-4 < off["fused"] <= (1.3 if dtype == "bf16" and interpreted() else 1.05) * off["library"] < 0.05, off


@NEEDS_KERNELS
def test_the_8_bit_teachers_products_are_the_fused_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a library's product, or a pass of its own")

    torch.manual_seed(0)
    teacher = UnmaskedAlignment(config_of("fused", precision="int8")).teacher
    x = torch.randn(2, 5, 32)
    library = UnmaskedAlignment(config_of("library", precision="int8")).teacher
    for name in ("quantized_linear", "quantize_rows", "frozen_linear"):
        monkeypatch.setattr(f"kernels.{name}", refuse)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", refuse)
    assert teacher.blocks[0](x).isfinite().all() and isinstance(library.blocks[0], QuantizedBlock)
    with pytest.raises(AssertionError, match="a library's product"):
        library.blocks[0](x)


@pytest.mark.skipif(TORCH < OLDEST_TORCH, reason="counting needs a newer torch")
def test_bytes_of_an_8_bit_teacher_of_64_clips() -> None:
    """Counted as an H100 would run it eagerly: less than a half of what the library's products and quantizers move."""
    gb = {}
    for linear in ("library", "fused"):
        config = stage1_config("b16", 64, "bf16", "fp8")
        config.run.linear = linear
        counted = count(config)
        gb[linear] = sum(operation.bytes for operation in counted.operations if operation.part == "teacher") / 1e9
        eight = sum(operation.products8 for operation in counted.operations)
        assert eight == 11 * 64 * 8 * 197 * 22 * 768**2 and counted.waits == 0
    assert gb["fused"] < gb["library"] / 2, gb


def test_an_8_bit_hidden_layer_without_whole_scales_is_refused() -> None:
    config = config_of("fused", precision="int8")
    config.teacher.width = 40
    with pytest.raises(ConfigError, match="160 hidden channels of an 8-bit teacher are not a multiple of 128.*library"):
        UnmaskedAlignment(config)


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
