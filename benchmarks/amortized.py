"""What several masks of a clip (`mask.per_clip`) give in the sample world: `python -m benchmarks.amortized runs/quickstart`.

Takes a finished quickstart, pre-trains with 2 and 4 masks of each clip for one teacher pass, and fine-tunes each as the
quickstart does. Beside the quickstart's own run, of one mask, stand as many student views, and about as many FLOPs. Prints a
Markdown table of accuracy on unseen clips. A table cut short goes on.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import NamedTuple

from umt_fast.config import Stage1Config
from umt_fast.sample_world import quickstart
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.train import train


class Variant(NamedTuple):
    per_clip: int
    epochs: int


OWN = Variant(1, 6)
VARIANTS = (OWN, Variant(2, 3), Variant(2, 4), Variant(4, 2), Variant(4, 3))


def config_of(folder: Path, seed: int, variant: Variant) -> Stage1Config:
    """The quickstart's pre-training with another number of masks and epochs."""
    config = quickstart.stage1_config(folder, seed)
    if variant == OWN:
        if config.run.epochs != OWN.epochs or config.mask.per_clip != OWN.per_clip:
            raise SystemExit(f"the quickstart's stage 1 has {config.run.epochs} epochs; make OWN the same")
        return config
    config.mask.per_clip, config.run.epochs = variant
    config.run.out = str(folder / "amortized" / f"{variant.per_clip}_masks_{variant.epochs}_epochs")
    return config


def cost(config: Stage1Config) -> float:
    """FLOPs of a whole run over a clip of the list."""
    return UnmaskedAlignment(config).flops_per_clip() * config.run.epochs


def measure(folder: Path, seed: int, variant: Variant) -> tuple[float, float]:
    """Accuracy on unseen clips, of motion and scene, after this pre-training and the quickstart's fine-tuning."""
    config = config_of(folder, seed, variant)
    if variant == OWN:
        scores = quickstart.Results(folder, seed).values["comparison"]
        return scores["motion"]["pretrained"], scores["scene"]["pretrained"]
    train(config)
    weights, name = quickstart.newest_weights(Path(config.run.out)), "_".join(map(str, variant))
    motion, scene = (
        quickstart.tune(folder, label, f"amortized_{name}", config.teacher, weights, seed)
        for label in ("motion", "scene")
    )
    return motion, scene


def main(folder: Path) -> str:
    """The table, a row for each variant."""
    results = quickstart.Results(folder)
    if "comparison" not in results.values:
        raise SystemExit(f"{folder} has no finished quickstart; run `bash recipes/quickstart.sh --out {folder}` first")
    seed, own = results.seed, cost(config_of(folder, results.seed, OWN))
    lines = ["| masks of a clip | epochs | student views | FLOPs | motion | scene |", "|---|---|---|---|---|---|"]
    with quickstart.side_by_side() as pool:
        runs = {variant: pool.submit(measure, folder, seed, variant) for variant in VARIANTS}
        for variant, run in runs.items():
            views = variant.per_clip * variant.epochs / (OWN.per_clip * OWN.epochs)
            share = cost(config_of(folder, seed, variant)) / own
            motion, scene = run.result()
            figures = f"{views:.2f}x | {share:.2f}x | {100 * motion:.1f}% | {100 * scene:.1f}%"
            lines.append(f"| {variant.per_clip} | {variant.epochs} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main(Path(sys.argv[1])))
