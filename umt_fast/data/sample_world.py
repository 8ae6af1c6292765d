"""The sample world: small H.264 videos whose labels are known, rendered from a seed in seconds.

A coloured shape moves in a straight line over a textured background, and swells or shrinks once on its way. What a
single frame shows (shape, colour, background) is the scene; what it does not show is the motion: the direction, and
whether the shape swells before it shrinks or after. A path is drawn by its middle, then walked one way or the other, and
both orders of events go through the same sizes.

Place and size together do say something: "right, swelling first" and "left, shrinking first" pass through the same
frames, the other two pairs through other ones. A model that looks at frames one by one can therefore tell the axis and
the pair, 4 groups of 2 among the 8 motion classes: 50% at best. The sign of time it cannot see.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

SIZE = 48
FRAMES = 16
COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
    "yellow": (230, 210, 40), "purple": (160, 60, 200), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring")
BACKGROUNDS = ("stripes", "checks", "dots", "sand", "waves")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ORDERS = ("swells then shrinks", "shrinks then swells")


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that decides one video."""

    seed: int
    shape: str
    colour: str
    background: str
    direction: str
    order: str
    speed: float
    """Pixels per frame."""
    middle_x: float
    middle_y: float
    """Where the shape is half way along its path."""
    radius: float

    @property
    def scene_label(self) -> int:
        """Shape and colour together: what a single frame tells."""
        return SHAPES.index(self.shape) * len(COLOURS) + list(COLOURS).index(self.colour)

    @property
    def motion_label(self) -> int:
        """Direction and order of events together: what no single frame tells."""
        return list(DIRECTIONS).index(self.direction) * len(ORDERS) + ORDERS.index(self.order)

    @property
    def still_caption(self) -> str:
        """The thing a single frame shows, in words. Without the background: a teacher that must name it attends to it."""
        return f"a {self.colour} {self.shape}"

    @property
    def caption(self) -> str:
        """The whole clip in words."""
        return f"a {self.colour} {self.shape} moves {self.direction} over {self.background} and {self.order}"


NUM_SCENES = len(SHAPES) * len(COLOURS)
NUM_MOTIONS = len(DIRECTIONS) * len(ORDERS)


def draw_scene(seed: int, number: int) -> Scene:
    """Scene `number` of a world; all parts independent and uniform, the path as far inside as its axis needs."""
    rng = np.random.default_rng((seed, number))
    direction, speed = str(rng.choice(list(DIRECTIONS))), float(rng.uniform(1.4, 2.0))
    along, across = 4 + speed * (FRAMES - 1) / 2, 6
    horizontal = DIRECTIONS[direction][0] != 0
    margin_x, margin_y = (along, across) if horizontal else (across, along)
    return Scene(
        seed=int(rng.integers(2**31)),
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        background=str(rng.choice(BACKGROUNDS)),
        direction=direction,
        order=str(rng.choice(ORDERS)),
        speed=speed,
        middle_x=float(rng.uniform(margin_x, SIZE - margin_x)),
        middle_y=float(rng.uniform(margin_y, SIZE - margin_y)),
        radius=float(rng.uniform(9, 11)),
    )


def _radius(scene: Scene, frame: int) -> float:
    """Size over time: one full sine wave, odd about the middle, so that both orders go through the same sizes."""
    sign = 1 if scene.order == ORDERS[0] else -1
    return scene.radius * (1 + sign * 0.35 * np.sin(2 * np.pi * (frame + 0.5) / FRAMES))


def foreground(scene: Scene, frame: int) -> np.ndarray:
    """(SIZE, SIZE) bool: the pixels of the shape in a frame."""
    dx, dy = DIRECTIONS[scene.direction]
    way = scene.speed * (frame - (FRAMES - 1) / 2)
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    x, y = x - scene.middle_x - dx * way, y - scene.middle_y - dy * way
    radius = _radius(scene, frame)
    if scene.shape == "circle":
        return x**2 + y**2 < radius**2
    if scene.shape == "ring":
        return (x**2 + y**2 < radius**2) & (x**2 + y**2 > (0.55 * radius) ** 2)
    if scene.shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85 * radius
    return (y < 0.8 * radius) & (abs(x) < (y + radius) * 0.6)


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) float: a dim two-tone texture with random phase, pitch and tones."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    pitch, phase = rng.uniform(5, 9), rng.uniform(0, 9, 2)
    x, y = (x + phase[0]) / pitch, (y + phase[1]) / pitch
    if scene.background == "stripes":
        pattern = (x + y) % 2 < 1
    elif scene.background == "checks":
        pattern = (np.floor(x) + np.floor(y)) % 2 < 1
    elif scene.background == "dots":
        pattern = (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.09
    elif scene.background == "waves":
        pattern = (y + 0.5 * np.sin(2 * np.pi * x / 3)) % 2 < 1
    else:
        pattern = rng.random((SIZE, SIZE)) < 0.5
    light, dark = rng.uniform(90, 130, 3), rng.uniform(40, 75, 3)
    return np.where(pattern[..., None], light, dark)


def render(scene: Scene) -> np.ndarray:
    """uint8 (FRAMES, SIZE, SIZE, 3)."""
    rng = np.random.default_rng(scene.seed)
    background = _background(scene, rng)
    colour = np.clip(np.array(COLOURS[scene.colour]) + rng.uniform(-20, 20, 3), 0, 255)
    frames = [np.where(foreground(scene, number)[..., None], colour, background) for number in range(FRAMES)]
    noise = rng.normal(0, 4, (FRAMES, SIZE, SIZE, 3))
    return np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8)


def _write(work: tuple[Scene, str]) -> None:
    scene, path = work
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "16", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in render(scene):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def build(folder: str | Path, *, seed: int, train: int, test: int, labelled: int, workers: int = 2) -> Path:
    """Renders a world: `train` and `test` videos with lists beside them.

    Writes train/*.mp4 and test/*.mp4; for both splits <split>_scene.csv, <split>_motion.csv (path,label),
    <split>_captions.json ({"video", "caption"}) and <split>.json (the scenes); and labelled_scene.csv,
    labelled_motion.csv with the first `labelled` training videos. A folder rendered before with the same numbers is
    left as it is.
    """
    folder = Path(folder)
    marker, numbers = folder / "world.json", {"seed": seed, "train": train, "test": test, "labelled": labelled}
    if marker.exists() and json.loads(marker.read_text()) == numbers:
        return folder
    splits = {"train": range(train), "test": range(train, train + test)}
    work = []
    for split, range_of in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        scenes = [draw_scene(seed, number) for number in range_of]
        names = [f"{split}/{number:05d}.mp4" for number in range(len(scenes))]
        work += [(scene, str(folder / name)) for scene, name in zip(scenes, names, strict=True)]
        for label in ("scene", "motion"):
            lines = [f"{n},{getattr(s, f'{label}_label')}\n" for n, s in zip(names, scenes, strict=True)]
            (folder / f"{split}_{label}.csv").write_text("".join(lines))
            if split == "train":
                (folder / f"labelled_{label}.csv").write_text("".join(lines[:labelled]))
        captions = [{"video": n, "caption": s.caption} for n, s in zip(names, scenes, strict=True)]
        (folder / f"{split}_captions.json").write_text(json.dumps(captions, indent=1))
        (folder / f"{split}.json").write_text(json.dumps([asdict(scene) for scene in scenes]))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        list(pool.map(_write, work, chunksize=32))
    marker.write_text(json.dumps(numbers))
    return folder


def read_scenes(folder: str | Path, split: str) -> list[Scene]:
    """The scenes of a rendered split, in the order of its lists."""
    return [Scene(**entry) for entry in json.loads((Path(folder) / f"{split}.json").read_text())]
