"""Stage 2 with losses.uta 0, its temperature, its samples, and the other switches of the objective."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives.test_stage2 import batch_of, objective, small
from umt_fast.config import AlignConfig, MaskConfig, Stage2Config, Stage2Losses
from umt_fast.engine.distributed import Ranks
from umt_fast.plan import work_of
from umt_fast.tasks import pretraining as unmasked_alignment
from umt_fast.tasks import task_of
from umt_fast.tasks import video_text as stage2

UNALIGNED = Stage2Losses(uta=0.0)


def test_without_alignment_no_teacher_is_built_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*a: object, **k: object) -> None:
        raise AssertionError("no loss reads the teacher")

    monkeypatch.setattr(stage2, "build_teacher", never)
    module = objective(small(losses=UNALIGNED))
    assert module.teacher is None
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(AssertionError, match="reads the teacher"):
        objective(small())


@pytest.mark.parametrize("packed", [False, True])
def test_without_alignment_every_token_is_seen_and_every_frame_pooled(packed: bool) -> None:
    """The contrastive loss by hand: all tokens through the tower, each frame's mean, cosines averaged over frames."""
    module = objective(small(losses=UNALIGNED, co_training="packed" if packed else "alternating"))
    batch = batch_of(2, 3, 7, 0)
    images = {f"image_{key}": value for key, value in batch_of(1, 4, 5, 1).items()}
    clips, *rest = module.prepare(batch | images if packed else batch, torch.tensor([5]))
    assert torch.equal(clips.visible.long(), torch.arange(32).expand(3, -1)) and clips.targets is None
    for pictures in rest:
        assert torch.equal(pictures.visible.long(), torch.arange(16).expand(4, -1))
    found = module.losses([clips, *rest])
    assert found.keys() == {"loss", "vtc", "vtm", "mlm"}
    found["loss"].backward()
    assert packed == bool(rest)
    if packed:
        return
    model = module.model
    features = model.vision_encoder.encoder(clips.video, None, 1)
    tokens = model.vision_encoder.encoder.norm(features[-1])
    frames = torch.stack([model.vision_encoder.pool_norm(tokens[:, 16 * t : 16 * t + 16].mean(1)) for t in range(2)], 1)
    frames = F.normalize(model.vision_proj(frames), dim=-1)
    text = F.normalize(model.text_proj(model.text_encoder.encode(clips.ids, clips.mask)[:, 0]), dim=-1)
    sim = sum(frames[:, t] @ text.t() for t in range(2)) / 2 / model.temp
    same = (clips.index[:, None] == clips.index[None]).float()
    same = same / same.sum(1, keepdim=True)
    expected = -((sim.log_softmax(1) * same).sum(1).mean() + (sim.t().log_softmax(1) * same).sum(1).mean()) / 2
    torch.testing.assert_close(found["vtc"], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, count", [("random", 10), ("tube", 10)])
def test_masks_that_need_no_teacher_are_drawn_without_one(kind: str, count: int) -> None:
    module = objective(small(losses=UNALIGNED, mask=MaskConfig(kind=kind, ratio=0.7)))
    assert module.teacher is None
    (pairs,) = module.prepare(batch_of(2, 3, 7, 0), torch.tensor([5]))
    assert pairs.visible.shape == (3, count) and pairs.pooled == 1
    (other,) = module.prepare(batch_of(2, 3, 7, 0), torch.tensor([6]))
    assert not torch.equal(pairs.visible, other.visible)
    module.losses([pairs])["loss"].backward()


def test_the_image_embedding_alone_takes_masks_but_no_targets() -> None:
    module = objective(small(losses=Stage2Losses(uta=0.0, vision_projection=1.0)))
    (pairs,) = module.prepare(batch_of(2, 3, 7, 0), torch.tensor([5]))
    assert pairs.visible.shape == (3, 10) and pairs.targets is None and pairs.image is not None


def test_tubes_pool_every_frame_and_other_masks_the_clip() -> None:
    tube, semantic = MaskConfig(kind="tube", ratio=0.7), MaskConfig(ratio=0.7)
    pooled = {
        name: objective(small(mask=mask, image_mask=image)).prepare(batch_of(2, 3, 7, 0), torch.tensor([5]))[0].pooled
        for name, mask, image in (("both", tube, tube), ("clips", tube, semantic), ("none", semantic, semantic))
    }
    assert pooled == {"both": 2, "clips": 1, "none": 1}


def test_a_plan_without_alignment_holds_no_teacher_and_all_tokens() -> None:
    aligned, alone = work_of(small()), work_of(small(losses=UNALIGNED))
    assert aligned.frozen > 0 and alone.frozen == 0
    assert alone.activation_bytes / aligned.activation_bytes == pytest.approx(32 / 10)


@pytest.mark.parametrize("start, bound", [(0.0001, 0.001), (2.0, 0.5)])
def test_a_temperature_out_of_bounds_comes_back_and_still_learns(start: float, bound: float) -> None:
    module = objective(small())
    with torch.no_grad():
        module.model.temp.fill_(start)
    module(batch_of(2, 3, 7, 0), torch.tensor([5]))["loss"].backward()
    assert module.model.temp.item() == pytest.approx(bound)
    assert module.model.temp.grad.item() != 0
    gradient = module.model.temp.grad.clone()
    module(batch_of(2, 3, 7, 0), torch.tensor([5]))["loss"].backward()  # a second micro-step adds as much
    torch.testing.assert_close(module.model.temp.grad, 2 * gradient, rtol=0.2, atol=0)


@pytest.mark.compile
@pytest.mark.slow
def test_the_temperature_is_bounded_within_a_compiled_step() -> None:
    module = objective(small())
    with torch.no_grad():
        module.model.temp.fill_(2.0)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        module.zero_grad()
        run(batch_of(2, 3, 7, 0), torch.tensor([5]))["loss"].backward()
        assert module.model.temp.item() == 0.5 and module.model.temp.grad.item() != 0
        with torch.no_grad():
            module.model.temp.fill_(3.0)


def test_stage_2_aligns_as_align_says() -> None:
    """mse over unit vectors of D channels is the default loss / D; unnormalized ones are another number."""
    default, mse, raw = (
        objective(small(align=AlignConfig(num_layers=2, **options)))
        for options in ({}, {"loss": "mse"}, {"normalize": "none", "loss": "smooth_l1"})
    )
    batch, seed = batch_of(2, 3, 7, 0), torch.tensor([5])
    found = [module(batch, seed)["uta"] for module in (default, mse, raw)]
    torch.testing.assert_close(found[1] * 12, found[0], rtol=1e-4, atol=1e-6)
    assert abs(found[2] - found[1]) > 0.05


def captions_config(tmp_path: Path, **changes: object) -> Stage2Config:
    import json

    from PIL import Image

    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 10, 200)).save(tmp_path / f"{number}.png")
    rows = [("0.png", "red dog"), ("1.png", "blue cat"), ("0.png", "big dog"), ("1.png", "small cat")]
    (tmp_path / "list.json").write_text(json.dumps([{"image": file, "caption": text} for file, text in rows]))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "big", "small", "dog", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = small(images=(f"{tmp_path}/list.json={tmp_path}",), tokenizer=str(tmp_path), **changes)
    config.run.batch_size, config.data.workers = 4, 0
    return config


@pytest.mark.parametrize("rule, expected", [("row", {0, 1, 2, 3}), ("media", {0, 1})])
def test_captions_of_one_picture_are_rows_apart_unless_asked(tmp_path: Path, rule: str, expected: set[int]) -> None:
    config = captions_config(tmp_path, same_sample=rule)
    assert rule == "media" or captions_config(tmp_path).same_sample == rule
    loader = task_of(config).loader(config, Ranks(0, 1, torch.device("cpu")))
    batch = next(iter(loader))
    assert set(batch["sample"].tolist()) == expected
    if rule == "row":
        assert torch.equal(batch["sample"], batch["index"])


def count_of(module: torch.nn.Module, batch: dict[str, Tensor]) -> float:
    """Matrix-product FLOPs of a step, counted by torch in the products that really run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import kernels

    # The fused attention of a CPU is no product that torch counts; its definition is two.
    with kernels.force_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(batch, torch.tensor([5]))["loss"].backward()
    return counter.get_total_flops()


CASES = {
    "default": {},
    # Of 16 tokens a frame 9 are hidden, 18 of a clip; of the clip's 32 at once it would be 19.
    "odd ratio": {"mask": MaskConfig(ratio=0.6), "image_mask": MaskConfig(ratio=0.41)},
    "tube": {"mask": MaskConfig(kind="tube", ratio=0.6)},
    "tubes": {"mask": MaskConfig(kind="tube", ratio=0.6), "image_mask": MaskConfig(kind="tube")},
    "random": {"mask": MaskConfig(kind="random", ratio=0.33), "image_mask": MaskConfig(kind="random", ratio=0.41)},
    "unaligned": {"losses": UNALIGNED},
    "projection": {"losses": Stage2Losses(uta=0.0, vision_projection=1.0)},
    "contrast alone": {"losses": Stage2Losses(vtm=0.0, mlm=0.0)},
}


@pytest.mark.parametrize("image", [False, True], ids=["clips", "images"])
@pytest.mark.parametrize("name", CASES)
def test_flops_of_stage_2_are_those_of_the_products_that_run(name: str, image: bool) -> None:
    config = small(**CASES[name])
    config.run.batch_size = 4
    batch = batch_of(1 if image else 2, 4, 8, 0)
    batch["mask"][:] = True
    count = count_of(objective(config), batch)
    # The batch's similarities, which are left out: two products of 4 x 4 x 12, forward and backward.
    similarities = 3 * 2 * 2 * 4 * 4 * 12
    assert stage2.VideoTextPretraining.flops_of(config, image=image) * 4 == pytest.approx(
        count - similarities, rel=1e-3
    )


@pytest.mark.parametrize("kind, ratio", [("semantic", 0.8), ("semantic", 0.33), ("tube", 0.33), ("random", 0.33)])
@pytest.mark.parametrize("tubelet", [1, 2])
def test_flops_of_stage_1_are_those_of_the_products_that_run(kind: str, ratio: float, tubelet: int) -> None:
    from tests.assets.tiny import tiny

    config = tiny()
    config.student.image_size = config.teacher.image_size = 64
    config.student.tubelet_size, config.mask = tubelet, MaskConfig(kind=kind, ratio=ratio)
    module = unmasked_alignment.UnmaskedAlignment(config).train()
    batch = {"video": torch.randint(256, (2, 4, 64, 64, 3), dtype=torch.uint8)}
    assert unmasked_alignment.UnmaskedAlignment.flops_of(config) * 2 == pytest.approx(count_of(module, batch), rel=1e-3)
