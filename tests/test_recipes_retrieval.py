"""The pages of retrieval and multiple choice: every variant against the official numbers, and what their launcher passes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity_files import parity_files, read_case
from umt_fast import recipe
from umt_fast.engine.schedule import warmup_cosine
from umt_fast.plan import work_of
from umt_fast.tasks import check_used, task_of

REPOSITORY = Path(__file__).resolve().parent.parent
CORPORA = ("5m", "17m", "25m")
# Peak rate, epochs, warm-up epochs, drop path of B and L for 5M, 17M, 25M, as the official scripts have them.
RUNS = {
    "ret_msrvtt": "2e-5/10/0/.2 2e-5/10/0/.2 1e-5/10/1/.2 2e-5/7/1/.3 2e-5/7/1/.3 2e-5/7/1/.3",
    "ret_didemo": "2e-5/15/1/.1 2e-5/10/1/.1 2e-5/12/1/.1 4e-5/5/1/.3 4e-5/5/1/.3 4e-5/5/1/.2",
    "ret_anet": "4e-5/20/1/.1 4e-5/20/1/.1 4e-5/20/1/.1 4e-5/20/1/.2 4e-5/20/1/.3 4e-5/20/1/.2",
    "ret_lsmdc": "2e-5/10/1/.2 2e-5/10/1/.2 2e-5/10/1/.2 2e-5/8/1/.3 2e-5/8/1/.3 2e-5/8/1/.3",
    "ret_msvd": "1e-5/5/0/.2 1e-5/5/0/.2 1e-5/5/0/.2 1e-5/3/0/.3 1e-5/3/0/.3 1e-5/3/0/.3",
    "ret_ssv2:label_": "5e-5/10/0/.1 5e-5/10/0/.1 5e-5/10/0/.1 5e-5/10/0/.2 5e-5/10/0/.2 4e-5/10/0/.2",
    "ret_ssv2:template_": "1e-4/10/1/.1 1e-4/10/1/.1 1e-4/10/1/.1 1e-4/10/1/.2 1e-4/8/1/.2 1e-4/5/1/.2",
    "mc_msrvtt": "8e-5/5/0/.2 2e-5/5/0/.2 8e-5/3/0/.2 4e-5/5/0/.3 4e-5/5/0/.3 4e-5/5/0/.3",
}
# Text length, a list of captions, right answers, seconds.
READ = {
    "ret_msrvtt": (32, "each", "file", 0),
    "ret_didemo": (64, "paragraph", "file", 30),
    "ret_anet": (150, "paragraph", "file", 0),
    "ret_lsmdc": (96, "each", "file", 0),
    "ret_msvd": (64, "each", "file", 0),
    "ret_ssv2": (25, "each", "caption", 0),
    "mc_msrvtt": (32, "each", "file", 0),
}


@pytest.mark.parametrize("page", RUNS)
def test_every_variant_has_the_official_numbers(page: str) -> None:
    name, _, prefix = page.partition(":")
    variants = [f"{prefix}{size}_{corpus}" for size in ("b16", "l16") for corpus in CORPORA]
    for variant, numbers in zip(variants, RUNS[page].split(), strict=True):
        config = recipe.load(f"{name}:{variant}")
        optim, run, student = config.optim, config.run, config.student
        found = (optim.lr, run.epochs, run.warmup_epochs, student.drop_path)
        assert found == tuple(map(float, numbers.split("/"))), variant
        assert (config.max_length, config.captions, config.same_sample, config.data.max_seconds) == READ[name]
        large = "l16" in variant
        assert (student.width, student.depth, student.num_heads) == ((1024, 24, 16) if large else (768, 12, 12))
        text = config.text
        assert (text.width, text.depth, text.fusion_layer) == ((1024, 24, 19) if large else (768, 12, 9))
        assert (
            config.embed_dim == (768 if large else 512)
            and config.tokenizer == f"bert-{'large' if large else 'base'}-uncased"
        )
        assert (student.num_frames, student.image_size, student.tubelet_size, student.position_grid) == (12, 224, 1, ())
        assert student.checkpoint_blocks == student.depth  # officially every block
        assert (run.batch_size, optim.lr_batch, optim.weight_decay, optim.betas) == (32, 0, 0.02, (0.9, 0.999))
        assert (optim.schedule, optim.min_factor, optim.clip_grad) == ("scaled_cosine", 0.01, 0)
        assert (config.losses.vtc, config.losses.vtm, config.losses.gather) == (1, 1, "official")
        assert (config.data.sampling, config.data.augment, config.data.flip) == (
            "intervals",
            "random_resized_crop",
            True,
        )
        assert config.validate == ("choices" if name == "mc_msrvtt" else "retrieval") and not config.sep_token
        check_used(config, 8)
        assert task_of(config).name == "retrieval"


def test_the_pages_tables_are_the_zoos() -> None:
    """The released files are of the 25M variants."""
    from umt_fast.zoo import ZOO

    for name, page, prefix in (
        *((name, f"ret_{name}", "") for name in ("msrvtt", "didemo", "anet", "lsmdc", "msvd")),
        ("ssv2_label", "ret_ssv2", "label"),
        ("ssv2_tpl", "ret_ssv2", "template"),
    ):
        text = (REPOSITORY / "recipes" / f"{page}.py").read_text()
        for size in ("b16", "l16"):
            row = re.search(rf"^\| {size}_25m .*$", text, re.M)[0]
            cell = row.split("|")[3 if prefix == "template" else 2]
            assert float(cell.split("/")[0]) == ZOO[f"ret_{name}_{size}_25m"].score, (page, size)


def test_parity_of_the_schedule() -> None:
    """Factors of the peak rate, one a step, with as many warm-up steps and the same floor."""
    found = 0
    for path in parity_files("load_downstream"):
        for key, factors in read_case(path)[1].items():
            match = re.fullmatch(r"schedule\.(\d+)_steps_(\d+)_warmup_floor_(.+)", key)
            if match and float(match[3]) == 0.01:
                steps, warmup = int(match[1]), int(match[2])
                optim = recipe.load("ret_msrvtt:b16_25m").optim
                rate = warmup_cosine(optim, global_batch=256, steps_per_epoch=1, epochs=steps, warmup_epochs=warmup)
                ours = [rate(step) / optim.lr for step in range(steps)]
                assert ours == pytest.approx(factors.tolist(), rel=1e-5), key
                found += 1
    assert found or not parity_files("load_downstream")


def test_a_page_is_planned_without_weights_or_data() -> None:
    work = work_of(recipe.load("ret_msrvtt:b16_25m"))
    # The tower's three passes over 12 frames alone are above 1.3 TFLOP.
    assert 1.3e12 < work.flops < 3e12 and work.trained == pytest.approx(208e6, rel=0.05)


@pytest.mark.parametrize("page", ["ret_msrvtt", "ret_ssv2:template_l16_5m"])
def test_the_launcher_passes_everything_on(page: str, tmp_path: Path) -> None:
    """An interpreter that only prints its arguments stands in for Python."""
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    echo.chmod(0o755)
    given = {"VIDEOS": "train.json=/data/x", "INIT": "b16_25m.pth", "OUT": "runs/x", "NGPU": "1"}
    environment = {**os.environ, "UMT_PYTHON": str(echo), **given}
    script = ["bash", "recipes/retrieval.sh", page, "--run.seed", "7"]

    def words(**more: str) -> list[str]:
        done = subprocess.run(
            script, env=environment | more, cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    name, colon, variant = page.partition(":")
    expected = ["train", f"{REPOSITORY}/recipes/{name}.py{colon}{variant}", "--videos", given["VIDEOS"]]
    expected += ["--init", "b16_25m.pth", "--run.out", "runs/x"]
    assert words()[-len(expected) - 2 :] == [*expected, "--run.seed", "7"]
    validated = [*expected, "--data.validation", "val.json=/data/x", "--run.seed", "7"]
    assert words(VALIDATION="val.json=/data/x")[-len(validated) :] == validated
    for missing in ("VIDEOS", "INIT", "OUT"):
        less = {key: value for key, value in environment.items() if key != missing}
        done = subprocess.run(script, env=less, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode != 0 and f"set {missing}" in done.stderr
    done = subprocess.run(script[:2], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0 and "name a page" in done.stderr


@pytest.mark.slow
def test_the_launcher_reaches_the_trainer(tmp_path: Path) -> None:
    environment = {**os.environ, "UMT_PYTHON": sys.executable, "VIDEOS": str(tmp_path / "no.json"), "NGPU": "1"}
    environment |= {"INIT": "none.pth", "OUT": str(tmp_path / "run")}
    script = ["bash", "recipes/retrieval.sh", "ret_msvd:b16_5m", "--run.device", "cpu"]
    done = subprocess.run(script, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "no caption list at" in done.stderr, done.stderr
