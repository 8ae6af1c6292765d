"""The fast implementation of stage 1 against the plain one: same weights, same mask, same loss and gradients."""

import pytest
import torch

from umt_fast.bench import stage1
from umt_fast.bench.measure import Case
from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, AlignConfig, RunConfig, Stage1Config, TeacherConfig, VitConfig
from umt_fast.reference.stage1 import PlainStage1, PlainTeacher, draw_mask
from umt_fast.tasks.pretraining import UnmaskedAlignment


def small(teacher_pixels: int, teacher_patch: int) -> Stage1Config:
    return Stage1Config(
        run=RunConfig(dtype="fp32"),
        student=VitConfig(width=64, depth=4, num_heads=2, image_size=64, num_frames=4, drop_path=0.0),
        teacher=TeacherConfig(
            width=48,
            depth=4,
            num_heads=3,
            patch_size=teacher_patch,
            image_size=teacher_pixels,
            output_dim=32,
            weights="untrained",
        ),
        align=AlignConfig(num_layers=3),
    )


@pytest.mark.parametrize(("teacher_pixels", "teacher_patch"), [(64, 16), (56, 14)])
def test_implementations_agree(teacher_pixels: int, teacher_patch: int) -> None:
    torch.manual_seed(0)
    config = small(teacher_pixels, teacher_patch)
    fast, plain = UnmaskedAlignment(config), PlainStage1(config)
    plain.student.load_state_dict(fast.student.state_dict())
    plain.teacher.load_state_dict(fast.teacher.state_dict())
    video = torch.randint(256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    pixels = ((video / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 4, 1, 2, 3)
    seed = torch.tensor([3])

    visible = fast.teacher(video, config.mask, seed).visible
    mask = torch.ones(2, 64, dtype=torch.bool).scatter_(1, visible.long(), False)
    features, attention = plain.teacher(pixels)
    plain_loss = plain.loss(pixels, features, mask)
    plain_loss.backward()
    fast_loss = fast({"video": video}, seed)["loss"]
    fast_loss.backward()

    torch.testing.assert_close(fast_loss, plain_loss, rtol=1e-5, atol=1e-6)
    expected = dict(plain.student.named_parameters())
    for name, parameter in fast.student.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


def test_plain_mask_keeps_the_official_number_per_frame() -> None:
    torch.manual_seed(0)
    attention = torch.rand(8, 16)
    mask = draw_mask(attention, 2, 0.8)
    assert mask.shape == (2, 64)
    assert (~mask).view(8, 16).sum(1).eq(16 - int(16 * 0.8)).all()


def test_plain_teacher_heeds_a_cpus_autocast() -> None:
    # Of an even number of heads: nn.MultiheadAttention's own implementation, which does not, takes no other.
    config = TeacherConfig(width=64, depth=2, num_heads=4, image_size=64, output_dim=32, weights="untrained")
    teacher = PlainTeacher(config, 2, "l2").requires_grad_(False).eval()
    found = []
    for module in teacher.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.register_forward_hook(lambda module, given, out: found.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        teacher(torch.randn(1, 3, 2, 64, 64))
    assert found == 2 * [torch.bfloat16]


@pytest.mark.parametrize("implementation", ["fast", "plain"])
def test_bench_reports_what_it_measured(implementation: str) -> None:
    case = Case(
        model="tiny", batch_size=2, device=torch.device("cpu"), dtype="fp32", implementation=implementation, steps=2
    )
    result = stage1.measure(case)
    assert result["clips_per_s"] > 0 and result["matmul_tflops"] > 0 and result["peak_memory_gib"] > 0
    assert sum(result["ms_per_part"].values()) > 0
    # The TFLOP/s shown must follow from the clips/s shown.
    flops = UnmaskedAlignment.flops_of
    expected = result["clips_per_s"] * flops(stage1.stage1_config("tiny", 2, "fp32")) / 1e12
    assert result["tflops"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
