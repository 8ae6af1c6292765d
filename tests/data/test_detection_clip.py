"""Frames of detection clips from one-second files, and their views, where the parity files do not reach."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.videos import write_video
from umt_fast.data.decode import detection_view as views
from umt_fast.data.decode.detection_clip import SecondFiles, Temporal
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.sources.detections import KeyFrame


def encode(path: Path, levels: list[int], width: int = 48, height: int = 32) -> None:
    """A video of one gray level a frame."""
    pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (np.full((height, width, 3), level, np.uint8) for level in levels), crf="0")


COUNTS = {897: 10, 898: 10, 899: 7, 900: 10, 901: 4, 902: 10, 903: 9, 904: 3, 905: 10, 906: 10}


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds 897 to 906 of a movie, some of them short; a frame's gray tells its place in the movie."""
    root, level = tmp_path_factory.mktemp("movies"), 4
    for second, count in COUNTS.items():
        encode(root / "m" / f"{second}.mp4", list(range(level, level + 3 * count, 3)))
        level += 3 * count
    return root


def levels(frames: np.ndarray) -> list[int]:
    return [round((value - 4) / 3) for value in frames.mean((1, 2, 3)).tolist()]


def joined(second: int, span: int) -> list[int]:
    """Places in the movie of the frames of a clip, file by file as the rule says it."""
    first, places = 0, {}
    for file, count in COUNTS.items():
        places[file] = list(range(first, first + count))
        first += count
    right: list[int] = []
    file = second
    while len(right) < span // 2:
        right, file = right + places[file], file + 1
    left: list[int] = []
    file = second - 1
    while len(left) < span - span // 2:
        left, file = places[file] + left, file - 1
    half = min(len(left), len(right))
    return left[-half:] + right[:half]


@pytest.mark.parametrize("spread", ["center", "even"])
@pytest.mark.parametrize("second,span,count,rate", [(902, 40, 8, 2), (902, 31, 4, 8), (901, 2, 8, 8), (903, 22, 5, 3)])
def test_chosen_frames_come_from_the_right_files(
    movies: Path, spread: str, second: int, span: int, count: int, rate: int
) -> None:
    temporal = Temporal(num_frames=count, rate=rate, span=span, spread=spread)
    clip = joined(second, span)
    expected = [clip[n] for n in temporal.indices(len(clip))]
    assert levels(SecondFiles(movies).read("m", second, temporal)) == expected


def test_released_sparse_sampling_sees_what_dense_sampling_describes() -> None:
    """Both are a window around the key frame, so that 300 frames are read for the frames of 64."""
    sparse, dense = Temporal.official(sparse=True), Temporal.official(sparse=False, as_described=True)
    assert (sparse.span, dense.span) == (300, 64) and Temporal() == sparse
    assert (sparse.indices(300) - 150).tolist() == (dense.indices(64) - 32).tolist()
    spread = Temporal.official(sparse=True, as_described=True)
    assert spread.indices(300).tolist() == [18, 56, 93, 131, 168, 206, 243, 281]


def test_a_missing_file_is_named_with_a_remedy(movies: Path) -> None:
    files = SecondFiles(movies)
    with pytest.raises(VideoError, match=r"907\.mp4 is missing; cut each movie"):
        files.read("m", 905, Temporal(span=60))
    assert files.read("m", 905, Temporal(span=20, num_frames=2, rate=2)).shape == (2, 32, 48, 3)
    with pytest.raises(VideoError, match=r"n/902\.mp4 is missing"):
        files.read("n", 902, Temporal())


def test_missing_files_are_told_before_any_is_read(movies: Path) -> None:
    files = SecondFiles(movies)
    files.require([("m", 898), ("m", 906)])
    with pytest.raises(
        DataError, match=r"3 one-second files are missing, the first is .*m/896\.mp4 .*; cut each movie"
    ):
        files.require([("m", 897), ("m", 902), ("n", 902)])


def test_a_file_that_decodes_to_fewer_frames_than_it_announces(movies: Path, shared: Path, tmp_path: Path) -> None:
    """28 of 50: the frames after them come from the next file."""
    broken = tmp_path / "m" / "902.mp4"
    broken.parent.mkdir()
    shutil.copy(shared / "videos" / "corrupted.mp4", broken)
    from umt_fast.data.decode.video import iterate_frames, outline

    announced, decodable = outline(broken), sum(1 for _ in iterate_frames(broken))
    assert decodable < announced.count
    for second in (901, 903):
        encode(tmp_path / "m" / f"{second}.mp4", [60] * 60, announced.width, announced.height)
    temporal = Temporal(num_frames=10, span=100, spread="even")
    frames = SecondFiles(tmp_path).read("m", 902, temporal)
    flat = [frame.std() < 2 for frame in frames]
    places = temporal.indices(120)  # 60 frames before, and as many after: the broken file's, then the next one's
    assert flat == [not 60 <= place < 60 + decodable for place in places.tolist()]


def test_sizes_of_movies(movies: Path) -> None:
    assert SecondFiles(movies).sizes(["m", "absent"]) == {"m": (48, 32)}


@pytest.mark.parametrize(
    "wrong", [{"num_frames": 0}, {"rate": 0}, {"span": 1}, {"spread": "sparse"}], ids=lambda wrong: next(iter(wrong))
)
def test_sampling_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        Temporal(**wrong)


def test_a_picture_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(DataError, match=r"crop is 224 pixels; it must lie in \[1, short_side = 200\]"):
        views.ViewRule(short_side=200)
    view = views.View(np.zeros((1, 30, 40, 3), np.uint8), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="a crop of 31 pixels does not fit a picture of 40 x 30"):
        views.cropped(view, 31, 0.5, 0.5)
    assert views.cropped(view, 30, 0.999, 0.999).size == (30, 30)


@pytest.fixture
def opencv() -> None:
    pytest.importorskip("cv2", reason="views are resized by OpenCV: pip install opencv-python-headless")


def key_frame(boxes: int, size: tuple[int, int] = (60, 40)) -> KeyFrame:
    corners = torch.rand(boxes, 4) * 15
    corners[:, 2:] += 16
    return KeyFrame("m", 902, size, corners, torch.eye(boxes, 80, dtype=torch.bool), torch.rand(boxes))


def test_a_picture_of_the_wanted_short_side_is_stretched_as_officially(opencv: None) -> None:
    frames = np.zeros((1, 32, 48, 3), np.uint8)
    frames[:, :, 24:] = 200
    view = views.test_view(frames, torch.tensor([[24.0, 0, 47, 31]]), (48, 32), views.ViewRule(short_side=32, crop=32))
    assert view.frames.shape == (1, 48, 32, 3)
    torch.testing.assert_close(view.boxes, torch.tensor([[16.0, 0, 47 * 2 / 3, 46.5]]))
    assert view.frames[0, :, 17:].min() == 200 and view.frames[0, :, :15].max() == 0


def test_boxes_follow_the_annotations_size_and_not_the_files(opencv: None) -> None:
    """Annotated on pictures twice as large as the files'."""
    frames = np.zeros((1, 40, 60, 3), np.uint8)
    rule = views.ViewRule(short_side=20, crop=20)
    small = views.test_view(frames, torch.tensor([[6.0, 8, 30, 20]]), (60, 40), rule)
    large = views.test_view(frames, torch.tensor([[12.0, 16, 60, 40]]), (120, 80), rule)
    torch.testing.assert_close(small.boxes, large.boxes)
    torch.testing.assert_close(small.boxes, torch.tensor([[3.0, 4, 15, 10]]))


def test_draws_cover_their_ranges() -> None:
    rng = np.random.default_rng(1)
    drawn = [views.draw(views.ViewRule(), rng) for _ in range(4000)]
    for name, most in (("hue", 10), ("saturation", 26), ("brightness", 26)):
        assert {getattr(one, name) for one in drawn} == set(range(-most, most + 1))
    for name in ("x", "y", "mirror"):
        values = np.array([getattr(one, name) for one in drawn])
        assert 0 <= values.min() and values.max() < 1 and abs(values.mean() - 0.5) < 0.02


def test_of_too_many_boxes_a_random_choice_keeps_its_labels(opencv: None) -> None:
    """Box n has class n alone, and lies in column n of the picture."""
    count, rng = 60, np.random.default_rng(1)
    left = torch.arange(count, dtype=torch.float32)
    boxes = torch.stack([left, torch.full_like(left, 10), left + 1, torch.full_like(left, 30)], 1)
    key = KeyFrame("m", 902, (60, 40), boxes, torch.eye(count, 80, dtype=torch.bool), None)
    rule = views.ViewRule(short_side=40, crop=40, mirror=0.0)
    frames = np.zeros((1, 60, 40, 3), np.uint8)  # comes out 60 wide, 40 tall: see short_side_size
    seen = set()
    for _ in range(20):
        sample = views.training_sample(0, key, frames, rule, rng, max_boxes=5)
        assert sample.boxes.shape == (5, 4) and sample.labels.sum(1).tolist() == [1] * 5
        chosen = sample.labels.float().argmax(1)
        # One crop moves all boxes alike, up to their own sides' jitter of less than a pixel.
        inside = (sample.boxes[:, 0] > 1) & (sample.boxes[:, 2] < 38)
        moved = sample.boxes[inside, 0] - chosen[inside]
        assert (moved.max() - moved.min() < 1.5) if inside.any() else True
        seen |= set(chosen.tolist())
    assert len(seen) > 30


def test_a_batch_is_padded_in_pixels_and_boxes() -> None:
    frames = [np.full((2, *size, 3), 9, np.uint8) for size in ((20, 33), (17, 16), (5, 5))]
    keys = [key_frame(2), key_frame(0), key_frame(3)]
    samples = [
        views.Sample(10 + n, frame, key.boxes, key.labels, None)
        for n, (frame, key) in enumerate(zip(frames, keys, strict=True))
    ]
    batch = views.batched(samples, boxes_per_clip=3)
    assert batch["index"].tolist() == [10, 11, 12]
    assert batch["video"].shape == (3, 2, 32, 48, 3) and batch["sizes"].tolist() == [[20, 33], [17, 16], [5, 5]]
    assert batch["video"].sum() == 9 * 2 * 3 * (20 * 33 + 17 * 16 + 25)
    assert batch["box_clip"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch["box_valid"].tolist() == [True, True, False, False, False, False, True, True, True]
    assert batch["boxes"].shape == (9, 4) and batch["labels"].shape == (9, 80)
    assert torch.equal(batch["boxes"][:2], keys[0].boxes) and torch.equal(batch["boxes"][6:], keys[2].boxes)
    assert not batch["boxes"][2:6].any() and not batch["labels"][2:6].any()
    assert views.batched(samples)["boxes"].shape == (5, 4)
    with pytest.raises(ValueError, match="a clip has 3 boxes, and there is room for 1 a clip; raise boxes_per_clip"):
        views.batched(samples, boxes_per_clip=1)
    empty = views.batched(samples[1:2])
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0, 80) and empty["box_clip"].shape == (0,)


def test_boxes_are_moved_in_training_and_widened_in_testing(opencv: None) -> None:
    """Sides move by at most a fifth of the width and a tenth of the height, and by all of that in some draws."""
    frames = np.zeros((1, 60, 40, 3), np.uint8)  # comes out 60 wide, 40 tall
    key = KeyFrame("m", 902, (40, 60), torch.tensor([[15.0, 30, 24, 44]]), torch.ones(1, 80, dtype=torch.bool), None)
    rule = views.ViewRule(short_side=40, crop=40, mirror=0.0)
    plain = views.test_view(frames, key.boxes, key.size, rule).boxes[0]
    width, height = plain[2] - plain[0] + 1, plain[3] - plain[1] + 1
    rng, moved = np.random.default_rng(2), []
    for _ in range(400):
        moved.append(views.training_sample(0, key, frames, rule, rng).boxes[0] - plain)
    # The crop shifts left and right alike: what is left is how far the sides move against each other.
    stretch = torch.stack(moved)[:, 2:] - torch.stack(moved)[:, :2]
    for column, extent, out, inward in ((0, width, 0.2, 0.1), (1, height, 0.1, 0.05)):
        share = stretch[:, column] / extent
        assert -2 * inward - 1e-4 < share.min() < -1.4 * inward and 1.6 * out < share.max() < 2 * out + 1e-4
    tested = views.test_sample(0, key._replace(labels=None, scores=torch.ones(1)), frames, rule).boxes[0]
    pad = torch.tensor([0.05 * width, 0.025 * height])
    torch.testing.assert_close(tested, plain + torch.cat([-pad, pad]))


def test_views_of_a_clip_without_boxes(opencv: None) -> None:
    rule = views.ViewRule(short_side=40, crop=32)
    frames = np.random.default_rng(0).integers(0, 256, (2, 44, 60, 3)).astype(np.uint8)
    trained = views.training_sample(3, key_frame(0), frames, rule, np.random.default_rng(0))
    tested = views.test_sample(4, key_frame(0), frames, rule)
    assert trained.boxes.shape == tested.boxes.shape == (0, 4) and trained.labels.shape == (0, 80)
    assert trained.frames.shape == (2, 32, 32, 3) and tested.frames.shape == (2, 40, 54, 3)


def test_without_opencv_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DataError, match=r"pip install 'umt_fast\[detection\]'"):
        views.colored(np.zeros((1, 4, 4, 3), np.uint8), 0, 0, 0)
