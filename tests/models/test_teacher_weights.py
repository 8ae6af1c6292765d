"""The recipes' own teachers, with everything real but the download; activations as weights were trained with them."""

from pathlib import Path

import open_clip
import pytest
import torch

from umt_fast import recipe
from umt_fast.config import TeacherConfig
from umt_fast.models.teachers import load_teacher
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.weights import WeightsError

# open_clip's names of the architectures, by what its hub calls the repositories of their weights.
HUB = {
    "timm/vit_base_patch16_clip_224.openai": "ViT-B-16",
    "timm/vit_large_patch14_clip_224.openai": "ViT-L-14",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "ViT-B-16",
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The repositories that were asked for; each answers with a file of the true layout, of a row of numbers a tensor."""
    asked = []

    def download(model_id: str, filename: str | None = None, **_: object) -> str:
        asked.append(model_id)
        with torch.device("meta"):
            layout = open_clip.CLIP(**open_clip.get_model_config(HUB[model_id])).state_dict()
        torch.manual_seed(0)
        # Expanded rows are saved as rows: the file is small.
        state = {key: torch.randn(value.shape[-1:]).mul(0.02).expand(value.shape) for key, value in layout.items()}
        torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
        return str(tmp_path / "open_clip_pytorch_model.bin")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
    return asked


def empty_teacher(config: TeacherConfig) -> ClipTeacher:
    """Without its initial values, which take seconds and are replaced."""
    with torch.device("meta"):
        teacher = ClipTeacher(config, 6)
    return teacher.to_empty(device="cpu")


@pytest.mark.parametrize("name", ["stage1_k710:b16", "stage1_k710:l16", "stage2:b16", "stage2:l16"])
def test_the_default_teacher_of_each_recipe_loads(name: str, fetched: list[str], tmp_path: Path) -> None:
    config = recipe.load(name).teacher
    teacher = empty_teacher(config)
    load_teacher(teacher)
    assert fetched == [f"timm/vit_{'base_patch16' if name.endswith('b16') else 'large_patch14'}_clip_224.openai"]
    given = torch.load(tmp_path / "open_clip_pytorch_model.bin", weights_only=True)
    last = f"transformer.resblocks.{config.depth - 1}."
    for key in (f"{last}attn.in_proj_weight", f"{last}mlp.c_proj.weight", "ln_pre.bias", "proj", "class_embedding"):
        assert torch.equal(teacher.state_dict()[key], given[f"visual.{key}"]), key
    assert torch.equal(teacher.conv1.weight[:, :, 0], given["visual.conv1.weight"])
    assert teacher.positional_embedding.shape == (197, config.width)  # of 257, where the teacher sees 196 pixels
    # OpenAI's activation, x * sigmoid(1.702 x), by what a layer computes.
    mlp, x = teacher.transformer.resblocks[0].mlp, torch.randn(2, config.width)
    hidden = x @ mlp.c_fc.weight.t() + mlp.c_fc.bias
    expected = (hidden / (1 + torch.exp(-1.702 * hidden))) @ mlp.c_proj.weight.t() + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "trained_with"),
    [
        ("ViT-B-16:openai", "quick_gelu"),
        ("ViT-B-16:laion2b_s34b_b88k", "gelu"),
        ("ViT-B-16:metaclip_400m", "quick_gelu"),
        ("ViT-B-16:dfn2b", "quick_gelu"),
        ("ViT-B-16-quickgelu:metaclip_fullcc", "quick_gelu"),
        ("ViT-B-16:datacomp_xl_s13b_b90k", "gelu"),
    ],
)
def test_another_activation_is_refused_before_the_download(weights: str, trained_with: str, fetched: list[str]) -> None:
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[trained_with]
    config = TeacherConfig(weights=weights, activation=other)
    with torch.device("meta"):
        teacher = ClipTeacher(config, 1)
    with pytest.raises(WeightsError, match=f"trained with {trained_with}, .*set --teacher.activation {trained_with}$"):
        load_teacher(teacher)
    assert fetched == []


def test_weights_trained_with_gelu_load_where_the_configuration_says_so(fetched: list[str]) -> None:
    config = TeacherConfig(weights="ViT-B-16:laion2b_s34b_b88k", activation="gelu")
    teacher = empty_teacher(config)
    load_teacher(teacher)
    mlp, x = teacher.transformer.resblocks[0].mlp, torch.randn(2, 768)
    hidden = x @ mlp.c_fc.weight.t() + mlp.c_fc.bias
    expected = (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) @ mlp.c_proj.weight.t() + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    assert fetched == ["laion/CLIP-ViT-B-16-laion2B-s34B-b88K"]


def test_without_a_network_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", none)
    config = TeacherConfig()
    with torch.device("meta"):
        teacher = ClipTeacher(config, 1)
    with pytest.raises(WeightsError, match="could not fetch ViT-B-16:openai .*--teacher.weights PATH"):
        load_teacher(teacher)
