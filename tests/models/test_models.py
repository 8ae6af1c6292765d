"""Official sizes and layouts, masks, the lean teacher, weights in and out."""

import copy
from pathlib import Path

import pytest
import torch

from umt_fast.config import (
    AlignConfig,
    ConfigError,
    MaskConfig,
    RunConfig,
    Stage1Config,
    TeacherConfig,
    TextConfig,
    VitConfig,
)
from umt_fast.masking import TokenGrid, mask_named, num_visible
from umt_fast.models.classifier import Classifier
from umt_fast.models.sizes import student_size, teacher_size
from umt_fast.models.student import Student
from umt_fast.models.teachers import load_teacher
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.teachers.frame_tower import Mlp
from umt_fast.models.text import TextEncoder
from umt_fast.models.video_text import VideoText
from umt_fast.models.vit import Block, VisionTransformer, path_factors, resized_table, sinusoid_table
from umt_fast.models.vit import Mlp as WideMlp
from umt_fast.models.weights import (
    WeightsError,
    fit,
    load_bert,
    load_encoder,
    load_student,
    load_video_text,
    save_state,
)
from umt_fast.tasks.pretraining import UnmaskedAlignment

SMALL = VitConfig(width=32, depth=3, num_heads=2, image_size=32, num_frames=4, drop_path=0.0)
TEACHER = TeacherConfig(
    width=32, depth=3, num_heads=2, patch_size=16, image_size=32, output_dim=16, weights="untrained"
)


def counts(module: torch.nn.Module) -> tuple[int, int]:
    state = module.state_dict()
    return len(state), sum(tensor.numel() for tensor in state.values())


def test_official_tensor_and_parameter_counts() -> None:
    with torch.device("meta"):
        assert counts(Student(student_size("b16"), 6, 512)) == (184, 88_005_888)
        assert counts(Student(student_size("l16"), 6, 768)) == (340, 307_806_720)
        assert counts(ClipTeacher(teacher_size("clip_b16"), 6)) == (152, 86_192_640)
        assert counts(ClipTeacher(teacher_size("clip_l14"), 6)) == (296, 303_904_768)
        assert counts(Classifier(student_size("b16"), 400)) == (162, 85_944_976)
        assert counts(Classifier(student_size("l16"), 400)) == (318, 303_484_304)


def test_work_of_a_clip_is_the_known_one() -> None:
    """455 and 1590 GFLOP a clip: teacher forward, student forward and backward."""
    base = Stage1Config()
    assert UnmaskedAlignment.flops_of(base) == pytest.approx(455e9, rel=0.03)
    large = Stage1Config(student=student_size("l16"), teacher=teacher_size("clip_l14"))
    assert UnmaskedAlignment.flops_of(large) == pytest.approx(1590e9, rel=0.03)


def test_a_table_for_more_frames_and_pixels() -> None:
    """Time is linear with half-pixel centers; space is PyTorch's bicubic (a = -0.75), which bends ramps by 0.05."""
    x = torch.arange(14.0)
    table = torch.stack([x.repeat(14), x.repeat_interleave(14)], 1).repeat(2, 1)
    table[196:] += 100
    wide = resized_table(table, TokenGrid(2, 14, 14), TokenGrid(4, 28, 28)).view(4, 28, 28, 2)
    inside = wide[:, 6:-6, 6:-6]
    expected = (torch.arange(6, 22) + 0.5) / 2 - 0.5
    torch.testing.assert_close(inside[0, 0, :, 0], expected, atol=0.05, rtol=0)
    torch.testing.assert_close(inside[0, :, 3, 1], expected, atol=0.05, rtol=0)
    torch.testing.assert_close(inside[:, 4, 4, 0] - inside[0, 4, 4, 0], torch.tensor([0.0, 25.0, 75.0, 100.0]))


def test_the_grid_that_a_position_table_is_made_for() -> None:
    """Pre-training has its own, fine-tuning the official pre-training's; either takes another."""
    longer = VitConfig(width=32, depth=1, num_heads=2, image_size=64, num_frames=8)
    own, made = sinusoid_table(128, 32), sinusoid_table(16, 32)
    assert torch.equal(VisionTransformer(longer).position, own)
    automatic = Classifier(longer, 3).position
    assert torch.equal(automatic, resized_table(sinusoid_table(1568, 32), TokenGrid(8, 14, 14), TokenGrid(8, 4, 4)))
    fourteen = VitConfig(width=32, depth=1, num_heads=2, image_size=224, patch_size=14, num_frames=8)
    assert torch.equal(Classifier(fourteen, 3).position, sinusoid_table(2048, 32))
    longer.position_grid = (4, 2, 2)
    resized = Classifier(longer, 3).position
    assert torch.equal(resized, resized_table(made, TokenGrid(4, 2, 2), TokenGrid(8, 4, 4)))
    assert torch.equal(resized, VisionTransformer(longer).position) and not torch.equal(resized, own)
    longer.position_grid = longer.grid
    assert torch.equal(Classifier(longer, 3).position, own)


def test_visible_counts_round_as_the_official_code() -> None:
    grid = TokenGrid(8, 14, 14)
    assert num_visible(196, 0.8) == 40 and num_visible(196, 0.5) == 98
    assert mask_named("semantic").count(grid, 0.8) == mask_named("tube").count(grid, 0.8) == 320
    assert mask_named("random").count(grid, 0.8) == 1568 - int(1568 * 0.8) == 314


def test_uniform_masks() -> None:
    grid, seed = TokenGrid(4, 5, 5), torch.tensor([2])
    random = mask_named("random").draw(3, grid, 0.8, seed)
    assert random.shape == (3, 20) and (random.diff(dim=1) > 0).all() and random.max() < 100
    assert not torch.equal(random[0], random[1])
    tube = mask_named("tube").draw(3, grid, 0.8, seed).view(3, 4, 5) % 25
    assert (tube == tube[:, :1]).all() and not torch.equal(tube[0], tube[1])


@pytest.mark.parametrize("kind", ["semantic", "random", "tube"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_lean_teacher_equals_the_full_one_where_it_looks(kind: str, num_layers: int) -> None:
    torch.manual_seed(0)
    teacher = ClipTeacher(TEACHER, num_layers)
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    out = teacher(video, MaskConfig(kind=kind, ratio=0.5), torch.tensor([1]))
    full, _ = teacher.features(video)
    picked = full.gather(2, out.visible.long()[None, :, :, None].expand(num_layers, -1, -1, 16))
    torch.testing.assert_close(out.targets, picked, rtol=1e-4, atol=1e-5)


def test_spatial_attention_keeps_frames_apart() -> None:
    torch.manual_seed(0)
    video = torch.randn(1, 3, 4, 32, 32)
    changed = video.clone()
    changed[:, :, 2] += 1
    for attention, mixes in (("spatial", False), ("joint", True)):
        config = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=4, attention=attention)
        model = VisionTransformer(config).eval()
        before, after = (model(clip)[0].view(4, 4, 32) for clip in (video, changed))
        assert torch.equal(before[0], after[0]) != mixes
        assert not torch.equal(before[2], after[2])


def test_visible_tokens_are_those_of_the_whole_embedding() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(VitConfig(width=32, depth=1, num_heads=2, image_size=32, num_frames=4)).eval()

    class Nothing(torch.nn.Module):
        def draw(self, x: torch.Tensor, packing: None) -> None:
            return None

        def forward(self, x: torch.Tensor, packing: None, factors: None) -> torch.Tensor:
            return x

    model.blocks = torch.nn.ModuleList([Nothing()])
    video = torch.randint(256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    visible = torch.tensor([[1, 6, 15]], dtype=torch.int32)
    (every,), (some,) = model(video), model(video, visible)
    torch.testing.assert_close(some, every[:, [1, 6, 15]])


def test_drop_path_drops_whole_samples_at_its_rate() -> None:
    torch.manual_seed(0)
    out = torch.ones(20000, 2, 3) * path_factors(torch.ones(20000, 2, 3), 0.3)
    assert set(out.unique().tolist()) == {0.0, 1 / 0.7000000000000001} or len(out.unique()) == 2
    kept = (out[:, 0, 0] > 0).float().mean().item()
    assert abs(kept - 0.7) < 4 * (0.21 / 20000) ** 0.5
    assert (out == out[:, :1, :1]).all() and out.mean().item() == pytest.approx(1, abs=0.03)
    block = Block(SMALL, 0.3)
    assert block.eval().draw(out) is None and Block(SMALL, 0.0).train().draw(out) is None
    assert len(block.train().draw(out)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_with_its_factors_in_the_products_is_as_exact_as_its_formula(dtype: torch.dtype) -> None:
    """Also where a large bias cancels most of the product; without gradients, as the frozen tower runs."""
    torch.manual_seed(0)
    mlp, x = Mlp(64, "quick_gelu"), torch.randn(3, 50, 64).to(dtype)
    torch.nn.init.normal_(mlp.c_fc.bias, std=4)
    exact = copy.deepcopy(mlp.to(dtype)).double()
    formula, truth = mlp(x).detach(), exact(x.double()).detach()
    with torch.no_grad():
        ours = mlp(x)
    assert ours.dtype == dtype and not torch.equal(ours, formula)
    assert (ours.double() - truth).norm() <= 1.5 * (formula.double() - truth).norm()


def test_activation_checkpointing_changes_no_gradient() -> None:
    video = torch.randint(256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    gradients = []
    for blocks in (0, 2):
        torch.manual_seed(0)
        config = VitConfig(width=32, depth=3, num_heads=2, image_size=32, num_frames=4, checkpoint_blocks=blocks)
        model = VisionTransformer(config).train()
        torch.manual_seed(1)
        model(video)[0].square().mean().backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_student_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    student = Student(SMALL, 2, 16).eval()
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    visible = torch.arange(8, dtype=torch.int32).expand(2, -1).contiguous()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video, visible), student(video, visible))


def test_bf16_stays_close_to_fp32() -> None:
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    losses = []
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        config = Stage1Config(
            run=RunConfig(dtype=dtype),
            student=SMALL,
            teacher=TEACHER,
            align=AlignConfig(num_layers=2),
            mask=MaskConfig(kind="tube", ratio=0.5),
        )
        losses.append(UnmaskedAlignment(config)({"video": video}, torch.tensor([1]))["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_student_round_trip(suffix: str, tmp_path: Path) -> None:
    first, second = Student(SMALL, 2, 16), Student(SMALL, 2, 16)
    save_state(first.state_dict(), tmp_path / f"student{suffix}")
    load_student(second, tmp_path / f"student{suffix}")
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_wrapped_and_prefixed_files(wrapper: str, tmp_path: Path) -> None:
    import argparse

    student = Student(SMALL, 2, 16)
    prefixed = {f"module.{key}": value for key, value in student.state_dict().items()}
    torch.save({wrapper: prefixed, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    other = Student(SMALL, 2, 16)
    load_student(other, tmp_path / "official.pth")
    assert torch.equal(other.encoder.blocks[0].mlp.fc1.weight, student.encoder.blocks[0].mlp.fc1.weight)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = Student(SMALL, 2, 16).state_dict()
    del state["encoder.norm.weight"]
    state["encoder.extra"] = torch.ones(1)
    state["encoder.norm.bias"] = torch.ones(5)
    save_state(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError) as caught:
        load_student(Student(SMALL, 2, 16), tmp_path / "odd.pth")
    text = str(caught.value)
    assert "1 missing: encoder.norm.weight" in text and "1 not known to the model: encoder.extra" in text
    assert "other size: encoder.norm.bias is (5,) in the file and (32,)" in text and "By its keys" not in text


def test_weights_of_another_kind_are_refused_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    state = {key.removeprefix("encoder."): value for key, value in Student(SMALL, 2, 16).state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        fit(Student(SMALL, 2, 16), state, "odd.pth")
    text = str(caught.value)
    count = sum(not key.startswith("clip_decoder.") for key in state)
    assert f"{count} missing: encoder.patch_embed." in text and f"and {count - 3} more; {count} not known" in text
    assert len(text) < 700 and "\n" not in text
    assert "By its keys the file holds classifier weights, the model stage-1 ones." in text
    assert not caplog.records


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for name, content in (("cut.pth", None), ("text.safetensors", b"hello"), ("list.pth", [1])):
        path = tmp_path / name
        if content is None:
            torch.save(Student(SMALL, 2, 16).state_dict(), path)
            path.write_bytes(path.read_bytes()[:1000])
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(WeightsError, match=name):
            load_student(Student(SMALL, 2, 16), path)
    with pytest.raises(WeightsError, match="no weights file"):
        load_student(Student(SMALL, 2, 16), tmp_path / "absent.pth")


def test_encoder_goes_into_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, classifier = Student(SMALL, 2, 16), Classifier(SMALL, 5)
    save_state(student.state_dict(), tmp_path / "stage1.pth")
    load_encoder(classifier, tmp_path / "stage1.pth")
    assert torch.equal(classifier.blocks[1].attn.qkv.weight, student.encoder.blocks[1].attn.qkv.weight)
    assert "starting fresh" in caplog.text and "fc_norm.weight" in caplog.text


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_teacher_takes_clip_layouts_and_resizes_its_grid(prefix: str, tmp_path: Path) -> None:
    large = ClipTeacher(TeacherConfig(**(_fields(TEACHER) | {"image_size": 64})), 1).state_dict()
    large["conv1.weight"] = large["conv1.weight"].squeeze(2)  # CLIP's own is 2-D
    save_state({prefix + key: value for key, value in large.items()}, tmp_path / "clip.pth")
    config = TeacherConfig(**(_fields(TEACHER) | {"weights": str(tmp_path / "clip.pth")}))
    teacher = ClipTeacher(config, 1)
    load_teacher(teacher)
    assert torch.equal(teacher.conv1.weight.squeeze(2), large["conv1.weight"])
    assert torch.equal(teacher.positional_embedding[0], large["positional_embedding"][0])
    assert teacher.positional_embedding.shape == (5, 32)


def test_teacher_equals_open_clip() -> None:
    """The same weights in open_clip's own tower give the same image embedding (class token, pooled by us)."""
    from umt_fast.sample_world.small_clip import build_clip

    torch.manual_seed(0)
    clip = build_clip(TEACHER).eval()
    teacher = ClipTeacher(TEACHER, 1)
    state = {key: value for key, value in clip.visual.state_dict().items()}
    state["conv1.weight"] = state["conv1.weight"].unsqueeze(2)
    teacher.load_state_dict(state)
    pixels = torch.randn(2, 3, 1, 32, 32)
    x = teacher.embed(pixels)
    for block in teacher.blocks:
        x = block(x)
    ours = teacher.ln_post(x[:, 0]) @ teacher.proj
    torch.testing.assert_close(ours, clip.visual(pixels[:, :, 0]), rtol=1e-4, atol=1e-5)


def test_unknown_open_clip_names(tmp_path: Path) -> None:
    for weights, expected in (("ViT-B-99:openai", "knows no model"), ("ViT-B-16:nobody", "it has:")):
        config = TeacherConfig(weights=weights)
        with torch.device("meta"):
            teacher = ClipTeacher(config, 1)
        with pytest.raises(WeightsError, match=expected):
            load_teacher(teacher)


def _fields(config: TeacherConfig) -> dict:
    import dataclasses

    return dataclasses.asdict(config)


def test_a_stage_2_file_fits_with_and_without_its_teacher(tmp_path: Path) -> None:
    text = TextConfig(width=32, depth=2, fusion_layer=1, num_heads=2, vocab_size=9, max_positions=4)
    sizes = {"num_layers": 2, "output_dim": 16, "embed_dim": 8}
    first, second = VideoText(SMALL, text, **sizes), VideoText(SMALL, text, **sizes)
    teacher = {f"clip_teacher.{key}": value for key, value in ClipTeacher(TEACHER, 2).state_dict().items()}
    torch.save({"model": first.state_dict() | teacher}, tmp_path / "stage2.pth")
    load_video_text(second, tmp_path / "stage2.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    state = first.state_dict()
    del state["itm_head.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match="missing: itm_head.bias"):
        load_video_text(second, tmp_path / "cut.pth")


def test_hugging_face_bert_gives_the_same_hidden_states_and_words(tmp_path: Path) -> None:
    """Our text layers, filled from a BERT of transformers, are that BERT; only the cross-attention starts fresh."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=12,
    )
    theirs = BertForMaskedLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = TextEncoder(
        TextConfig(width=32, depth=3, fusion_layer=2, num_heads=2, vocab_size=30, max_positions=12), 16
    ).eval()
    load_bert(ours, str(tmp_path))
    ids, mask = torch.randint(1, 30, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    expected = theirs.bert(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(ours.encode(ids, mask)[mask], expected[mask], rtol=1e-4, atol=1e-5)
    hidden = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours.cls.predictions(hidden), theirs.cls(hidden), rtol=1e-4, atol=1e-5)
    with pytest.raises(WeightsError, match="no BERT weights"):
        load_bert(ours, str(tmp_path / "missing"))


def test_the_limits_of_a_mask_are_those_of_its_kernels() -> None:
    from kernels.semantic_mask import MAX_SCORES, MAX_TOKENS
    from umt_fast import masking

    assert (masking.MAX_TOKENS, masking.MAX_SCORES) == (MAX_TOKENS, MAX_SCORES)
    for side, kind in ((32, "semantic"), (22, "random"), (64, "tube")):
        student, teacher = VitConfig(image_size=16 * side), TeacherConfig(image_size=16 * side)
        Stage1Config(student=student, teacher=teacher, mask=MaskConfig(kind=kind))
        with pytest.raises(ConfigError, match=f"mask.kind '{kind}' draws from at most"):
            Stage1Config(
                student=VitConfig(image_size=16 * side + 16),
                teacher=TeacherConfig(image_size=16 * side + 16),
                mask=MaskConfig(kind=kind),
            )


def test_the_mlp_keeps_one_wide_tensor_and_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    mlp = WideMlp(8, 32).double()
    x, kept = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = mlp(x)
    wide = {tensor.data_ptr() for tensor in kept if tensor.numel() == 3 * 5 * 32}
    assert len(wide) == 1
    plain = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))
    inputs, upstream = [x, *mlp.parameters()], torch.randn_like(out)
    found, wanted = (torch.autograd.grad(result, inputs, upstream) for result in (out, plain))
    torch.testing.assert_close(out, plain)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_under_spatial_attention_is_one_frame(tubelet: int, masked: bool) -> None:
    """All its tokens see each other: what joint attention makes of it, in a tower for clips or in one for images."""
    values = {"width": 32, "depth": 3, "num_heads": 2, "image_size": 64, "tubelet_size": tubelet, "drop_path": 0.0}
    torch.manual_seed(0)
    clips = VisionTransformer(VitConfig(num_frames=4 * tubelet, attention="spatial", **values)).eval()
    images = VisionTransformer(VitConfig(num_frames=tubelet, attention="joint", **values)).eval()
    images.load_state_dict(clips.state_dict())
    image = torch.randint(256, (2, tubelet, 64, 64, 3), dtype=torch.uint8)
    visible = torch.tensor([[0, 3, 5, 6, 9, 10, 12, 15]] * 2, dtype=torch.int32) if masked else images.all_visible(2)
    for video in (image, torch.randn(2, 3, tubelet, 64, 64)):
        (found,), (expected,) = clips(video, visible), images(video, visible)
        torch.testing.assert_close(found, expected)
    # Clips are cut into frames as ever: a change in one leaves the others alone.
    clip = torch.randn(1, 3, 4 * tubelet, 64, 64)
    changed = clip.clone()
    changed[:, :, -tubelet:] += 1
    (before,), (after,) = clips(clip), clips(changed)
    assert torch.equal(before[:, :48], after[:, :48]) and not torch.equal(before[:, 48:], after[:, 48:])
