"""All test views of a video come from one decode, and are what each view's own decode gives."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umt_fast.data.decode import classification_crops as crops
from umt_fast.data.decode import video
from umt_fast.data.decode.classification_frames import RULES, KineticsDense
from umt_fast.data.decode.multi_view import MultiViewReader, frames_of_views

VIDEOS = ("test.mp4", "demo.mp4", "part_0.mp4")
PROTOCOLS = [("kinetics_sparse", 4, 3), ("ssv2", 2, 3), ("kinetics_dense", 3, 1)]


@pytest.mark.parametrize(("rule", "segments", "count"), PROTOCOLS, ids=[name for name, *_ in PROTOCOLS])
@pytest.mark.parametrize("name", VIDEOS)
def test_views_are_those_of_a_decode_for_each(name: str, rule: str, segments: int, count: int, shared: Path) -> None:
    path, reader = shared / "videos" / name, MultiViewReader(RULES[rule], 4, 64, segments, count)
    views = reader.read(path)
    assert views.shape == (reader.num_views, 4, 64, 64, 3) and views.dtype == np.uint8
    for segment in range(segments):
        frames = video.decode_frames(path, lambda n, s=segment: RULES[rule].test(n, 4, segments, s))
        sized = crops.short_side_resized(frames, 64)
        for crop in range(count):
            window = crops.test_window(*sized.shape[1:3], count, crop)
            assert np.array_equal(views[segment * count + crop], crops.cut(sized, window)), (segment, crop)


@pytest.mark.parametrize("name", VIDEOS)
def test_twelve_views_are_one_pass_over_the_file(name: str, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened once; pictures made are the union of frames, and the decoder gives no more than a plain decode."""
    path, opened, pictures = shared / "videos" / name, [], []
    plain = sum(1 for _ in video.iterate_frames(path))
    open_video, picture = video.open_video, video.Pictures.of
    monkeypatch.setattr(video, "open_video", lambda *given: opened.append(1) or open_video(*given))
    monkeypatch.setattr(video.Pictures, "of", lambda made, frame: pictures.append(1) or picture(made, frame))
    MultiViewReader(RULES["kinetics_sparse"], 8, 32, 4, 3).read(path)
    wanted = set()
    for segment in range(4):
        wanted |= set(RULES["kinetics_sparse"].test(plain, 8, 4, segment).tolist())
    assert len(opened) == 1
    assert len(pictures) == len(wanted) <= min(plain, 32)


@pytest.mark.parametrize("rule", [*RULES.values(), KineticsDense(2)], ids=[*RULES, "dense by 2"])
@pytest.mark.parametrize("num_frames", [1, 5, 33, 301])
def test_each_frame_is_listed_once(rule: object, num_frames: int) -> None:
    wanted, places = frames_of_views(rule, num_frames, 8, 2)
    assert (np.diff(wanted) > 0).all() and wanted[0] >= 0 and wanted[-1] < num_frames
    assert set(places.ravel().tolist()) == set(range(len(wanted)))
    for segment in range(2):
        assert wanted[places[segment]].tolist() == rule.test(num_frames, 8, 2, segment).tolist()


def test_a_truncated_file_is_judged_by_what_decodes(shared: Path) -> None:
    """Its header says 50 frames, 28 decode: the views are those of a video of 28."""
    path, rule = shared / "videos" / "corrupted.mp4", RULES["kinetics_sparse"]
    decodable = sum(1 for _ in video.iterate_frames(path))
    views = MultiViewReader(rule, 4, 32, 3, 1).read(path)
    frames = video.decode_frames(path, lambda n: np.arange(n), decodable)
    sized = crops.short_side_resized(frames, 32)
    for segment in range(3):
        picked = sized[rule.test(decodable, 4, 3, segment)]
        assert np.array_equal(views[segment], crops.cut(picked, crops.test_window(*sized.shape[1:3], 1, 0)))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (9, 40, 50, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"img_{number + 1:05d}.png")
    rule = RULES["ssv2_folder"]
    views = MultiViewReader(rule, 4, 40, 2, 3).read_folder(tmp_path, 9, "img_{:05d}.png")
    for segment in range(2):
        frames = pictures[rule.test(9, 4, 2, segment)]
        # The short side is right already: 40 columns, 5 and 10 pixels further for each crop.
        for crop in range(3):
            assert np.array_equal(views[segment * 3 + crop], frames[:, :, 5 * crop : 5 * crop + 40])


def test_protocols_that_do_not_exist_are_refused(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 test segments"):
        MultiViewReader(RULES["ssv2"], 8, 224, 3, 3)
    with pytest.raises(ValueError, match="crops is 0"):
        MultiViewReader(RULES["ssv2"], 8, 224, 2, 0)
    shutil.copy(shared / "README.md", tmp_path / "no.mp4")
    with pytest.raises(video.VideoError, match=r"no\.mp4"):
        MultiViewReader(RULES["ssv2"], 8, 224, 2, 3).read(tmp_path / "no.mp4")
