"""The fine-tuning pages: every variant against the published table, its rates and groups against the official code's."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.engine.test_settings_parity import arguments
from tests.parity_files import parity_files
from umt_fast import recipe
from umt_fast.config import FinetuneConfig, MixConfig
from umt_fast.engine.optim import build_optimizer
from umt_fast.engine.schedule import scaled, warmup_cosine
from umt_fast.models.classifier import Classifier
from umt_fast.tasks import check_used
from umt_fast.tasks.classification import Supervised

REPOSITORY = Path(__file__).resolve().parent.parent
GPUS = 16
# Of the official scripts: page, variant -> batch of a GPU, augmentations, frames, pixels, epochs, warm-up, rate, drop path,
# layer decay, recomputed blocks, weight decay, classes, separator.
PUBLISHED = {
    ("k710", "b16"): (16, 2, 8, 224, 35, 2, 2e-4, 0.1, 0.75, 0, 0.05, 710, ","),
    ("k710", "l16"): (16, 2, 8, 224, 20, 2, 1e-4, 0.2, 0.85, 12, 0.05, 710, ","),
    ("mit", "b16"): (32, 1, 8, 224, 40, 5, 1e-4, 0.1, 0.75, 0, 0.05, 339, " "),
    ("mit", "l16"): (32, 1, 8, 224, 20, 5, 1e-4, 0.2, 0.85, 12, 0.05, 339, " "),
    ("mit", "b16_384"): (16, 1, 8, 384, 4, 1, 1e-5, 0.1, 0.75, 8, 0.1, 339, " "),
    ("mit", "l16_384"): (8, 1, 8, 384, 4, 1, 1e-5, 0.2, 0.85, 18, 0.1, 339, " "),
    ("ssv2", "b16"): (16, 2, 8, 224, 30, 5, 2e-4, 0.1, 0.75, 0, 0.05, 174, " "),
    ("ssv2", "l16"): (16, 2, 8, 224, 14, 4, 4e-4, 0.2, 0.85, 12, 0.05, 174, " "),
}
for classes in (400, 600, 700):
    PUBLISHED |= {
        (f"k{classes}", "b16"): (16, 2, 8, 224, 5, 1, 2e-5, 0.1, 0.75, 0, 0.05, classes, ","),
        (f"k{classes}", "l16"): (16, 2, 8, 224, 5, 1, 1e-5, 0.2, 0.85, 12, 0.05, classes, ","),
        (f"k{classes}", "l16_f16"): (8, 2, 16, 224, 5, 1, 1e-5, 0.2, 0.85, 16, 0.05, classes, ","),
    }


def page(name: str, variant: str) -> FinetuneConfig:
    return recipe.load(f"{REPOSITORY}/recipes/{name}.py:{variant}")


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_every_variant_is_the_published_one(name: str, variant: str) -> None:
    config = page(name, variant)
    run, vit, optim = config.run, config.student, config.optim
    found = (
        run.batch_size,
        config.data.num_sample,
        vit.num_frames,
        vit.image_size,
        run.epochs,
        run.warmup_epochs,
        optim.lr,
        vit.drop_path,
        optim.layer_decay,
        vit.checkpoint_blocks,
        optim.weight_decay,
        config.num_classes,
        config.data.separator,
    )
    assert found == PUBLISHED[name, variant]
    assert (vit.width, vit.depth, vit.num_heads) == ((768, 12, 12) if variant[0] == "b" else (1024, 24, 16))
    assert (optim.betas, optim.eps, optim.min_lr, optim.warmup_lr, optim.lr_batch) == (
        (0.9, 0.999),
        1e-8,
        1e-6,
        1e-6,
        256,
    )
    assert config.mix == MixConfig() and config.label_smoothing == 0.1 and config.head_scale == 0.001
    augment = config.augment
    assert augment.published and augment.rand_augment == "rand-m7-n4-mstd0.5-inc1" and augment.erasing == 0.25
    assert augment.frames == ("ssv2" if name == "ssv2" else "kinetics")
    assert config.data.flip is (name != "ssv2")
    # A head is kept from Kinetics-710 to the other Kinetics, and from 224 to 384 pixels.
    assert config.init_as == ("classifier" if name in ("k400", "k600", "k700") or "384" in variant else "new_head")
    config.init = "weights.pth"
    check_used(config, 1)
    # The page says what it does.
    text = (REPOSITORY / "recipes" / f"{name}.py").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {variant} ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{GPUS} x {run.batch_size}" and cells[2] == f"{run.epochs} ({run.warmup_epochs})"
    assert float(cells[3]) == optim.lr and float(cells[-3]) == vit.checkpoint_blocks
    assert float(cells[-4]) == optim.layer_decay and float(cells[-5]) == vit.drop_path


def test_pages_have_no_other_variants() -> None:
    found = set()
    for name in {name for name, _ in PUBLISHED}:
        text = (REPOSITORY / "recipes" / f"{name}.py").read_text()
        found |= {(name, line[4:].partition("(")[0]) for line in text.splitlines() if line.startswith("def ")}
    assert {entry for entry in found if not entry[1].startswith("_")} == set(PUBLISHED)


def official() -> list:
    """Official configurations that a page has, by classes, depth and frames."""
    found = []
    for path in parity_files("settings"):
        with safe_open(path, "np") as file:
            cases = json.loads(file.metadata()["config"])
        for name, case in cases.items():
            if not isinstance(case, dict) or case.get("script") != "run_class_finetuning":
                continue
            given = arguments(case)
            key = (int(given["nb_classes"][0]), case["depth"], int(given["num_frames"][0]), case["epochs"])
            for (where, variant), values in PUBLISHED.items():
                depth = 12 if variant[0] == "b" else 24
                if (
                    (values[11], depth, values[2], values[4]) == key
                    and values[3] == 224
                    and "warmup_steps" not in given
                ):
                    found.append(pytest.param(path, name, where, variant, id=f"{path.stem}-{name}-{where}:{variant}"))
    return found


@pytest.mark.parametrize(("path", "name", "where", "variant"), official())
def test_rates_and_groups_of_a_page_parity(path: Path, name: str, where: str, variant: str) -> None:
    with safe_open(path, "np") as file:
        case = json.loads(file.metadata()["config"])[name]
        wanted, decays = file.get_tensor(f"{name}.lr"), file.get_tensor(f"{name}.weight_decay")
    config = page(where, variant)
    assert config.run.batch_size * GPUS == case["global_batch"]
    views = case["global_batch"] * config.data.num_sample
    assert scaled(config.optim.lr, config.optim, views) == pytest.approx(case["peak_lr"], rel=1e-12)
    rate = warmup_cosine(
        config.optim,
        global_batch=views,
        steps_per_epoch=case["steps_per_epoch"],
        epochs=config.run.epochs,
        warmup_epochs=config.run.warmup_epochs,
    )
    assert np.array([rate(step) for step in range(len(wanted))]) == pytest.approx(wanted, rel=1e-12, abs=0)
    assert (decays == config.optim.weight_decay).all()
    # The page's depth and rules on a narrow model.
    config.student.width, config.student.num_heads, config.student.image_size = 8, 2, 32
    model, layer_of = Classifier(config.student, 10), Supervised(config).layer_id
    optimizer = build_optimizer(model, config.optim, lr=1.0, layer_of=layer_of, num_layers=config.student.depth + 1)
    called = {id(parameter): key for key, parameter in model.named_parameters()}
    ours = {
        called[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    theirs = {
        key: (pytest.approx(group["lr_scale"], rel=1e-12), group["weight_decay"])
        for group in case["groups"]
        for key in group["names"]
        if key != "pos_embed"
    }
    assert ours == theirs


def test_parity_files_have_pages() -> None:
    assert {(case.values[2], case.values[3]) for case in official()} >= {("k710", "b16")}


def test_the_launcher_passes_everything_on(tmp_path: Path) -> None:
    """An interpreter that only prints its arguments takes Python's place."""
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    echo.chmod(0o755)
    settings = {"RECIPE": "k600", "DATA": "train.csv", "INIT": "k710.pth", "OUT": "runs/x", "VAL": "val.csv"}
    settings |= {"LABEL_MAP": "map.json", "MODEL": "l16_f16", "NGPU": "1", "UMT_PYTHON": str(echo)}
    script = ["bash", "recipes/finetune.sh", "--run.seed", "7"]
    run = {"cwd": REPOSITORY, "capture_output": True, "text": True}
    words = subprocess.run(script, env=os.environ | settings, check=True, **run).stdout.split()
    assert words[words.index("train") + 1].endswith("recipes/k600.py:l16_f16")
    pairs = dict(zip(words[4::2], words[5::2], strict=True))
    assert pairs == {
        "--data.train": "train.csv",
        "--init": "k710.pth",
        "--run.out": "runs/x",
        "--data.validation": "val.csv",
        "--label_map": "map.json",
        "--run.seed": "7",
    }
    for name in ("RECIPE", "DATA", "INIT", "OUT"):
        lacking = {key: value for key, value in (os.environ | settings).items() if key != name}
        done = subprocess.run(script, env=lacking, **run)
        assert done.returncode != 0 and f"set {name}" in done.stderr
