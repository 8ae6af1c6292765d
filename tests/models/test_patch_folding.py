"""The frozen tower's patch embedding of uint8 pixels as they are, once compute_in has put ImageNet's statistics into it."""

import copy

import pytest
import torch
from torch import Tensor

from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.teachers.dino import DinoTeacher
from umt_fast.models.teachers.frame_tower import FrameTower

SIZES = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32, "weights": "untrained"}


def tower(kind: type[FrameTower]) -> FrameTower:
    torch.manual_seed(0)
    options = {"output_dim": 16} if kind is ClipTeacher else {"output_dim": 32, "activation": "gelu"}
    made = kind(TeacherConfig(**SIZES, **options), 1, tubelet_size=2)
    with torch.no_grad():
        if made.conv1.bias is not None:
            made.conv1.bias.normal_()
        # As trained filters have, a mean that the pixels' mean makes large.
        made.conv1.weight.add_(torch.randn(32, 1, 1, 1, 1) / 100)
    return made


def normalized(video: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((video.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("kind", [ClipTeacher, DinoTeacher])
def test_it_is_at_least_as_exact_as_normalized_pixels(kind: type[FrameTower]) -> None:
    video = torch.randint(256, (4, 4, 32, 32, 3), dtype=torch.uint8)
    exact = tower(kind)
    exact.ln_pre = torch.nn.Identity()
    with torch.no_grad():
        truth = copy.deepcopy(exact).double().embed(normalized(video))
        rounded = exact.compute_in(torch.bfloat16)
        folded = rounded.embed(video)
        plain = rounded.embed(normalized(video).bfloat16())
    errors = [(values.double() - truth).norm() / truth.norm() for values in (folded, plain)]
    assert folded.dtype == torch.bfloat16 and rounded.patch_rows is not None
    assert 0 < errors[0] <= 1.02 * errors[1] and errors[1] < 0.01, errors


def test_weights_that_are_loaded_later_count() -> None:
    video = torch.randint(256, (1, 2, 32, 32, 3), dtype=torch.uint8)
    first = tower(ClipTeacher).compute_in(torch.bfloat16)
    torch.manual_seed(1)
    other = ClipTeacher(TeacherConfig(**SIZES, output_dim=16), 1, tubelet_size=2)
    assert "patch_rows" not in first.state_dict()
    first.load_state_dict(other.state_dict())
    expected = other.compute_in(torch.bfloat16).embed(video)
    torch.testing.assert_close(first.embed(video), expected, rtol=0.05, atol=0.05)
    assert first.patch_rows is None
    first.compute_in(torch.bfloat16)
    torch.testing.assert_close(first.embed(video), expected, rtol=0.05, atol=0.05)
