"""The bicubic resize as matrix products, against F.interpolate and against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.assets import tiny
from umt_fast.models.resize import _windows, bicubic
from umt_fast.models.teachers import frame_tower
from umt_fast.tasks.pretraining import UnmaskedAlignment


@pytest.mark.parametrize(
    ("source", "target"),
    [((224, 224), (196, 196)), ((32, 32), (28, 28)), ((64, 48), (96, 33)), ((224, 64), (256, 112)), ((5, 7), (7, 5))],
)
def test_values_are_those_of_interpolate(source: tuple[int, int], target: tuple[int, int]) -> None:
    torch.manual_seed(0)
    frames = 3 * torch.randn(2, 3, *source)
    expected = F.interpolate(frames, target, mode="bicubic", align_corners=False)
    ours = bicubic(frames, target)
    assert ours.is_contiguous() and (ours - expected).abs().max() < 1e-5
    # Planes one after the other, or channels last as uint8 video has them.
    last = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(bicubic(last, target), ours)


def test_a_line_by_the_definition() -> None:
    """Keys' kernel with a = -0.75 at half-pixel centers, borders repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    torch.manual_seed(0)
    line = torch.randn(224, dtype=torch.float64).float()
    expected = []
    for i in range(196):
        center = (i + 0.5) * 224 / 196 - 0.5
        first = int(center // 1) - 1
        expected.append(sum(kernel(center - j) * line[min(max(j, 0), 223)].item() for j in range(first, first + 4)))
    ours = bicubic(line.expand(1, 1, 224, 224), (196, 196))[0, 0]
    # torch computes places in fp32.
    assert (ours - torch.tensor(expected)).abs().max() < 2e-4


def test_windows_are_short_and_inside() -> None:
    blocks, window, stride = _windows(224, 196)
    assert blocks > 1 and window < 224 / 4 and (blocks - 1) * stride + window == 224
    assert _windows(224, 97) == (1, 224, 0)  # a prime number of results: one block, the whole axis


def test_the_teacher_resizes_so_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        sizes.append((tuple(frames.shape), size))
        return bicubic(frames, size)

    monkeypatch.setattr(frame_tower, "bicubic", spy)
    config = tiny.tiny()
    config.teacher.patch_size, config.teacher.image_size = 14, 28
    with FakeTensorMode(), torch.device("cuda"):
        teacher = UnmaskedAlignment(config).teacher
        teacher(torch.empty(2, 4, 32, 32, 3, dtype=torch.uint8), config.mask, torch.empty(1, dtype=torch.int64))
    assert sizes == [((8, 3, 32, 32), (28, 28))]


def test_targets_are_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.tiny()
    config.teacher.patch_size, config.teacher.image_size = 14, 28
    torch.manual_seed(0)
    teacher = UnmaskedAlignment(config).teacher
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    expected = teacher(video, config.mask, torch.tensor([5]))
    plain = F.interpolate

    def matrices(x: torch.Tensor, size: tuple[int, int], mode: str, align_corners: bool) -> torch.Tensor:
        # The matrices themselves come from it.
        return plain(x, size, mode=mode, align_corners=align_corners) if x.shape[1] == 1 else bicubic(x, size)

    monkeypatch.setattr(frame_tower.F, "interpolate", matrices)
    ours = teacher(video, config.mask, torch.tensor([5]))
    assert torch.equal(ours.visible, expected.visible)
    torch.testing.assert_close(ours.targets, expected.targets, rtol=1e-4, atol=1e-5)
