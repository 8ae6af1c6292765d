"""The sample world is what it claims: labels true, motion hidden from single frames, files readable."""

from pathlib import Path

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data import sample_world as world
from umt_fast.data.manifest import read_list
from umt_fast.data.video import decode_frames


def centre(scene: world.Scene, frame: int) -> np.ndarray:
    return np.argwhere(world.foreground(scene, frame)).mean(0)[::-1]


def test_labels_are_true() -> None:
    for number in range(40):
        scene = world.draw_scene(1, number)
        way = centre(scene, world.FRAMES - 1) - centre(scene, 0)
        assert np.allclose(np.sign(np.round(way / 5)), world.DIRECTIONS[scene.direction])
        sizes = [world.foreground(scene, frame).sum() for frame in range(world.FRAMES)]
        swells_first = sum(sizes[: world.FRAMES // 2]) > sum(sizes[world.FRAMES // 2 :])
        assert swells_first == (scene.order == "swells then shrinks")
        assert scene.direction in scene.caption and scene.direction not in scene.still_caption


def test_neither_place_nor_size_of_one_frame_tells_the_motion() -> None:
    """Per frame, opposite directions and orders have the same mean place and size over many scenes."""
    scenes = [world.draw_scene(2, number) for number in range(600)]
    for frame in (0, 7, 15):
        for axis, pair in ((0, ("left", "right")), (1, ("up", "down"))):
            # Every path and its reversal are equally likely: the places a direction visits over a clip agree.
            visited = [
                np.mean([centre(s, f)[axis] for s in scenes if s.direction == name for f in (frame, 15 - frame)])
                for name in pair
            ]
            assert abs(visited[0] - visited[1]) < 2.0
    sizes = [
        np.mean([world.foreground(s, f).sum() for s in scenes if s.order == order for f in range(0, 16, 5)])
        for order in world.ORDERS
    ]
    assert abs(sizes[0] - sizes[1]) / sizes[0] < 0.12


def test_build_writes_a_readable_world_once(tmp_path: Path) -> None:
    numbers = {"seed": 3, "train": 6, "test": 2, "labelled": 4, "workers": 1}
    world.build(tmp_path, **numbers)
    clips = read_list(tmp_path / "train_motion.csv", DataConfig())
    scenes = world.read_scenes(tmp_path, "train")
    assert [clip.label for clip in clips] == [scene.motion_label for scene in scenes]
    assert len(read_list(tmp_path / "labelled_scene.csv", DataConfig())) == 4
    frames = decode_frames(clips[0].path, lambda count: np.arange(count))
    assert frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3)
    # Compression changes pixels, not the picture.
    assert abs(frames.astype(int) - world.render(scenes[0])).mean() < 12
    before = Path(clips[0].path).stat().st_mtime_ns
    world.build(tmp_path, **numbers)
    assert Path(clips[0].path).stat().st_mtime_ns == before
