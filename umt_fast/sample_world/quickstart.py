"""The sample world from nothing to report: render, train a teacher, pre-train, compare, measure the masks, retrieve.

Each part leaves a file and is skipped when that file is there, so an interrupted quickstart goes on where it stopped.
Everything is trained by the code that trains the real models; the settings are in recipes/quickstart.py.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from umt_fast import recipe
from umt_fast.config import (
    ConfigError,
    DataConfig,
    FinetuneConfig,
    MaskConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
)
from umt_fast.data.decode.sampling import sparse_center
from umt_fast.data.decode.video import decode_frames
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.captions import read_captions
from umt_fast.data.sources.lists import read_list
from umt_fast.data.sources.prepared import Settings
from umt_fast.engine.checkpoint import checkpoints
from umt_fast.engine.distributed import current_ranks
from umt_fast.engine.precision import pick_device
from umt_fast.files import write_json
from umt_fast.models.teachers import build_teacher
from umt_fast.report import read_results, require_packages, write_report
from umt_fast.sample_world import small_clip
from umt_fast.sample_world import world as sample_world
from umt_fast.sample_world.frame_teacher import FrameSupervised
from umt_fast.tasks.classification import Supervised, accuracy
from umt_fast.tasks.evaluate import evaluate_checkpoint
from umt_fast.tasks.retrieve import RetrieveOptions
from umt_fast.train import fit_objective, train
from umt_fast.workers import worker_pool

log = logging.getLogger("umt_fast")

WORLD = {"train": 2400, "test": 480, "labeled": 480}
CLIP_STEPS, CLIP_BATCH = 900, 24


class Results:
    """results.json: written after each part, read to know what is done."""

    def __init__(self, folder: Path, seed: int | None = None) -> None:
        """seed: None: that of the quickstart in the folder, 0 where there is none."""
        self.path = folder / "results.json"
        self.values = read_results(self.path) if self.path.exists() else {"seed": seed or 0}
        self.seed: int = self.values.get("seed", 0)
        if seed not in (None, self.values.get("seed")):
            raise ConfigError(f"{folder} holds a quickstart of seed {self.values.get('seed')}; give another --out")

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs a part unless its results are there; notes its seconds."""
        if name not in self.values:
            log.info("== %s", name)
            started = time.perf_counter()
            values = make() or {}
            self.values[name] = values | {"seconds": round(time.perf_counter() - started, 1)}
            write_json(self.path, self.values, indent=1)
            log.info("== %s: %s", name, self.values[name])
        return self.values[name]


def newest_weights(run: Path) -> str:
    """The last checkpoint of a run folder."""
    return str(checkpoints(run)[-1][1])


def train_teacher(world: Path, teacher: TeacherConfig, path: Path, seed: int) -> dict[str, Any]:
    """Trains the small CLIP and writes its visual tower; returns its loss and zero-shot accuracy on unseen frames."""
    torch.manual_seed(seed)
    clip = small_clip.build_clip(teacher)
    groups = small_clip.frames_by_caption(world, "train", sample_world.read_scenes(world, "train"), 4)
    loss = small_clip.train_clip(
        clip, groups, image_size=teacher.image_size, steps=CLIP_STEPS, batch_size=CLIP_BATCH, seed=seed
    )
    unseen = small_clip.frames_by_caption(world, "test", sample_world.read_scenes(world, "test"), 4)
    small_clip.save_visual(clip.eval(), path)
    return {"loss": round(loss, 4), "zero_shot": small_clip.zero_shot_accuracy(clip, unseen), "captions": len(groups)}


def pack(out: Path, name: str, data: DataConfig) -> dict[str, Any]:
    """Prepares a list of the world, whose clips are read ten times and more: OUT/prepared/NAME, without its ending.

    data: of the training that will read it.
    """
    folder, settings = out / "prepared" / Path(name).stem, Settings(quality=95, sampling=data.sampling)
    return dict(prepare(out / "world" / name, folder, settings=settings, workers=os.cpu_count() or 1))


def evaluate(objective: nn.Module, config: FinetuneConfig, test_list: Path, device: torch.device) -> dict[str, Any]:
    """Accuracy of a trained objective on unseen clips."""
    objective = objective.to(device).eval()
    figures = accuracy(
        objective.logits,
        str(test_list),
        DataConfig(workers=config.data.workers),
        num_frames=config.student.num_frames,
        image_size=config.student.image_size,
        batch_size=64,
        device=device,
    )
    return {name: round(value, 4) for name, value in figures}


def tune(out: Path, label: str, start: str, teacher: TeacherConfig, pretrained: str, seed: int) -> float:
    """Trains the settings of a label, on the per-frame teacher if `start` is that, else the student, from `pretrained` weights
    ("": from scratch), in OUT/LABEL_START; accuracy on unseen clips."""
    config: FinetuneConfig = recipe.load(f"quickstart:{label}")
    config.run.seed = seed
    config.run.out = str(out / f"{label}_{start}")
    config.data.train = str(out / "world" / f"labeled_{label}.csv")
    config.data.prepared = (str(out / "prepared" / "labeled_motion"),)  # the same clips, whatever their labels
    config.init = pretrained
    torch.manual_seed(seed)
    objective = FrameSupervised(config, teacher) if start == "teacher" else Supervised(config)
    fit_objective(config, objective)
    device = pick_device(config.run.device)
    score = evaluate(objective, config, out / "world" / f"test_{label}.csv", device)["top1"]
    log.info("%s labels, %s: %.1f%% of unseen clips", label, start, 100 * score)
    return score


def _one_core() -> None:
    os.nice(5)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(process)d  %(message)s")


def side_by_side() -> AbstractContextManager[ProcessPoolExecutor]:
    """A pool for training runs beside the main one: one on a GPU, two on a CPU."""
    return worker_pool(1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1), __name__, _one_core)


class Comparison:
    """Fine-tuning from three starts on two kinds of labels, beside the main work.

    begin() starts the two runs of a start, as soon as what they start from is there; scores() waits for all.
    """

    def __init__(self, out: Path, teacher: TeacherConfig, seed: int, pool: ProcessPoolExecutor) -> None:
        self.settings, self.pool = (out, teacher, seed), pool
        self.runs: dict[tuple[str, str], Future[float]] = {}

    def begin(self, start: str, pretrained: str = "") -> None:
        """start: `scratch`, `teacher`, or `pretrained`, from the checkpoint that is given then."""
        out, teacher, seed = self.settings
        for label in ("motion", "scene"):
            self.runs[label, start] = self.pool.submit(tune, out, label, start, teacher, pretrained, seed)

    def scores(self) -> dict[str, Any]:
        """The accuracy of every label and start, once all are done."""
        scores: dict[str, Any] = {}
        for (label, start), run in self.runs.items():
            scores.setdefault(label, {})[start] = run.result()
        return scores


@torch.no_grad()
def draw_masks(out: Path, config: Stage1Config, clips: int = 96) -> dict[str, np.ndarray]:
    """Unseen clips, the pixels of their shapes, and the tokens each kind of mask keeps.

    Returns video uint8 (B, T, S, S, 3), foreground (B, T, L) share of each patch that is shape, and for each mask kind
    kept (B, n) flat indices.
    """
    world, vit = out / "world", config.student
    data = DataConfig(workers=0)
    every = read_list(world / "test_motion.csv", data)[:clips]
    loader = ClipLoader(
        every, data, num_frames=vit.num_frames, image_size=vit.image_size, batch_size=len(every), train=False
    )
    (batch,) = list(loader)
    teacher = build_teacher(config.teacher, config.align.num_layers)
    frames = sparse_center(sample_world.FRAMES, vit.num_frames)
    patch, side = vit.patch_size, vit.image_size // vit.patch_size
    shapes = np.stack(
        [
            [sample_world.foreground(scene, number) for number in frames.tolist()]
            for scene in sample_world.read_scenes(world, "test")[:clips]
        ]
    )
    shares = shapes.reshape(*shapes.shape[:2], side, patch, side, patch).mean((3, 5)).reshape(*shapes.shape[:2], -1)
    drawn = {"video": batch["video"].numpy(), "foreground": shares}
    for kind in ("semantic", "random", "tube"):
        mask = MaskConfig(kind=kind, ratio=config.mask.ratio)
        drawn[kind] = teacher(batch["video"], mask, torch.tensor([1])).visible.numpy()
    return drawn


def foreground_shares(drawn: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean share of shape pixels among the kept patches, by mask kind, and the ratio of semantic to random."""
    flat = drawn["foreground"].reshape(len(drawn["video"]), -1)
    kinds = ("semantic", "random", "tube")
    shares = {kind: float(np.take_along_axis(flat, drawn[kind], 1).mean()) for kind in kinds}
    shares["ratio"] = shares["semantic"] / shares["random"]
    return {name: round(value, 4) for name, value in shares.items()}


def measure_masks(out: Path, config: Stage1Config) -> dict[str, float]:
    """Foreground shares on unseen clips; a few of them with their kept tokens go to masks.npz for the report."""
    drawn = draw_masks(out, config)
    side = config.student.image_size // config.student.patch_size
    few = {name: drawn[name][:6] for name in ("video", "semantic", "random")}
    np.savez_compressed(out / "masks.npz", side=side, **few)
    return foreground_shares(drawn)


def stage1_config(out: Path, seed: int) -> Stage1Config:
    """The page's stage-1 run, on this world and teacher."""
    config: Stage1Config = recipe.load("quickstart:stage1")
    config.run.seed, config.run.out = seed, str(out / "stage1")
    config.data.train = str(out / "world" / "train_motion.csv")
    config.teacher.weights = str(out / "teacher.safetensors")
    return config


def write_vocabulary(folder: Path, captions: Path) -> None:
    """A BERT vocabulary of whole words: the special tokens and every word of a caption list."""
    words = sorted({word for caption in read_captions(captions).captions for word in caption.split()})
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")


def stage2_config(out: Path, seed: int, pretrained: str) -> Stage2Config:
    """The page's stage-2 run, on this world, teacher and pre-training."""
    config: Stage2Config = recipe.load("quickstart:stage2")
    config.run.seed, config.run.out = seed, str(out / "stage2")
    config.videos = (str(out / "world" / "train_captions.json"),)
    config.data.prepared = (str(out / "prepared" / "train_captions"),)
    config.teacher.weights, config.init = str(out / "teacher.safetensors"), pretrained
    config.tokenizer = str(out / "tokenizer")
    return config


def retrieve(out: Path, config: Stage2Config, show: int = 8) -> dict[str, Any]:
    """Zero-shot retrieval among unseen clips; `show` queries with the clips they found go to retrieval.npz."""
    table = out / "world" / "test_captions.json"
    run = Path(config.run.out)
    checkpoint, scores = Path(newest_weights(run)), run / "retrieval.json"
    options = RetrieveOptions(batch_size=32, scores=scores, workers=config.data.workers)
    figures = evaluate_checkpoint("retrieve", checkpoint, table, ranks=current_ranks(config.run), options=options)
    few = json.loads(scores.read_text())["t2v"][:show]
    if few:
        best = [[name for name, _ in query["found"][:3]] for query in few]
        frames = [[decode_frames(name, lambda count: sparse_center(count, 4)) for name in names] for names in best]
        right = [[name in query["right"] for name in names] for query, names in zip(few, best, strict=True)]
        np.savez_compressed(
            out / "retrieval.npz",
            caption=np.array([query["caption"] for query in few]),
            right=np.array(right),
            video=np.array(frames),
        )
    return {name: round(value, 4) for name, value in figures.items()}


def run(out: str | Path, seed: int = 0, stage2: bool = False) -> Path:
    """Runs what is missing of a quickstart and returns the report's path."""
    require_packages()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results, config = Results(out, seed), stage1_config(out, seed)
    world = out / "world"
    results.part("world", lambda: {"folder": str(sample_world.build(world, seed=seed, **WORLD))})
    results.part("labeled clips", lambda: pack(out, "labeled_motion.csv", config.data))
    weights = Path(config.teacher.weights)
    if not torch.cuda.is_available():
        # Models this small gain nothing from a second core; the comparison uses it.
        torch.set_num_threads(1)
    with side_by_side() as pool:
        comparison = Comparison(out, config.teacher, seed, pool)
        begin = comparison.begin if "comparison" not in results.values else lambda *start: None
        begin("scratch")
        results.part("teacher", lambda: train_teacher(world, config.teacher, weights, seed))
        begin("teacher")
        results.part("stage1", lambda: {"run": str(train(config))})
        pretrained = newest_weights(out / "stage1")
        begin("pretrained", pretrained)
        if stage2:
            second = stage2_config(out, seed, pretrained)
            results.part("captioned clips", lambda: pack(out, "train_captions.json", second.data))
            write_vocabulary(out / "tokenizer", world / "train_captions.json")
            results.part("stage2", lambda: {"run": str(train(second))})
            results.part("retrieval", lambda: retrieve(out, second))
        results.part("comparison", comparison.scores)
    results.part("foreground", lambda: measure_masks(out, config))
    report = write_report(out)
    log.info("checkpoint %s\nmetrics    %s\nreport     %s", pretrained, out / "stage1" / "metrics.jsonl", report)
    return report
