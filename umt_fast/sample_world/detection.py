"""Who moves where? Detectors of motion on the sample world, from pre-training, from scratch, and of single pictures.

    python -m umt_fast.sample_world.detection --out runs/quickstart [--seeds 3]

Works in the folder of a quickstart and makes what is missing of its world, teacher and pre-training. Every detector is trained
on the boxes of the same clips, and judged by frame mAP on those of unseen ones. Settings: recipes/sample_world_tasks.py.
"""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

import torch
import tyro

from umt_fast import recipe
from umt_fast.config import DetectionConfig, JudgingConfig
from umt_fast.engine.distributed import current_ranks
from umt_fast.models.weights import fit_detector, read_weights
from umt_fast.sample_world import world as sample_world
from umt_fast.sample_world.boxes import write_lists
from umt_fast.sample_world.quickstart import WORLD, Results, newest_weights, side_by_side, stage1_config, train_teacher
from umt_fast.tasks import task_of
from umt_fast.tasks.detection import Detection
from umt_fast.tasks.judge import Judge
from umt_fast.train import train

log = logging.getLogger("umt_fast")

LABELED, JUDGED = WORLD["train"], WORLD["test"]
"""Clips of training and of judging."""
STARTS = {
    "pretrained": "from pre-training",
    "scratch": "from scratch",
    "still": "from pre-training, the key frame alone",
}
"""What is compared, by name."""


def detector_config(out: Path, start: str, pretrained: str, seed: int) -> DetectionConfig:
    """The page's run of a start, in OUT/detection/START_SEED."""
    config: DetectionConfig = recipe.load(f"sample_world_tasks:{'still' if 'still' in start else 'motions'}")
    config.run.seed, config.run.out = seed, str(out / "detection" / f"{start}_{seed}")
    config.data.train = str(out / "world" / "train_boxes.csv")
    config.init = "" if "scratch" in start else pretrained
    # The same positions from either start.
    config.student.position_grid = config.student.grid
    return config


def train_and_judge(out: Path, start: str, pretrained: str, seed: int) -> float:
    """Frame mAP of a detector on unseen clips."""
    config = detector_config(out, start, pretrained, seed)
    newest = newest_weights(train(config))
    ranks, task = current_ranks(config.run), task_of(config)
    objective: Detection = task.untrained(config)
    fit_detector(objective.detector, read_weights(newest).state, newest)
    objective.to(ranks.device).eval()
    world = out / "world"
    by = JudgingConfig(boxes=str(world / "test_detected.csv"), label_map=str(world / "motions.pbtxt"))
    judge = Judge(world / "test_boxes.csv", by, config.clips, config.student, config.data, config.num_classes)
    result = Path(config.run.out) / "detections.csv"
    figures = judge.figures(objective.scores, batch_size=48, ranks=ranks, result=result)
    log.info("detector %s, seed %d: mAP %.1f%%", STARTS[start], seed, 100 * figures["map"])
    return round(figures["map"], 4)


def table(scores: dict[str, list[float]]) -> str:
    """The comparison as Markdown: mean and each seed's frame mAP in percent."""
    lines = ["| detector | mAP, % | of each seed |", "|---|---|---|"]
    for start, values in scores.items():
        every = ", ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {STARTS[start]} | {100 * statistics.mean(values):.1f} | {every} |")
    return "\n".join(lines)


def run(out: str | Path, seed: int = 0, seeds: int = 3) -> dict[str, Any]:
    """Makes what is missing and returns the mAP of every start and seed; they stay in results.json.

    seed: of world, teacher and pre-training. seeds: detectors of each start.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results, config = Results(out, seed), stage1_config(out, seed)
    world = out / "world"
    results.part("world", lambda: {"folder": str(sample_world.build(world, seed=seed, **WORLD))})
    weights = Path(config.teacher.weights)
    results.part("teacher", lambda: train_teacher(world, config.teacher, weights, seed))
    results.part("stage1", lambda: {"run": str(train(config))})
    pretrained = newest_weights(out / "stage1")
    write_lists(world, "train", LABELED)
    write_lists(world, "test", JUDGED)

    def compare() -> dict[str, Any]:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        with side_by_side() as pool:
            submit, runs = pool.submit, {start: [] for start in STARTS}
            for number in range(seeds):
                for start, every in runs.items():
                    every.append(submit(train_and_judge, out, start, pretrained, number))
            return {"map": {start: [one.result() for one in every] for start, every in runs.items()}}

    return results.part(f"detection, {seeds} seeds", compare)["map"]


def main(out: Path = Path("runs/quickstart"), seed: int = 0, seeds: int = 3) -> None:
    """Train and judge the sample world's detectors.

    Args:
        out: Folder of a quickstart, or of what is to become one.
        seed: Of world, teacher and pre-training.
        seeds: Detectors of each start.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(table(run(out, seed, seeds)))


if __name__ == "__main__":
    tyro.cli(main)
