"""The stage-2 objective: packed steps, the alignment to CLIP's image embedding, training without masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from tests.small_models import small_text
from umt_fast.config import (
    AlignConfig,
    ConfigError,
    MaskConfig,
    RunConfig,
    Stage2Config,
    Stage2Losses,
    TeacherConfig,
    VitConfig,
)
from umt_fast.models.vit import Packing, path_factors
from umt_fast.tasks.video_text import VideoTextPretraining


def small(**changes: object) -> Stage2Config:
    values = {
        "run": RunConfig(dtype="fp32"),
        "student": VitConfig(width=32, depth=3, num_heads=2, image_size=32, patch_size=8, num_frames=2, drop_path=0.0),
        "teacher": TeacherConfig(
            width=32, depth=3, num_heads=2, patch_size=8, image_size=32, output_dim=12, weights="untrained"
        ),
        "text": small_text(),
        "mask": MaskConfig(ratio=0.7),
        "align": AlignConfig(num_layers=2),
        "bert": "untrained",
        "embed_dim": 12,
        "max_length": 8,
    }
    return Stage2Config(**(values | changes))


def objective(config: Stage2Config) -> VideoTextPretraining:
    torch.manual_seed(1)
    return VideoTextPretraining(config, mask_id=4, special=(0, 2)).train()


def batch_of(frames: int, count: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(3, length + 1, (count, 1), generator=generator)
    return {
        "video": torch.randint(256, (count, frames, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "ids": torch.randint(5, 50, (count, length), generator=generator) * mask,
        "mask": mask,
        "sample": torch.randint(0, 3, (count,), generator=generator),
    }


def packed_batch() -> dict[str, Tensor]:
    """Three clips with texts of up to 7 tokens and four images with shorter ones; some rows share their sample."""
    clips, images = batch_of(2, 3, 7, 0), batch_of(1, 4, 5, 1)
    return clips | {f"image_{name}": value for name, value in images.items()}


def gradients(module: VideoTextPretraining, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoint_blocks", [0, 2])
def test_a_packed_step_is_the_mean_of_two_steps(checkpoint_blocks: int) -> None:
    """Same masks, hidden words and negatives: the losses of each kind and the sum of the gradients."""
    config = small(co_training="packed", losses=Stage2Losses(vision_projection=0.5, vtm=2.0))
    config.student.checkpoint_blocks = checkpoint_blocks
    module = objective(config)
    kinds = module.prepare(packed_batch(), torch.tensor([5]))
    assert [pairs.video.shape[1] for pairs in kinds] == [2, 1]
    assert [pairs.visible.shape[1] for pairs in kinds] == [10, 8]
    negatives = [(torch.tensor([1, 2, 0]),) * 2, (torch.tensor([3, 2, 1, 0]), torch.tensor([1, 0, 3, 2]))]
    kinds = [pairs._replace(negatives=pair) for pairs, pair in zip(kinds, negatives, strict=True)]
    packed = module.losses(kinds)
    alone = [module.losses([pairs]) for pairs in kinds]
    assert packed.keys() == {"loss", "vtc", "vtm", "mlm", "uta", "vision_projection"}
    for name, value in packed.items():
        torch.testing.assert_close(2 * value, alone[0][name] + alone[1][name], rtol=1e-5, atol=1e-6, msg=name)
    first, second = (gradients(module, found["loss"]) for found in alone)
    ours = gradients(module, packed["loss"])
    assert ours.keys() == first.keys() == second.keys()
    largest = max(value.norm() for value in ours.values())
    for name, value in ours.items():
        expected = first[name] + second[name]
        assert (2 * value - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * largest, name


def test_each_kind_of_a_packed_step_draws_its_own() -> None:
    """With equal clips in both places the masks still differ."""
    clips = batch_of(2, 3, 7, 0)
    module = objective(small())
    same = clips | {f"image_{name}": value for name, value in clips.items()}
    first, second = module.prepare(same, torch.tensor([5]))
    assert not torch.equal(first.visible, second.visible)


def test_packed_attention_is_called_once_for_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = objective(small(co_training="packed")), []
    whole = kernels.attention_varlen
    monkeypatch.setattr(
        kernels, "attention_varlen", lambda *a, **k: calls.append(a[3].diff().tolist()) or whole(*a, **k)
    )
    module(packed_batch(), torch.tensor([5]))
    # 16 tokens a frame: of two frames 2 x 5 are seen, of an image 8.
    assert calls == [[10] * 3 + [8] * 4] * 3


def test_drop_path_drops_whole_sequences() -> None:
    torch.manual_seed(0)
    packing = Packing.of([torch.zeros(40, 3, 5), torch.zeros(60, 2, 5)])
    assert packing.totals.tolist() == [*range(0, 120, 3), *range(120, 241, 2)] and packing.totals.dtype == torch.int32
    dropped = torch.ones(240, 5) * path_factors(torch.ones(240, 5), 0.25, packing)
    for part in packing.split(dropped):
        assert (part == part[:, :1, :1]).all()
        assert part.unique().tolist() == pytest.approx([0, 4 / 3])


def test_clips_are_counted_and_credited_with_their_images() -> None:
    config = small(co_training="packed")
    both = [VideoTextPretraining.flops_of(config, image=image) for image in (False, True)]
    assert objective(config).flops_per_clip() == sum(both) / 2 and both[1] < both[0]


def test_alignment_to_the_image_embedding() -> None:
    """1 - cosine of the projected clip and CLIP's own embedding: class token, last block, norm, projection."""
    module = objective(small(losses=Stage2Losses(vtc=0, vtm=0, mlm=0, uta=0, vision_projection=1.0)))
    batch = batch_of(2, 3, 7, 0)
    (pairs,) = module.prepare(batch, torch.tensor([5]))
    teacher = module.teacher
    with torch.no_grad():
        x = teacher.embed(batch["video"])
        for block in teacher.blocks:
            x = block(x)
        own = F.normalize(teacher.ln_post(x[:, 0]) @ teacher.proj, dim=-1).view(3, 2, 12).mean(1)
    torch.testing.assert_close(pairs.image, own)
    model = module.model
    tokens, _ = model.vision_encoder.embed(pairs.video, pairs.visible)
    clip = model.vision_proj(model.vision_encoder.pool(tokens)[:, 0])
    expected = 1 - (F.normalize(clip, dim=-1) * F.normalize(own, dim=-1)).sum(-1).mean()
    found = module.losses([pairs])
    torch.testing.assert_close(found["loss"], expected)
    assert found.keys() == {"loss", "vision_projection"}
    found["loss"].backward()
    assert model.vision_proj.weight.grad.any() and model.text_proj.weight.grad is None
    with pytest.raises(ConfigError, match="embed_dim 10"):
        small(embed_dim=10, losses=Stage2Losses(vision_projection=1.0))


@pytest.mark.parametrize("kind", ["semantic", "tube", "random"])
def test_training_without_masks_sees_every_token(kind: str) -> None:
    mask = MaskConfig(kind=kind, ratio=0.0)
    module = objective(small(mask=mask, image_mask=mask))
    (pairs,) = module.prepare(batch_of(2, 3, 7, 0), torch.tensor([5]))
    assert torch.equal(pairs.visible, torch.arange(32, dtype=torch.int32).expand(3, -1))
    features, _ = module.teacher.features(pairs.video)
    torch.testing.assert_close(pairs.targets, features, rtol=1e-4, atol=1e-5)
    found = module.losses([pairs])
    every = module.model.vision_encoder.embed(pairs.video, heads=True)[1]
    tower = module.model.vision_encoder
    aligned = kernels.align_loss(every, features, tower.norm_weight, tower.norm_bias, eps=1e-5)
    torch.testing.assert_close(found["uta"], aligned.detach(), rtol=1e-4, atol=1e-5)
    found["loss"].backward()


def test_packed_needs_joint_attention() -> None:
    vit = VitConfig(width=32, depth=3, num_heads=2, image_size=32, patch_size=8, num_frames=2, attention="spatial")
    with pytest.raises(ConfigError, match="student.attention 'joint'"):
        small(co_training="packed", student=vit)
