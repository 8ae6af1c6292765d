"""What an 8-bit teacher changes, in the sample world: `python -m benchmarks.precision runs/quickstart [int8 fp8]`.

Takes a finished quickstart, repeats its stage 1 with the teacher in its native precision and in each of those given (by
default int8), fine-tunes every student on motion and scene labels, and prints a Markdown table. Columns: cosine of the
projected features to the exact ones; share of visible tokens that both draw with the same seed; training loss, mean of the
last epoch; loss of the trained student against the exact teacher and its masks on unseen clips; accuracies on unseen clips.
A precision that this device has not is computed by its definition, as exactly and slower. A table cut short goes on.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from umt_fast.bench.fidelity import compare
from umt_fast.config import ConfigError, DataConfig, Stage1Config
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.lists import read_list
from umt_fast.engine.precision import pick_device
from umt_fast.models.teachers.quantized import QuantizedLinear, require_precision
from umt_fast.sample_world import quickstart
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.train import fit_objective

BATCH = 48


def unseen(folder: Path, config: Stage1Config) -> Iterator[Tensor]:
    """Every unseen clip once, in batches uint8 (B, T, H, W, 3)."""
    data, vit = DataConfig(workers=0), config.student
    clips = read_list(folder / "world" / "test_motion.csv", data)
    loader = ClipLoader(
        clips, data, num_frames=vit.num_frames, image_size=vit.image_size, batch_size=BATCH, train=False
    )
    return (batch["video"] for batch in loader)


@torch.no_grad()
def loss_against_exact(folder: Path, config: Stage1Config, weights: str) -> float:
    """Mean loss on unseen clips of a trained student, the teacher in its native precision."""
    exact = replace(config, init=weights, teacher=replace(config.teacher, precision="native"))
    objective = UnmaskedAlignment(exact).eval()
    losses = [
        objective({"video": video}, torch.tensor([number]))["loss"].item()
        for number, video in enumerate(unseen(folder, config))
    ]
    return statistics.mean(losses)


def measure(folder: Path, seed: int, precision: str) -> list[str]:
    """A row of the table."""
    config = quickstart.stage1_config(folder, seed)
    config.teacher.precision = precision
    run = folder / "precision" / precision
    config.run.out = str(run)
    device = pick_device(config.run.device)
    QuantizedLinear.backend = "auto"
    try:
        require_precision(config.teacher, device)
    except ConfigError:
        QuantizedLinear.backend = "reference"
    torch.manual_seed(seed)
    fit_objective(config, lambda: UnmaskedAlignment(config))
    weights = quickstart.newest_weights(run)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    found = compare(config, precision, unseen(folder, config), device)
    tuned = [
        quickstart.tune(folder, label, f"from_{precision}", config.teacher, weights, seed)
        for label in ("motion", "scene")
    ]
    return [
        precision,
        f"{min(found['cosine_per_layer']):.5f}",
        f"{100 * found['mask_overlap']:.1f}%",
        f"{statistics.mean(losses[-len(losses) // config.run.epochs :]):.4f}",
        f"{loss_against_exact(folder, config, weights):.4f}",
        *(f"{100 * score:.1f}%" for score in tuned),
    ]


def main(folder: Path, *precisions: str) -> str:
    """The table, a row for the native precision and one for each other."""
    seed = json.loads((folder / "results.json").read_text())["seed"]
    head = ["teacher", "lowest cosine", "same tokens", "training loss", "loss on unseen clips", "motion", "scene"]
    lines = [head, ["---"] * len(head)]
    with quickstart.side_by_side() as pool:
        runs = [pool.submit(measure, folder, seed, name) for name in ("native", *(precisions or ("int8",)))]
        lines += [run.result() for run in runs]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main(Path(sys.argv[1]), *sys.argv[2:]))
