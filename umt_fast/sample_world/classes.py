"""What classifies the sample world's clips? Probes of the frozen tower, and fine-tuning with and without augmentation.

    python -m umt_fast.sample_world.classes --out runs/quickstart

goes on from a quickstart: judges linear, attentive and k-NN probes of its pre-trained student, then fine-tunes the student
with and without the published augmentation, and judges both by one view and by 4 x 3 views of each unseen clip. Labels: the
motion of the thing (4 classes) and the scene (24). Settings: recipes/sample_world_tasks.py:classes and :augmented.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from umt_fast import recipe
from umt_fast.config import ConfigError, FinetuneConfig
from umt_fast.engine.distributed import current_ranks
from umt_fast.probing.evaluation import ProbeOptions
from umt_fast.sample_world.quickstart import Results, newest_weights, side_by_side, stage1_config
from umt_fast.tasks.classify import ClassifyOptions
from umt_fast.tasks.evaluate import evaluate_checkpoint
from umt_fast.train import train

log = logging.getLogger("umt_fast")

CLASSES = {"motion": 4, "scene": 24}
PROBES = ("linear", "attentive", "knn")
TUNED = {"classes": "fine-tuned", "augmented": "fine-tuned with augmentation"}
"""The page's variants, by what the table calls them."""
VIEWS = {"1": (1, 1), "4 x 3": (4, 3)}


def lists_of(out: Path, label: str) -> tuple[Path, Path]:
    """Labeled clips to learn from, and unseen ones."""
    return out / "world" / f"labeled_{label}.csv", out / "world" / f"test_{label}.csv"


def probed(out: Path, weights: str, label: str, kind: str, seed: int) -> float:
    """Top-1 on unseen clips of a probe of the frozen tower."""
    learned, unseen = lists_of(out, label)
    options = ProbeOptions(train=learned, kind=kind, num_classes=CLASSES[label], batch_size=64, workers=1)
    if kind != "knn":  # which has no heads to draw
        options = replace(options, seed=seed)
    ranks = current_ranks(stage1_config(out, seed).run)
    score = evaluate_checkpoint("probe", Path(weights), unseen, ranks=ranks, options=options)["top1"]
    log.info("%s, %s probe: %.1f%%", label, kind, 100 * score)
    return round(score, 4)


def config_of(out: Path, seed: int, weights: str, label: str, variant: str) -> FinetuneConfig:
    """The page's run of a variant on a kind of labels, in OUT/classes/LABEL_VARIANT."""
    config: FinetuneConfig = recipe.load(f"sample_world_tasks:{variant}")
    config.run.seed, config.run.out = seed, str(out / "classes" / f"{label}_{variant}")
    config.data.train, config.init = str(lists_of(out, label)[0]), weights
    config.num_classes = CLASSES[label]
    return config


def tuned(out: Path, weights: str, label: str, variant: str, seed: int) -> dict[str, float]:
    """Top-1 on unseen clips of a fine-tuned classifier, by number of views."""
    config = config_of(out, seed, weights, label, variant)
    newest, ranks = Path(newest_weights(train(config))), current_ranks(config.run)
    scores = {}
    for name, (segments, crops) in VIEWS.items():
        options = ClassifyOptions(segments=segments, crops=crops, batch_size=48, workers=1)
        found = evaluate_checkpoint("classify", newest, lists_of(out, label)[1], ranks=ranks, options=options)
        scores[name] = round(found["top1"], 4)
    log.info("%s, %s: %s", label, TUNED[variant], scores)
    return scores


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores of both kinds of labels as Markdown, in percent."""
    lines = ["| the pre-trained student | motion, % | scene, % |", "|---|---|---|"]
    rows = [(f"{kind} probe", [scores[label][kind] for label in CLASSES]) for kind in PROBES]
    for variant, name in TUNED.items():
        rows += [(f"{name}, views: {views}", [scores[label][variant][views] for label in CLASSES]) for views in VIEWS]
    return "\n".join(
        [*lines, *(f"| {name} | {100 * motion:.1f} | {100 * scene:.1f} |" for name, (motion, scene) in rows)]
    )


def run(out: str | Path) -> dict[str, Any]:
    """The scores of every way by kind of labels; they stay in results.json. Raises ConfigError: no quickstart there."""
    out = Path(out)
    if not (out / "results.json").is_file():
        raise ConfigError(f"{out} holds no quickstart; run `bash recipes/quickstart.sh --out {out}` first")
    results = Results(out)
    if "stage1" not in results.values:
        raise ConfigError(f"the quickstart in {out} has not pre-trained yet; let it run to its end first")
    seed, weights = results.seed, newest_weights(out / "stage1")

    def compare() -> dict[str, Any]:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # models this small gain nothing from a second core
        with side_by_side() as pool:
            runs = {
                label: {
                    **{kind: pool.submit(probed, out, weights, label, kind, seed) for kind in PROBES},
                    **{variant: pool.submit(tuned, out, weights, label, variant, seed) for variant in TUNED},
                }
                for label in CLASSES
            }
            return {label: {name: one.result() for name, one in every.items()} for label, every in runs.items()}

    return results.part("classes", compare)


def main(out: Path = Path("runs/quickstart")) -> int:
    """Judge probes and fine-tuning on the sample world's labels.

    Args:
        out: Folder of a quickstart.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(table(run(out)))
    except ConfigError as error:
        print(f"umt_fast: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
