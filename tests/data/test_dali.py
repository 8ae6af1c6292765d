"""The DALI reader against the CPU reader, with what DALI decodes without a GPU: VP9 and MJPEG videos, prepared JPEGs."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.opening import open_loader
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.lists import Clip, read_list
from umt_fast.data.sources.prepared import Settings

dali = pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install 'umt_fast[dali]')")
CPU = torch.device("cpu")
KIND = {"num_frames": 4, "image_size": 32, "batch_size": 2, "seed": 3}


def moving(path: Path, codec: str, count: int, phase: int) -> None:
    """Colors that move under fine gray stripes: a wrong frame, crop, mirror or filter is far outside the tolerance."""
    rows, columns = np.mgrid[0:60, 0:80] / 12
    stripes = 30 * (np.indices((60, 80)).sum(0) % 3 - 1)[..., None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "10", "b:v": "2M"} if codec != "mjpeg" else {})
        stream.width, stream.height = 80, 60
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            shift = 0.4 * number + phase
            waves = [np.sin(columns + shift), np.cos(rows - shift), np.sin(rows + columns + 2 * shift)]
            picture = (128 + 90 * np.stack(waves, -1) + stripes).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips")
    names = []
    for number, (suffix, codec) in enumerate((("webm", "libvpx-vp9"), ("avi", "mjpeg"), ("mp4", "libvpx-vp9"))):
        names += [folder / f"{number}.{suffix}"]
        moving(names[-1], codec, 21 + number, number)
    return [Clip(path=str(names[number % 3]), label=number) for number in range(6)]


def both(clips: list[Clip], data: dict[str, object], **kind: object) -> tuple[list[dict], list[dict]]:
    loaders = [
        open_loader(clips, DataConfig(workers=0, reader=reader, **data), device=CPU, **(KIND | kind))
        for reader in ("cpu", "dali")
    ]
    return list(loaders[0]), list(loaders[1])


def assert_close(expected: list[dict], found: list[dict]) -> None:
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["label"], other["label"])
        assert other["video"].dtype == torch.uint8 and one["video"].shape == other["video"].shape
        apart = (one["video"].int() - other["video"].int()).abs()
        # Of 255; seen: 1.2 and 14. FFmpeg's color conversion rounds down, DALI's does not, and interpolates MJPEG's chroma.
        assert apart.float().mean() < 2 and apart.max() <= 20, (apart.float().mean(), apart.max())


@pytest.mark.parametrize("augment", ["multi_scale_crop", "random_resized_crop"])
def test_same_pictures_as_the_cpu_reader(clips: list[Clip], augment: str) -> None:
    expected, found = both(clips, {"augment": augment, "num_sample": 2})
    assert_close(expected, found)
    # The tolerance tells a mirrored picture and a neighboring frame from the right ones.
    for wrong in (expected[0]["video"].flip(3), expected[0]["video"].roll(1, 1)):
        assert (wrong.int() - found[0]["video"].int()).abs().float().mean() > 20


def test_evaluation_and_dense_sampling(clips: list[Clip]) -> None:
    assert_close(*both(clips, {"sampling": "dense"}, train=False, batch_size=4))


@pytest.mark.parametrize("train", [True, False])
def test_intervals_of_the_first_seconds_and_whole_frames(train: bool, clips: list[Clip]) -> None:
    """As retrieval sees them; 21 frames at 10 a second, of which the first 12 are sampled."""
    augment = "random_resized_crop" if train else "whole"
    data = {"sampling": "intervals", "augment": augment, "max_seconds": 1.2}
    assert_close(*both(clips, data, train=train, num_frames=3))


def test_bicubic_pixels_are_those_of_the_cpu_reader(tmp_path: Path) -> None:
    """MJPEG of gray pictures decodes almost alike everywhere, so that the resizing alone remains."""
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "gray.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10, options={"q:v": "2"})
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuvj420p"
        for _ in range(12):
            picture = np.repeat(rng.integers(0, 256, (64, 80, 1), dtype=np.uint8), 3, 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clips = [Clip(path=str(tmp_path / "gray.avi"))] * 4
    for data in ({"augment": "random_resized_crop", "num_sample": 2}, {"augment": "whole"}):
        for one, other in zip(*both(clips, data), strict=True):
            apart = (one["video"].int() - other["video"].int()).abs()
            # Color conversion rounds differently. DALI's own cubic filter would be 16 and 2 away.
            assert apart.max() <= 3 and apart.float().mean() < 1, (apart.max(), apart.float().mean())


def test_the_best_of_several_streams(tmp_path: Path) -> None:
    """Dark and small first, bright and large second and the default."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for number, side in enumerate((32, 64)):
            streams.append(container.add_stream("libvpx-vp9", rate=10, options={"crf": "10", "b:v": "2M"}))
            streams[-1].width, streams[-1].height, streams[-1].pix_fmt = side, side * 3 // 4, "yuv420p"
            streams[-1].disposition = number  # AV_DISPOSITION_DEFAULT is 1
        for number in range(12):
            for stream, level in zip(streams, (3, 120), strict=True):
                picture = np.full((stream.height, stream.width, 3), level + 10 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    expected, found = both([Clip(path=str(path))] * 2, {})
    assert_close(expected, found)
    assert found[0]["video"].float().mean() > 120


def test_prepared_clips(clips: list[Clip], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("".join(f"{clip.path},{clip.label}\n" for clip in clips[:3]))
    prepare(tmp_path / "list.csv", tmp_path / "out", settings=Settings(segments=4), workers=0)
    assert_close(*both([*read_list(tmp_path / "out", DataConfig())] * 2, {"num_sample": 2}))


def test_state_resumes_exactly(clips: list[Clip]) -> None:
    data = DataConfig(workers=0, reader="dali", prefetch=3)
    whole = list(open_loader(clips, data, device=CPU, **KIND))
    first = open_loader(clips, data, device=CPU, **KIND)
    iterator = iter(first)
    next(iterator)
    state = first.state_dict()
    iterator.close()
    for loader in (first, open_loader(clips, data, device=CPU, **KIND)):
        loader.load_state_dict(state)
        rest = list(loader)
        assert len(rest) == 2 and all(torch.equal(a["video"], b["video"]) for a, b in zip(rest, whole[1:], strict=True))


def test_bad_files_cost_their_own_clip_and_nothing_else(clips: list[Clip], tmp_path: Path) -> None:
    for name, content in {"empty.webm": b"", "text.webm": b"no video" * 99}.items():
        (tmp_path / name).write_bytes(content)
    more = [*clips, Clip(path=str(tmp_path / "empty.webm")), Clip(path=str(tmp_path / "text.webm"))]
    loaders = [
        open_loader(more, DataConfig(workers=0, max_bad_share=1, reader=reader), device=CPU, **KIND)
        for reader in ("cpu", "dali")
    ]
    assert_close(list(loaders[0]), list(loaders[1]))
    assert loaders[0].bad_files == loaders[1].bad_files and len(loaders[0].bad_files) == 2


def test_a_decoder_error_is_traced_to_its_clip(
    clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that passes the checks and fails in DALI: the clips beside it come through, it gets a replacement."""
    from umt_fast.data.loaders import dali as dali_reader

    real = dali_reader.outline
    lying = tmp_path / "lying.webm"
    lying.write_bytes(b"\0" * 500)
    good = real(clips[0].path)
    monkeypatch.setattr(dali_reader, "outline", lambda path: good if path == str(lying) else real(path))
    more = [clip if number != 2 else Clip(path=str(lying), label=2) for number, clip in enumerate(clips)]
    loader = open_loader(more, DataConfig(workers=0, max_bad_share=1, reader="dali", prefetch=3), device=CPU, **KIND)
    found = list(loader)
    expected = ClipLoader(more, DataConfig(workers=0, max_bad_share=1), **KIND)
    assert_close(list(expected), found)
    assert list(loader.bad_files) == [str(lying)] == list(expected.bad_files)
    loader.set_epoch(1), expected.set_epoch(1)
    assert_close(list(expected), list(loader))


def test_workers_hand_over_the_bytes(clips: list[Clip]) -> None:
    here, there = (
        list(open_loader(clips, DataConfig(workers=workers, reader="dali"), device=CPU, **KIND)) for workers in (0, 1)
    )
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(here, there, strict=True))


def test_turned_videos() -> None:
    """A window of the stored picture, turned afterwards, is the crop of the turned picture."""
    from umt_fast.data.decode.transforms import Crop
    from umt_fast.data.loaders.dali import stored_window

    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    for turns in range(4):
        turned = np.rot90(picture, turns)
        for flip in (False, True):
            crop = Crop(3, 7, 11, 19, flip)
            expected = turned[7:26, 3:14][:, :: -1 if flip else 1]
            (top, left, height, width), (sideways, upright) = stored_window(crop, 50, 30, turns)
            window = picture[top : top + height, left : left + width][:: -1 if upright else 1, :: -1 if sideways else 1]
            np.testing.assert_array_equal(np.rot90(window, turns), expected)


def test_codecs_and_lists_it_cannot_take(tiny_list: Path, clips: list[Clip]) -> None:
    h264 = read_list(tiny_list, DataConfig())
    loader = open_loader(h264, DataConfig(workers=0, reader="dali"), device=CPU, **KIND)
    with pytest.raises(DataError, match="h264 on a GPU only"):
        list(loader)
    with pytest.raises(DataError, match="mixes"):
        open_loader([*clips, Clip(path="x", frame_folder=True)], DataConfig(reader="dali"), device=CPU, **KIND)
