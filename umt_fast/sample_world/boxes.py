"""The sample world's boxes, in AVA's formats: which way does each thing move?

The key frame of a clip is second KEY_SECOND, in its middle. Every thing of a scene, patterned or plain, has a box there, and a
class of MOTIONS. A thing that others cover by half or more has none.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from umt_fast.sample_world import world as sample_world
from umt_fast.sample_world.world import DIRECTIONS, SIZE, Scene

RATE = 8
"""Frames per second of the world's videos."""
KEY_SECOND = 1
MOTIONS = {number: f"moves {direction}" for number, direction in enumerate(DIRECTIONS, 1)}
"""Class numbers, from 1, and names."""
_LEAST_SEEN = 0.5


def boxes_of(scene: Scene) -> list[tuple[tuple[float, float, float, float], int]]:
    """Boxes (x1, y1, x2, y2), in shares of the picture, and class numbers of the things that the key frame shows."""
    frame = KEY_SECOND * RATE
    things = [*scene.plain, scene.thing]  # in the order they are painted
    masks = [thing.covers(frame) for thing in things]
    found = []
    for number, (thing, mask) in enumerate(zip(things, masks, strict=True)):
        hidden = np.logical_or.reduce([np.zeros_like(mask), *masks[number + 1 :]])
        if not mask.any() or (mask & ~hidden).sum() <= _LEAST_SEEN * mask.sum():
            continue
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        found.append((tuple(float(value) / SIZE for value in corners), 1 + list(DIRECTIONS).index(thing.direction)))
    return found


def write_lists(world: str | Path, split: str, count: int) -> Path:
    """AVA's files for the first `count` clips of a rendered split; returns the ground truth, WORLD/SPLIT_boxes.csv.

    Beside it: SPLIT_detected.csv, the same boxes as a person detector would give them, with score 1, and motions.pbtxt.
    Movies are called SPLIT/NUMBER, as their files below the world are.
    """
    world = Path(world)
    truth, detected = [], []
    for number, scene in enumerate(sample_world.read_scenes(world, split)[:count]):
        for thing, (corners, label) in enumerate(boxes_of(scene)):
            place = [f"{split}/{number:05d}", f"{KEY_SECOND:04d}", *(f"{value:.4f}" for value in corners)]
            truth.append([*place, label, thing])
            detected.append([*place, "", "1.000"])
    for name, rows in ((f"{split}_boxes.csv", truth), (f"{split}_detected.csv", detected)):
        with open(world / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    items = (f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in MOTIONS.items())
    (world / "motions.pbtxt").write_text("".join(items))
    return world / f"{split}_boxes.csv"
