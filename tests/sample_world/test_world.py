"""The sample world is what it claims: labels true, motion hidden from single frames, files readable."""

import json
from pathlib import Path

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.decode.video import decode_frames
from umt_fast.data.sources.lists import read_list
from umt_fast.sample_world import world


def test_labels_are_true() -> None:
    """Measured on the pixels that the patterned thing covers."""
    for number in range(40):
        scene = world.draw_scene(1, number)
        places = [np.argwhere(world.foreground(scene, frame)).mean(0)[::-1] for frame in (4, 11)]
        way = np.round((places[1] - places[0]) / 8)
        assert tuple(np.sign(way)) == world.DIRECTIONS[scene.thing.direction]
        assert scene.motion_label == list(world.DIRECTIONS).index(scene.thing.direction)
        assert scene.thing.direction in scene.caption and scene.thing.direction not in scene.still_caption
        assert scene.pattern in scene.still_caption and scene.thing.color in scene.still_caption


def test_the_patterned_thing_is_the_one_with_a_pattern() -> None:
    """Neighboring rows or columns differ inside it; plain things are flat but for noise."""
    for number in range(20):
        scene = world.draw_scene(4, number)
        picture = world.render(scene)[8].astype(float).mean(2)
        inside = world.foreground(scene, 8)
        plain = scene.plain[-1].covers(8) & ~inside
        assert picture[inside].std() > 25
        assert plain.sum() < 20 or picture[plain].std() < 12


def accuracy_of_a_linear_rule(features: np.ndarray, labels: np.ndarray) -> float:
    """Ridge regression to one-hot labels on three quarters of the rows, right answers on the rest."""
    features = np.c_[(features - features.mean(0)) / (features.std(0) + 1e-9), np.ones(len(features))]
    cut = len(features) * 3 // 4
    train, targets = features[:cut], np.eye(world.NUM_MOTIONS)[labels[:cut]]
    weights = np.linalg.solve(train.T @ train + np.eye(train.shape[1]), train.T @ targets)
    return float(((features[cut:] @ weights).argmax(1) == labels[cut:]).mean())


def test_frames_out_of_order_tell_the_axis_and_not_the_sign() -> None:
    """Rules fitted to everything that can be measured in a clip's frames, with and without their order."""
    scenes = [world.draw_scene(2, number) for number in range(4000)]
    labels = np.array([scene.motion_label for scene in scenes])

    def frame_of(scene: world.Scene, frame: int) -> list[float]:
        rows = []
        for thing in (scene.thing, *scene.plain):
            x, y = thing.center(frame)
            rows += [x, y, x * x, y * y, x * y, x**3, y**3, thing.radius]
        return rows

    frames = np.array([[frame_of(scene, frame) for frame in (1, 5, 10, 14)] for scene in scenes])
    without_order = np.c_[frames.mean(1), frames.min(1), frames.max(1)]
    assert 0.35 < accuracy_of_a_linear_rule(without_order, labels) < 0.56
    assert accuracy_of_a_linear_rule(frames.reshape(len(frames), -1), labels) > 0.95
    # The things that do not matter say nothing about the label, in order or not.
    assert accuracy_of_a_linear_rule(frames[:, :, 8:].reshape(len(frames), -1), labels) < 0.31


def test_build_writes_a_readable_world_once(tmp_path: Path) -> None:
    numbers = {"seed": 3, "train": 6, "test": 2, "labeled": 4, "workers": 1}
    world.build(tmp_path, **numbers)
    clips = read_list(tmp_path / "train_motion.csv", DataConfig())
    scenes = world.read_scenes(tmp_path, "train")
    assert [clip.label for clip in clips] == [scene.motion_label for scene in scenes]
    assert len(read_list(tmp_path / "labeled_scene.csv", DataConfig())) == 4
    frames = decode_frames(clips[0].path, lambda count: np.arange(count))
    assert frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3)
    # Compression changes pixels, not the picture.
    assert abs(frames.astype(int) - world.render(scenes[0])).mean() < 12
    before = Path(clips[0].path).stat().st_mtime_ns
    world.build(tmp_path, **numbers)
    assert Path(clips[0].path).stat().st_mtime_ns == before


def test_a_caption_of_the_test_split_has_one_right_clip(tmp_path: Path) -> None:
    numbers = {"seed": 3, "train": 1, "test": 60, "labeled": 1, "workers": 1}
    world.build(tmp_path, **numbers)
    scenes = world.read_scenes(tmp_path, "test")
    entries = json.loads((tmp_path / "test_captions.json").read_text())
    captions = [entry["caption"] for entry in entries]
    assert len(set(captions)) == len(captions) < len(scenes), "the seed must give some caption twice"
    assert set(captions) == {scene.caption for scene in scenes}
    for entry in entries:
        assert scenes[int(Path(entry["video"]).stem)].caption == entry["caption"]
