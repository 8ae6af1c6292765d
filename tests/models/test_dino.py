"""The DINO teacher beside timm's own ViT: features, attention and weights files of DINO's and DINOv2's layouts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import AlignConfig, ConfigError, MaskConfig, TeacherConfig
from umt_fast.models.teachers import build_teacher
from umt_fast.models.weights import WeightsError, save_state

timm = pytest.importorskip("timm")
SIZES = {"width": 64, "depth": 3, "num_heads": 4, "patch_size": 8, "image_size": 32, "output_dim": 64}


def vit(image_size: int = 32, layer_scale: float | None = None) -> torch.nn.Module:
    """timm's ViT with random weights, none of them at its initial value."""
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=image_size, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=0, init_values=layer_scale
    ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    # Tokens so small that the eps of LayerNorms shows: DINO's is 1e-6, CLIP's 1e-5.
    for parameter in (model.cls_token, model.pos_embed, model.patch_embed.proj.weight, model.patch_embed.proj.bias):
        parameter.data = 0.02 * parameter.data
    return model


def dino(weights: object, **changes: object) -> TeacherConfig:
    return TeacherConfig(**(SIZES | {"kind": "dino", "activation": "gelu", "weights": str(weights)} | changes))


@torch.no_grad()
def expected(model: torch.nn.Module, frames: Tensor, layers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normed patch tokens of the last blocks (layers, R, L, C), the class token's attention in the last block over all
    patches (R, L), mean over heads, and the normed class tokens (R, C), by timm's own forward."""
    seen = {}
    last = model.blocks[-1].attn
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda module, inputs, out: seen.update(attention=out))
    outputs = model.get_intermediate_layers(frames, layers, norm=True)
    everything = model.forward_features(frames)
    return torch.stack(outputs), seen["attention"].mean(1)[:, 0, 1:], everything[:, 0]


@pytest.fixture(params=[None, 0.3], ids=["DINO", "DINOv2 with LayerScale"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return vit(layer_scale=request.param)


def test_it_computes_what_timm_computes(model: torch.nn.Module, tmp_path: Path) -> None:
    state = model.state_dict() | {"mask_token": torch.ones(1, 64), "head.weight": torch.ones(5, 64)}
    save_state(state, tmp_path / "vit.pth")
    teacher = build_teacher(dino(tmp_path / "vit.pth"), 2)
    video = torch.randn(2, 3, 3, 32, 32)
    frames = video.transpose(1, 2).flatten(0, 1)
    features, attention, first = expected(model, frames, 2)
    found, scores = teacher.features(video)
    torch.testing.assert_close(found, features.view(2, 2, 3 * 16, 64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, attention, rtol=1e-5, atol=1e-5)
    for kind in ("semantic", "tube", "random"):
        out = teacher(video, MaskConfig(kind=kind, ratio=0.5), torch.tensor([3]), with_image=True)
        picked = features.view(2, 2, 48, 64).gather(2, out.visible.long()[None, :, :, None].expand(2, -1, -1, 64))
        torch.testing.assert_close(out.targets, picked, rtol=1e-4, atol=1e-5)
        mean = F.normalize(first, dim=-1).view(2, 3, 64).mean(1)
        torch.testing.assert_close(out.image, mean, rtol=1e-4, atol=1e-5)


def test_its_attention_draws_the_mask(tmp_path: Path) -> None:
    """One token of each frame: how often it is each of the sixteen, beside timm's attention."""
    model = vit()
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight[:128] *= 10.0
    save_state(model.state_dict(), tmp_path / "vit.safetensors")
    teacher = build_teacher(dino(tmp_path / "vit.safetensors"), 1)
    torch.manual_seed(1)
    frame = torch.randn(1, 3, 1, 32, 32)
    likely = expected(model, frame[:, :, 0], 1)[1][0]
    likely = likely / likely.sum()
    assert likely.max() > 4 * likely.min(), "nearly even attention would show nothing"
    out = teacher(frame.expand(2000, -1, -1, -1, -1), MaskConfig(ratio=0.95), torch.tensor([5]), with_targets=False)
    found = out.visible.flatten().bincount(minlength=16) / 2000
    assert (found - likely).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_uint8_clips_are_normalized_as_its_own_training_did(tmp_path: Path) -> None:
    model = vit()
    save_state(model.state_dict(), tmp_path / "vit.pth")
    teacher = build_teacher(dino(tmp_path / "vit.pth"), 1)
    video = torch.randint(256, (1, 2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    frames = ((video[0] / 255 - mean) / std).permute(0, 3, 1, 2)
    features, _, _ = expected(model, frames, 1)
    torch.testing.assert_close(teacher.features(video)[0][0, 0], features[0].flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_table_of_another_resolution_is_resized(tmp_path: Path) -> None:
    model = vit(image_size=64)
    save_state(model.state_dict(), tmp_path / "vit.pth")
    teacher = build_teacher(dino(tmp_path / "vit.pth"), 1)
    grid = model.pos_embed[:, 1:].view(1, 8, 8, 64).permute(0, 3, 1, 2)
    small = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher.positional_embedding, torch.cat([model.pos_embed[:, :1], small], 1)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "quick_gelu"}, "teacher.activation is 'quick_gelu'.*set --teacher.activation gelu"),
        ({"output_dim": 32}, "teacher.output_dim is 32.*set --teacher.output_dim 64"),
        ({"kind": "dinno"}, "teacher.kind: unknown teacher kind 'dinno'; did you mean 'dino'. Known: clip, dino"),
    ],
)
def test_settings_it_cannot_have(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_teacher(dino("untrained", **changes), 1)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    save_state({"conv1.weight": torch.ones(2)}, tmp_path / "clip.pth")
    with pytest.raises(WeightsError, match="no ViT in timm's layout: it has no cls_token"):
        build_teacher(dino(tmp_path / "clip.pth"), 1)
    save_state(vit().state_dict() | {"reg_token": torch.ones(1, 4, 64)}, tmp_path / "registers.pth")
    with pytest.raises(WeightsError, match="has register tokens"):
        build_teacher(dino(tmp_path / "registers.pth"), 1)
    with pytest.raises(WeightsError, match="read from a local file"):
        build_teacher(dino("vit_small_patch16_224:dino"), 1)
    deeper = {key: value for key, value in vit().state_dict().items() if not key.startswith("blocks.2.")}
    save_state(deeper, tmp_path / "shallow.pth")
    with pytest.raises(WeightsError, match="missing: transformer.resblocks.2"):
        build_teacher(dino(tmp_path / "shallow.pth"), 1)


def test_both_stages_train_with_it(tmp_path: Path, tiny_list: Path) -> None:
    from tests.assets import tiny
    from umt_fast.tasks.pretraining import UnmaskedAlignment
    from umt_fast.tasks.video_text import VideoTextPretraining

    save_state(vit().state_dict(), tmp_path / "vit.pth")
    teacher = dino(tmp_path / "vit.pth")
    first, second = tiny.tiny(), tiny.captions()
    for config in (first, second):
        config.student.patch_size, config.teacher, config.align = 8, teacher, AlignConfig(num_layers=2)
    second.losses.vision_projection, second.embed_dim = 0.5, 64
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    texts = {"ids": torch.randint(4, 16, (2, 6)), "mask": torch.ones(2, 6, dtype=torch.bool), "sample": torch.arange(2)}
    for objective in (
        UnmaskedAlignment(first).train(),
        VideoTextPretraining(second, mask_id=3, special=(0, 1, 2)).train(),
    ):
        loss = objective({"video": video} | texts, torch.tensor([1]))["loss"]
        loss.backward()
        assert torch.isfinite(loss) and objective.flops_per_clip() > 0
        assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    second.losses.text_projection = 1.0
    with pytest.raises(ConfigError, match="DINO has none; set it to 0"):
        VideoTextPretraining(second, mask_id=3, special=(0, 1, 2))


def test_flops_are_those_of_the_products_that_run(tmp_path: Path) -> None:
    from tests.assets import tiny
    from tests.objectives.test_unaligned import count_of
    from umt_fast.tasks.pretraining import UnmaskedAlignment

    config = tiny.tiny()
    config.student.patch_size, config.teacher = 8, dino("untrained")
    batch = {"video": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)}
    module = UnmaskedAlignment(config).train()
    assert module.flops_per_clip() * 2 == pytest.approx(count_of(module, batch), rel=1e-3)
