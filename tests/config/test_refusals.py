"""Configurations that cannot be right, and options that a run would not read: refused, by field, before it begins."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from umt_fast.config import (
    AlignConfig,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    Stage2Losses,
    TeacherConfig,
    VitConfig,
    to_dict,
)
from umt_fast.masking import TokenGrid, mask_named
from umt_fast.plan import PlanOptions
from umt_fast.tasks import TASKS, check_used
from umt_fast.tasks.matching import TextOptions
from umt_fast.train import train

KINDS = (Stage1Config, Stage2Config)
SMALL = {"image_size": 32, "num_frames": 4}


def tower(**values: Any) -> dict[str, Any]:
    """A student of 2 x 2 tokens a frame with a teacher that has as many."""
    return {"student": VitConfig(**(SMALL | values)), "teacher": TeacherConfig(image_size=32)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_has_as_many_tokens_for_the_student_as_for_the_teacher(kind: type) -> None:
    with pytest.raises(ConfigError, match=r"student.image_size 224 .* teacher.image_size 112 .*teacher.image_size 224"):
        kind(teacher=TeacherConfig(image_size=112))
    # The remedy that is named works, also where patches differ.
    with pytest.raises(ConfigError, match="choose teacher.image_size 196"):
        kind(teacher=TeacherConfig(patch_size=14, image_size=224))
    kind(teacher=TeacherConfig(patch_size=14, image_size=196))
    # Tubelets cut both towers' clips alike: there is nothing to compare but a frame.
    kind(student=VitConfig(tubelet_size=2))


def test_without_a_teacher_nothing_is_compared() -> None:
    values = {"teacher": TeacherConfig(image_size=112, depth=2), "mask": MaskConfig(kind="tube")}
    Stage2Config(losses=Stage2Losses(uta=0.0), **values)
    with pytest.raises(ConfigError, match=r"teacher.image_size"):
        Stage2Config(losses=Stage2Losses(uta=0.0, vision_projection=1.0), **values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("field", "shallow"), [("student", VitConfig(depth=3)), ("teacher", TeacherConfig(depth=3))])
def test_no_more_aligned_layers_than_blocks(kind: type, field: str, shallow: Any) -> None:
    with pytest.raises(ConfigError, match=rf"align.num_layers is 4; .*{field}.depth = 3"):
        kind(align=AlignConfig(num_layers=4), **{field: shallow})
    kind(align=AlignConfig(num_layers=3), **{field: shallow})
    with pytest.raises(ConfigError, match="align.num_layers is 0"):
        kind(align=AlignConfig(num_layers=0))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_hide_something_and_leave_something(kind: type) -> None:
    with pytest.raises(ConfigError, match="mask.ratio 0.2 hides none of 4 tokens of a frame"):
        kind(mask=MaskConfig(ratio=0.2), **tower())
    # Of the clip's sixteen, three are hidden.
    kind(mask=MaskConfig(ratio=0.2, kind="random"), **tower())
    kind(mask=MaskConfig(ratio=0.0), **tower())
    # The largest ratio there is leaves a token.
    almost = MaskConfig(ratio=1 - 2**-53)
    for side in (1, 2, 16, 27, 32):
        assert mask_named("semantic").count(TokenGrid(1, side, side), almost.ratio) == 1


def test_masks_of_images() -> None:
    with pytest.raises(ConfigError, match="image_mask.ratio 0.1 hides none of 4"):
        Stage2Config(images=("x.json",), image_mask=MaskConfig(ratio=0.1), **tower())
    Stage2Config(image_mask=MaskConfig(ratio=0.1), **tower())  # no images, no mask


@pytest.mark.parametrize("kind", KINDS)
def test_spatial_attention_needs_equal_frames(kind: type) -> None:
    with pytest.raises(ConfigError, match="student.attention 'spatial' .* mask.kind 'random'"):
        kind(mask=MaskConfig(kind="random"), **tower(attention="spatial"))
    kind(mask=MaskConfig(kind="tube"), **tower(attention="spatial"))


def test_an_image_may_be_masked_at_random_under_spatial_attention() -> None:
    images = {"images": ("x.json",), **tower(attention="spatial")}
    assert Stage2Config(image_mask=MaskConfig(kind="random"), **images).image_mask.kind == "random"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Stage2Config(run=RunConfig(batch_size=1, epochs=2, warmup_epochs=1)), "run.batch_size is 1"),
        (lambda: Stage2Config(max_length=2, sep_token=True), "max_length is 2"),
        (lambda: Stage2Config(embed_dim=1), "embed_dim is 1"),
        (lambda: TeacherConfig(output_dim=1), "teacher.output_dim is 1"),
        (lambda: OptimConfig(lr=0.0, min_lr=0.0), "optim.lr is 0"),
        (lambda: OptimConfig(eps=0.0), "optim.eps is 0"),
        (lambda: OptimConfig(lr=1e-4, min_lr=1e-3), "optim.min_lr is 0.001"),
        (lambda: OptimConfig(lr=1e-4, warmup_lr=1e-3), "optim.warmup_lr is 0.001"),
        (lambda: FinetuneConfig(head_scale=-1.0), "head_scale is -1"),
        (lambda: VitConfig(position_grid=(8, 14)), "student.position_grid is"),
        (lambda: VitConfig(num_frames=5000), "student.num_frames is 5000; a clip has at most 4096"),
        (lambda: TextOptions(frames=3_000_000), r"frames is 3000000; it must lie in \[0, 4096\]"),
        (
            lambda: Stage2Config(images=("x",), student=VitConfig(num_frames=4, position_grid=(8, 14, 14))),
            "student.position_grid is",
        ),
        (lambda: VitConfig(position_grid=(8, 14, 0)), "student.position_grid is"),
        (lambda: PlanOptions(measured="steps.jsonl", share=0.5), "share is 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_right(make: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        make()


# A kind of run, what is set of it by its place on the command line, and the field that is then refused.
UNREAD = [
    (Stage1Config, {"run.compress": "bf16"}, "run.compress"),
    (Stage1Config, {"run.parallel": "fsdp"}, "run.parallel"),
    (Stage1Config, {"run.warmup_epochs": 0, "optim.warmup_lr": 1e-6}, "optim.warmup_lr"),
    (Stage1Config, {"run.async_save": True}, "run.async_save"),
    (Stage1Config, {"data.workers": 0, "data.prefetch": 3}, "data.prefetch"),
    (Stage1Config, {"student.depth": 1, "student.drop_path": 0.2}, "student.drop_path"),
    (Stage1Config, {"optim.layer_decay": 0.75}, "optim.layer_decay"),
    (Stage1Config, {"teacher.depth": 1, "teacher.precision": "int8"}, "teacher.precision"),
    (FinetuneConfig, {"freeze": True, "optim.layer_decay": 0.8}, "optim.layer_decay"),
    (FinetuneConfig, {"freeze": True, "student.checkpoint_blocks": 2}, "student.checkpoint_blocks"),
    (Stage2Config, {"optim.layer_decay": 0.75}, "optim.layer_decay"),
    (Stage2Config, {"data.train": "list.csv"}, "data.train"),
    (Stage2Config, {"data.root": "videos"}, "data.root"),
    (Stage2Config, {"data.separator": " "}, "data.separator"),
    (Stage2Config, {"data.frame_pattern": "{}.jpg"}, "data.frame_pattern"),
    (Stage2Config, {"losses.mlm": 0.0, "mask_words": 0.2}, "mask_words"),
    (Stage2Config, {"videos": ("x",), "image_mask.ratio": 0.6}, "image_mask.ratio"),
    (Stage2Config, {"videos": ("x",), "image_mask.kind": "tube"}, "image_mask.kind"),
    (Stage2Config, {"images": ("x",), "mask.ratio": 0.6}, "mask.ratio"),
    (Stage2Config, {"images": ("x",), "mask.kind": "tube"}, "mask.kind"),
    (Stage2Config, {"videos": ("x",), "student.num_frames": 1, "mask.ratio": 0.6}, "mask.ratio"),
    (Stage2Config, {"losses.vtm": 0.0, "run.batch_size": 1}, "run.batch_size"),
    (Stage2Config, {"losses.uta": 0.0, "teacher.weights": "own.pt"}, "teacher.weights"),
    (Stage2Config, {"losses.uta": 0.0, "mask.ratio": 0.5}, "mask.ratio"),
    (Stage2Config, {"losses.uta": 0.0, "image_mask.ratio": 0.2}, "image_mask.ratio"),
]


def with_fields(kind: type, changes: dict[str, Any]) -> Any:
    config = kind()
    for name, value in changes.items():
        *sections, field = name.split(".")
        owner = getattr(config, sections[0]) if sections else config
        setattr(owner, field, value)
    return config


@pytest.mark.parametrize(
    ("kind", "changes", "field"), UNREAD, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_options_that_would_change_nothing(kind: type, changes: dict[str, Any], field: str) -> None:
    check_used(kind(), 1)
    with pytest.raises(ConfigError, match=rf"^{field} is ") as refusal:
        check_used(with_fields(kind, changes), 1)
    assert len(str(refusal.value).splitlines()) == 1
    # Alone it is read, or is at its default.
    default = kind()
    for name in changes:
        if name != field:
            *sections, last = name.split(".")
            alone = with_fields(kind, {n: v for n, v in changes.items() if n != field})
            check_used(alone, 2)
            owner = getattr(default, sections[0]) if sections else default
            assert getattr(owner, last) != changes[name]


def refusal(config: object, ranks: int) -> str:
    """Why a run on so many ranks would not read a setting, or an empty text."""
    try:
        check_used(config, ranks)
    except ConfigError as error:
        return str(error)
    return ""


def test_several_ranks_read_what_one_does_not() -> None:
    for changes in ({"run.compress": "bf16"}, {"run.parallel": "fsdp"}):
        assert next(iter(changes)) in refusal(with_fields(Stage1Config, changes), 1)
        assert not refusal(with_fields(Stage1Config, changes), 2)
    assert not refusal(with_fields(Stage2Config, {"losses.vtm": 0.0, "run.batch_size": 1}), 2)


def test_recipes_are_refused_nothing() -> None:
    from umt_fast import recipe

    for page, variants in (
        ("stage1_k710", ("b16", "l16")),
        ("stage2", ("b16", "l16")),
        ("quickstart", ("stage1", "motion", "scene", "stage2")),
    ):
        for variant in variants:
            assert not refusal(recipe.load(f"{page}:{variant}"), 1), (page, variant)


def test_training_checks_what_was_set_after_construction(tmp_path: Path) -> None:
    """And leaves the caller's configuration as it is."""
    config = Stage1Config(data=DataConfig(train=str(tmp_path / "list.csv")), run=RunConfig(out=str(tmp_path / "run")))
    config.mask.ratio = 1.5
    before = to_dict(config)
    with pytest.raises(ConfigError, match="mask.ratio is 1.5"):
        train(config)
    config.mask.ratio, config.optim.layer_decay = 0.8, 0.5
    with pytest.raises(ConfigError, match="optim.layer_decay is 0.5"):
        train(config)
    assert before["mask"] != to_dict(config)["mask"] and not (tmp_path / "run").exists()
    assert dataclasses.is_dataclass(config) and config.optim.layer_decay == 0.5


def test_what_pages_say_of_a_teacher_goes_without_one() -> None:
    """Weights of a page are not the user's; masks that need no teacher are drawn without one; text needs its weights."""
    from umt_fast import recipe

    for changes in (
        {"losses.uta": 0.0},
        {"losses.uta": 0.0, "mask.kind": "tube", "mask.ratio": 0.5},
        {"losses.uta": 0.0, "losses.text_projection": 1.0, "teacher.weights": "own.pt"},
    ):
        assert not refusal(with_fields(Stage2Config, changes), 1), changes
    config = recipe.load("stage2:l16")
    config.losses.uta = 0.0
    assert not refusal(config, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_without_a_bound_is_announced(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    task = next(task for task in TASKS.values() if task.Config is kind)
    for align in (AlignConfig(), AlignConfig(normalize="none", loss="mse")):
        task.settled(kind(align=align))
    assert not caplog.text
    task.settled(kind(align=AlignConfig(normalize="none")))
    assert "align.loss l2 with align.normalize none has no lower bound" in caplog.text


def test_image_masks_of_the_clips_kind_ask_for_nothing() -> None:
    changes = {"videos": ("x",), "mask.kind": "tube", "image_mask.kind": "tube"}
    assert not refusal(with_fields(Stage2Config, changes), 1)
