"""Fine-tuning as published: mixing, erasing and starting weights reach the loss; nothing of it touches a plain run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.assets import tiny
from umt_fast.config import AugmentConfig, ConfigError, FinetuneConfig, MixConfig, VitConfig, from_dict, to_dict
from umt_fast.data.decode.erasing import draw_boxes, erased, noise_of
from umt_fast.engine.distributed import current_ranks
from umt_fast.engine.tune_measure import difference, observe
from umt_fast.models.classifier import Classifier
from umt_fast.models.weights import WeightsError
from umt_fast.tasks import check_used, task_of, tuning
from umt_fast.tasks.classification import Supervised
from umt_fast.tasks.mixing import draw, mixed, soft_targets
from umt_fast.train import train

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def published(out: Path, table: Path, **changes: object) -> FinetuneConfig:
    config = tiny.classes()
    config.run.out, config.data.train = str(out), str(table)
    config.data.num_sample, config.num_classes = 2, 5
    config.student.drop_path, config.student.position_grid = 0.0, (4, 2, 2)
    config.augment = AugmentConfig(protocol="published", erasing=1.0)
    config.mix = MixConfig()
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_that_of_the_official_order_by_hand(tmp_path: Path, tiny_list: Path) -> None:
    """Normalize, erase, mix, soft targets with smoothing, cross-entropy; in float64."""
    config = published(tmp_path, tiny_list)
    task, ranks = task_of(config), current_ranks(config.run)
    batch = next(iter(task.loader(config, ranks)))
    assert batch["video"].shape[0] == 4 and set(batch) >= {"erase_box", "mix_share", "mix_box"}
    model = Supervised(config)
    torch.manual_seed(11)
    found = model(batch, torch.zeros(1, dtype=torch.int64))
    video = (batch["video"].permute(0, 4, 1, 2, 3).float() / 255 - MEAN.view(3, 1, 1, 1)) / STD.view(3, 1, 1, 1)
    video = video.contiguous()  # noise is drawn in the order of memory
    torch.manual_seed(11)
    noise = torch.randn_like(video)
    for row, boxes in enumerate(batch["erase_box"].tolist()):
        for top, left, tall, wide in boxes:
            assert tall > 0 and wide > 0
            place = (row, slice(None), slice(None), slice(top, top + tall), slice(left, left + wide))
            video[place] = noise[place]
    share = batch["mix_share"].double()
    assert len(set(share.tolist())) == 1  # one draw for the batch
    whole = video.clone()
    for row in range(4):
        top, bottom, left, right = batch["mix_box"][row].tolist()
        if bottom > top and right > left:
            whole[row, :, :, top:bottom, left:right] = video[3 - row, :, :, top:bottom, left:right]
        else:
            whole[row] = share[row] * video[row] + (1 - share[row]) * video[3 - row]
    smooth = F.one_hot(batch["label"], 5).double() * 0.9 + 0.1 / 5
    target = share[:, None] * smooth + (1 - share[:, None]) * smooth.flip(0)
    logits = model.classifier(whole).double()
    wanted = -(target * logits.log_softmax(1)).sum(1).mean()
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("per", ["batch", "clip"])
def test_mixing_follows_from_the_place_alone(per: str, tmp_path: Path, tiny_list: Path) -> None:
    config = published(tmp_path, tiny_list, mix=MixConfig(per=per))
    config.run.batch_size = 1
    ranks, task = current_ranks(config.run), task_of(config)
    whole = task.loader(config, ranks)
    first = list(whole)
    again = task.loader(config, ranks)
    next(iter(again))
    resumed = task.loader(config, ranks)
    resumed.load_state_dict(again.state_dict())
    (second,) = list(resumed)
    assert torch.equal(second["mix_share"], first[1]["mix_share"])
    assert torch.equal(second["mix_box"], first[1]["mix_box"])
    whole.set_epoch(1)
    other = list(whole)
    shares = [batch["mix_share"].tolist() for batch in (*first, *other)]
    assert len({tuple(share) for share in shares}) == 4
    assert all((len(set(share)) == 1) == (per == "batch") for share in shares)
    elsewhere = task.loader(config, dataclasses.replace(ranks, rank=1, world_size=2))
    assert next(iter(elsewhere))["mix_share"].tolist() not in shares


def test_a_published_run_continues_bit_for_bit_and_is_judged(tmp_path: Path, tiny_list: Path) -> None:
    def run(out: Path, steps: int) -> FinetuneConfig:
        config = published(out, tiny_list)
        config.data.validation = str(tiny_list)
        config.run.epochs, config.run.max_steps, config.run.save_every = 6, steps, 1
        return config

    train(run(tmp_path / "whole", 4))
    train(run(tmp_path / "parts", 2))
    train(run(tmp_path / "parts", 4))
    rows = [
        [
            {key: row[key] for key in row if key in ("step", "loss", "grad_norm", "val_top1", "val_top5")}
            for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        ]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if "val_top1" in row] == [1, 2, 3, 4]
    kept = torch.load(tmp_path / "whole" / "checkpoint-best.pt", weights_only=True)
    assert kept["model_config"]["frames"] == "kinetics" and kept["validation"]["figures"].keys() == {"top1", "top5"}


def test_a_record_without_the_new_options_trains_as_before(tmp_path: Path, tiny_list: Path) -> None:
    config = tiny.classes()
    record = to_dict(config)
    for name in ("augment", "mix", "init_as", "label_map"):
        del record[name]
    old = from_dict(FinetuneConfig, record)
    assert old == config and not old.mix.on and not old.augment.published
    for folder, one in (("old", old), ("new", config)):
        one.run.out, one.data.train = str(tmp_path / folder), str(tiny_list)
        train(one)
    assert losses(tmp_path / "old") == losses(tmp_path / "new")


@pytest.mark.parametrize("mode", ["pixel", "color", "black"])
def test_what_fills_boxes(mode: str) -> None:
    video = torch.full((2, 3, 4, 16, 16), 9.0)
    box = torch.tensor([[[2, 3, 5, 6], [10, 10, 4, 4]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    torch.manual_seed(0)
    found = erased(video, box, noise_of(video, mode))
    assert torch.equal(found[1], video[1])
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[2:7, 3:9] = inside[10:14, 10:14] = True
    assert (found[0][..., ~inside] == 9).all()
    filled = found[0][..., inside]
    different = {"pixel": filled.numel(), "color": 12, "black": 1}[mode]
    assert len(filled.unique()) == different
    if mode == "color":
        assert (filled == filled[..., :1]).all()


def test_several_boxes_share_the_area() -> None:
    rng = np.random.default_rng(0)
    areas = {
        count: np.mean([sum(b[2] * b[3] for b in draw_boxes(200, 200, 1.0, count, rng)) for _ in range(800)])
        for count in (1, 3)
    }
    assert areas[3] == pytest.approx(areas[1], rel=0.1)
    assert all(boxes == [(0, 0, 0, 0)] * 3 for boxes in (draw_boxes(9, 9, 0.0, 3, rng) for _ in range(9)))


def test_ways_of_computing_are_compared_without_the_noise(tmp_path: Path, tiny_list: Path) -> None:
    record = to_dict(published(tmp_path, tiny_list))
    cases = [tuning.build_case("classification", record, exact=True) for _ in range(2)]
    assert not difference(observe(cases[0]), observe(cases[1]), "fp32")
    config = published(tmp_path, tiny_list)
    (batch,) = task_of(config).random_batches(config)
    assert batch["erase_box"].shape == (4, 1, 4) and batch["mix_share"].shape == (4,)
    Supervised(config)(batch, torch.zeros(1, dtype=torch.int64))["loss"].backward()


def kinetics(tmp_path: Path, classes: int = 710) -> tuple[Path, dict]:
    vit = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=4, position_grid=(4, 2, 2))
    state = {key: torch.randn_like(value) for key, value in Classifier(vit, classes).state_dict().items()}
    torch.save({"module": state}, tmp_path / f"k{classes}.pth")
    return tmp_path / f"k{classes}.pth", state


def test_a_head_is_kept_cut_or_mapped(tmp_path: Path, tiny_list: Path) -> None:
    path, state = kinetics(tmp_path)
    rows = [(7 * i + 3) % 710 for i in range(600)]
    (tmp_path / "map.json").write_text(json.dumps(rows))

    def started(classes: int, init_as: str, label_map: str = "") -> Supervised:
        config = published(tmp_path, tiny_list, num_classes=classes, init=str(path), init_as=init_as)
        config.label_map = label_map
        return Supervised(config)

    for classes, chosen, label_map in ((710, range(710), ""), (400, range(400), ""), (600, rows, "map.json")):
        model = started(classes, "classifier", str(tmp_path / label_map) if label_map else "").classifier
        assert torch.equal(model.head.weight, state["head.weight"][list(chosen)])
        assert torch.equal(model.head.bias, state["head.bias"][list(chosen)])
        assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    model = started(174, "new_head").classifier
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"]) and model.head.weight.abs().max() < 0.2
    with pytest.raises(WeightsError, match="a head of 710 classes and the model one of 174"):
        started(174, "classifier")
    (tmp_path / "short.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(WeightsError, match="a list of 599; it must be a list of 600"):
        started(600, "classifier", str(tmp_path / "short.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment.erasing": 0.5}, r"augment\.erasing is 0\.5, but augment\.protocol is 'data'"),
        ({"augment.frames": "ssv2"}, r"augment\.frames is 'ssv2', but augment\.protocol is 'data'"),
        ({"augment.protocol": "published", "data.augment": "center"}, r"data\.augment is 'center'"),
        ({"augment.protocol": "published", "data.reader": "dali"}, r"data\.reader is 'dali'"),
        (
            {"augment.protocol": "published", "augment.erasing": 0.0, "augment.erasing_count": 2},
            r"augment\.erasing_count is 2, but augment\.erasing is 0",
        ),
        (
            {"augment.protocol": "published", "augment.rand_augment": "", "augment.interpolation": "bilinear"},
            r"augment\.interpolation is 'bilinear', but augment\.rand_augment is empty",
        ),
        ({"augment.protocol": "published", "augment.sampling_rate": 2}, r"augment\.sampling_rate is 2"),
        ({"mix.per": "clip"}, r"mix\.per is 'clip', but mix\.mixup_alpha and mix\.cutmix_alpha are 0"),
        ({"mix.mixup_alpha": 0.8, "mix.switch": 0.2}, r"mix\.switch is 0\.2, but not both"),
        ({"mix.mixup_alpha": 0.8, "mix.probability": 0.0}, r"mix\.mixup_alpha is 0\.8, but mix\.probability is 0"),
        ({"init_as": "new_head"}, "init_as is 'new_head', but init is empty"),
        ({"init": "x.pth", "label_map": "map.json"}, "label_map is 'map.json', but init_as 'encoder' takes no head"),
    ],
)
def test_options_that_would_not_be_read_are_refused(changes: dict, message: str) -> None:
    config = tiny.classes()
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(config, section) if section else config, field, value)
    with pytest.raises(ConfigError, match=message):
        check_used(config, 1)


def test_options_of_judging_that_would_not_be_read_are_refused(tmp_path: Path, tiny_list: Path) -> None:
    config = tiny.classes()
    config.run.out, config.data.train = str(tmp_path), str(tiny_list)
    config.run.validate_epochs = 3
    with pytest.raises(ConfigError, match=r"run\.validate_epochs is 3, but data\.validation is empty"):
        train(config)
    config.run.validate_epochs, config.data.validation = 0, str(tiny_list)
    with pytest.raises(ConfigError, match=r"data\.validation is .* but run\.validate_epochs is 0"):
        train(config)
    first = tiny.tiny()
    first.run.out, first.data.train, first.data.validation = str(tmp_path), str(tiny_list), str(tiny_list)
    with pytest.raises(ConfigError, match="training of task 'pretraining' judges nothing"):
        train(first)


def test_mixed_video_keeps_its_dtype() -> None:
    share, box = draw(MixConfig(), 4, 8, 8, np.random.default_rng(1))
    video = torch.randn(4, 3, 2, 8, 8, dtype=torch.bfloat16)
    assert mixed(video, torch.from_numpy(share), torch.from_numpy(box)).dtype == torch.bfloat16
    assert soft_targets(torch.arange(4), 4, torch.from_numpy(share)).dtype == torch.float32
