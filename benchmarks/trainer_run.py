"""Thirty steps of the real Trainer on prepared clips: `python -m benchmarks.trainer_run SIZE`; gpu.py runs it.

The clips are the sample world's, scaled to 320 x 256, written as frame folders and packed by the real `prepare`, which needs
no PyAV for them. First a short run eagerly and one as the timed run goes, drop path off: their losses must agree. Then the
timed run, its clips/s as metrics.jsonl has them beside those of steps.py.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from benchmarks import rates
from benchmarks.steps import clips_of
from benchmarks.timing import DEVICE, GPU, Clocks, Lines, Row, out_folder, short
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import DataConfig, Stage1Config
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.prepared import Settings
from umt_fast.sample_world.world import FRAMES, draw_scene, render
from umt_fast.train import train

FILES, STEPS, COMPARED = (64, 30, 5) if GPU else (6, 4, 2)
WIDTH, HEIGHT = 320, 256


def _write(work: tuple[int, str]) -> None:
    number, folder = work
    Path(folder).mkdir(parents=True)
    for frame, picture in enumerate(render(draw_scene(0, number)), 1):
        large = Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        large.save(f"{folder}/img_{frame:05d}.jpg", quality=90)


def prepared_clips(folder: Path, files: int, rows: int, workers: int) -> DataConfig:
    """A list of `rows` rows that name `files` prepared clips over and over."""
    names = [str(folder / "frames" / f"{number:05d}") for number in range(files)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write, enumerate(names), chunksize=4))
    lines = [f"{name},{FRAMES},0\n" for name in names]
    (folder / "once.csv").write_text("".join(lines))
    prepare(folder / "once.csv", folder / "prepared", settings=Settings(short_side=HEIGHT), workers=workers)
    (folder / "list.csv").write_text("".join(lines[number % files] for number in range(rows)))
    return DataConfig(train=str(folder / "list.csv"), prepared=(str(folder / "prepared"),))


def metrics_of(config: Stage1Config, out: Path, steps: int, **changes: object) -> list[Row]:
    """The rows of metrics.jsonl of a run of so many steps."""
    config = copy.deepcopy(config)
    config.run = replace(config.run, out=str(out), max_steps=steps, **changes)
    train(config)
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


def main(model: str) -> None:
    clips, cores = clips_of(model), os.cpu_count() or 1
    lines = Lines(out_folder(), "steps.jsonl")
    about = {"bench": "trainer", "model": model, "batch_size": clips, "dtype": rates.NAME}
    fast = {"compile": True, "cuda_graph": True} if GPU else {}
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        data = prepared_clips(folder, FILES, clips * STEPS, min(8, cores))
        print(f"{FILES} clips prepared in {time.perf_counter() - started:.1f} s", flush=True)
        config = stage1_config(model, clips, rates.NAME)
        config.data = replace(data, workers=max(0, min(14, cores - 2)))
        config.run = replace(config.run, device=DEVICE.type, tensorboard=False, log_every=1, epochs=100)
        still = copy.deepcopy(config)
        still.student = replace(still.student, drop_path=0.0)
        kinds = {"eager": {}, "as timed": fast} if GPU else {"eager": {}, "again": {}}
        losses = {}
        for kind, changes in kinds.items():
            try:
                rows = metrics_of(still, folder / kind.replace(" ", "-"), COMPARED, **changes)
                losses[kind] = [row["loss"] for row in rows]
            except Exception as error:  # the timed run counts all the same
                lines.add(about | {"variant": f"losses, {kind}", "error": short(error)})
        if len(losses) == 2:
            first, second = losses.values()
            gap = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
            row = {"bench": "trainer losses", "losses": losses, "largest_relative_gap": gap, "ok": gap < 0.01}
            lines.add(
                about | row | {"how": f"{COMPARED} steps of the Trainer, drop path off, the same clips and masks"}
            )
            print(f"largest gap of losses, drop path off: {gap:.2g}", flush=True)
        window = max(1, STEPS // 3)
        with Clocks() as clocks:
            rows = metrics_of(config, folder / "timed", STEPS, log_every=window, **fast)
        # Rows of one window share its rate; the first window holds warming up, compiling and recording.
        later = [rows[at] for at in range(window, len(rows), window)]
        found = {
            "variant": "compiled+graph" if fast else "eager",
            "steps": STEPS,
            "workers": config.data.workers,
            "clips_per_s": statistics.median(row["clips_per_s"] for row in later),
            "clips_per_s_windows": [row["clips_per_s"] for row in later],
            "data_wait": statistics.median(row["data_wait"] for row in later),
            "clocks": clocks.row(),
            "how": f"the Trainer's own metrics.jsonl, windows of {window} steps after the first; JPEGs decoded by the loader",
        }
        lines.add(about | found)
        print(
            f"Trainer: {found['clips_per_s']} clips/s, waits for data {found['data_wait']:.0%} of the time", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1])
