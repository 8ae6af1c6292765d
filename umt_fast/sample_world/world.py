"""The sample world: small H.264 videos whose labels are known, rendered from a seed in seconds.

A thing with a fine pattern (stripes, bars, checks, dots) moves in a straight line over a textured background, among plain
things of the same shapes and colors that move in other directions. What a single frame shows, the color and pattern of
the patterned thing, is the scene, and the captions of single frames name it. What no single frame shows is the motion: the
direction in which the patterned thing goes.

Both directions of an axis pass through the same places, so the frames of a clip out of order tell the axis and not the
sign: 2 of 4 classes, 50% at best. To do better a model must find the thing that matters and put its places in order.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from umt_fast.extras import packages_of
from umt_fast.workers import worker_pool

SIZE = 48
FRAMES = 16
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
}
PATTERNS = ("striped", "barred", "checked", "dotted")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("stripes", "checks", "dots", "sand", "waves")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PERIOD = 5.0
"""Pixels of one period of a pattern: finer than a patch, coarser than the compression."""
PLAIN_THINGS = 2
SPEED = (2.0, 2.6)
RADIUS, PLAIN_RADIUS = (7.5, 9.0), (6.0, 9.0)


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape on a straight path, half way along it at (x, y) in mid-clip."""

    shape: str
    color: str
    direction: str
    speed: float
    """Pixels per frame."""
    x: float
    y: float
    radius: float

    def center(self, frame: int) -> tuple[float, float]:
        """Pixel coordinates (x, y) of the thing in a frame."""
        way = self.speed * (frame - (FRAMES - 1) / 2)
        dx, dy = DIRECTIONS[self.direction]
        return self.x + dx * way, self.y + dy * way

    def covers(self, frame: int) -> np.ndarray:
        """(SIZE, SIZE) bool: its pixels in a frame."""
        x, y = _coordinates(self.center(frame))
        if self.shape == "circle":
            return x**2 + y**2 < self.radius**2
        if self.shape == "square":
            return np.maximum(abs(x), abs(y)) < 0.85 * self.radius
        return (y < 0.8 * self.radius) & (abs(x) < (y + self.radius) * 0.6)


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that decides one video."""

    seed: int
    thing: Thing
    pattern: str
    background: str
    plain: tuple[Thing, ...]
    """The things that do not matter, painted first."""

    @property
    def scene_label(self) -> int:
        """Pattern and color together: what a single frame tells."""
        return PATTERNS.index(self.pattern) * len(COLORS) + list(COLORS).index(self.thing.color)

    @property
    def motion_label(self) -> int:
        """The direction: what no single frame tells."""
        return list(DIRECTIONS).index(self.thing.direction)

    @property
    def still_caption(self) -> str:
        """What a single frame shows, in words: the thing that matters, and not where it is or goes."""
        return f"a {self.thing.color} {self.pattern} thing"

    @property
    def caption(self) -> str:
        """The whole clip in words."""
        return f"a {self.thing.color} {self.pattern} thing moves {self.thing.direction} over {self.background}"


NUM_SCENES = len(PATTERNS) * len(COLORS)
NUM_MOTIONS = len(DIRECTIONS)


def _draw_thing(rng: np.random.Generator, radius: tuple[float, float], spread: float) -> Thing:
    middle = rng.uniform(SIZE / 2 - spread, SIZE / 2 + spread, 2)
    return Thing(
        shape=str(rng.choice(SHAPES)),
        color=str(rng.choice(list(COLORS))),
        direction=str(rng.choice(list(DIRECTIONS))),
        speed=float(rng.uniform(*SPEED)),
        x=float(middle[0]),
        y=float(middle[1]),
        radius=float(rng.uniform(*radius)),
    )


def draw_scene(seed: int, number: int) -> Scene:
    """Scene `number` of a world; all parts independent and uniform."""
    rng = np.random.default_rng((seed, number))
    return Scene(
        seed=int(rng.integers(2**31)),
        thing=_draw_thing(rng, RADIUS, 2.0),
        pattern=str(rng.choice(PATTERNS)),
        background=str(rng.choice(BACKGROUNDS)),
        plain=tuple(_draw_thing(rng, PLAIN_RADIUS, 12.0) for _ in range(PLAIN_THINGS)),
    )


def _coordinates(center: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of every pixel relative to a center, each (SIZE, SIZE)."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    return x - center[0], y - center[1]


def foreground(scene: Scene, frame: int) -> np.ndarray:
    """(SIZE, SIZE) bool: the pixels of the patterned thing in a frame."""
    return scene.thing.covers(frame)


def _pattern(scene: Scene, frame: int, phase: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: where the pattern, which moves with its thing, is bright."""
    x, y = _coordinates(scene.thing.center(frame))
    x, y = (x + phase[0]) / PERIOD % 1, (y + phase[1]) / PERIOD % 1
    if scene.pattern == "striped":
        return y < 0.5
    if scene.pattern == "barred":
        return x < 0.5
    if scene.pattern == "checked":
        return (x < 0.5) == (y < 0.5)
    return (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.16


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
    bright = np.clip(np.array(COLORS[scene.thing.color]) + rng.uniform(-20, 20, 3), 0, 255)
    phase = rng.uniform(0, PERIOD, 2)
    # As bright on average as a pattern of bright and dark halves: only the pattern tells the things apart.
    plain = [np.clip(np.array(COLORS[t.color]) * 0.65 + rng.uniform(-30, 30), 0, 255) for t in scene.plain]
    frames = []
    for number in range(FRAMES):
        picture = background
        for thing, color in zip(scene.plain, plain, strict=True):
            picture = np.where(thing.covers(number)[..., None], color, picture)
        painted = np.where(_pattern(scene, number, phase)[..., None], bright, 0.3 * bright)
        frames.append(np.where(foreground(scene, number)[..., None], painted, picture))
    noise = rng.normal(0, 4, (FRAMES, SIZE, SIZE, 3))
    return np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8)


def _write(work: tuple[Scene, str]) -> None:
    with packages_of("video"):
        import av

    scene, path = work
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "16", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in render(scene):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def build(folder: str | Path, *, seed: int, train: int, test: int, labeled: int, workers: int = 2) -> Path:
    """Renders a world: `train` and `test` videos with lists beside them.

    Writes train/*.mp4 and test/*.mp4; for both splits <split>_scene.csv, <split>_motion.csv (path,label),
    <split>_captions.json ({"video", "caption"}; of test videos the first with each caption, so that every caption has one
    right answer) and <split>.json (the scenes); and labeled_scene.csv, labeled_motion.csv with the first `labeled`
    training videos. A folder rendered before with the same numbers is left as it is.
    """
    folder = Path(folder)
    marker = folder / "world.json"
    numbers = {"version": 3, "seed": seed, "train": train, "test": test, "labeled": labeled}
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
                (folder / f"labeled_{label}.csv").write_text("".join(lines[:labeled]))
        captions = [{"video": n, "caption": s.caption} for n, s in zip(names, scenes, strict=True)]
        if split == "test":
            first: dict[str, dict[str, str]] = {}
            for entry in captions:
                first.setdefault(entry["caption"], entry)
            captions = list(first.values())
        (folder / f"{split}_captions.json").write_text(json.dumps(captions, indent=1))
        (folder / f"{split}.json").write_text(json.dumps([asdict(scene) for scene in scenes]))
    with worker_pool(workers, __name__) as pool:
        list(pool.map(_write, work, chunksize=32))
    marker.write_text(json.dumps(numbers))
    return folder


def read_scenes(folder: str | Path, split: str) -> list[Scene]:
    """The scenes of a rendered split, in the order of its lists."""

    def scene(entry: dict) -> Scene:
        things = {"thing": Thing(**entry["thing"]), "plain": tuple(Thing(**plain) for plain in entry["plain"])}
        return Scene(**(entry | things))

    return [scene(entry) for entry in json.loads((Path(folder) / f"{split}.json").read_text())]
