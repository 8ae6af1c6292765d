"""Pictures left out of decoding: the others stay the same bit for bit, and doubt leads to a sequential decode."""

from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.data.decode import selective, video
from umt_fast.data.decode.selective import Packet, groups_to_feed, regular
from umt_fast.data.decode.video import decode_frames

COUNT = 48


def encode(path: Path, options: dict[str, str], format_name: str | None = None) -> None:
    """Noise that moves over a gradient: B pictures of every kind, several references."""
    rng = np.random.default_rng(0)
    field = rng.integers(0, 255, (96, 160, 3)).astype(np.uint8)
    with av.open(str(path), "w", format=format_name) as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(COUNT):
            picture = np.ascontiguousarray(field[number // 2 : number // 2 + 48, number : number + 64])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def sequential(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each selective decode sent to the decoder."""
    counts = []
    real = selective.groups_to_feed

    def spy(packets: list[Packet], wanted: set[int]) -> list[list[int]]:
        groups = real(packets, wanted)
        counts.append(sum(map(len, groups)))
        return groups

    monkeypatch.setattr(selective, "groups_to_feed", spy)
    return counts


PROVEN = {
    "defaults": {},
    "short-groups": {"g": "12", "bf": "3"},
    "pyramid": {"x264-params": "bframes=5:b-pyramid=normal:ref=5:keyint=20"},
    "fields": {"x264-params": "interlaced=1:bframes=2:keyint=15"},
    "slices": {"x264-params": "slices=4:bframes=3:keyint=30"},
    "periodic-refresh": {"x264-params": "intra-refresh=1:keyint=20"},
    "no-b": {"bf": "0", "g": "10"},
}


@pytest.mark.parametrize("options", PROVEN.values(), ids=PROVEN)
def test_selective_equals_sequential(options: dict[str, str], tmp_path: Path, fed: list[int]) -> None:
    encode(tmp_path / "a.mp4", options)
    plain = sequential(tmp_path / "a.mp4")
    assert len(plain) == COUNT
    rng = np.random.default_rng(1)
    for wanted in [np.array([number]) for number in range(0, COUNT, 5)] + [
        np.sort(rng.integers(COUNT, size=size)) for size in (2, 5, 9)
    ]:
        frames = decode_frames(tmp_path / "a.mp4", lambda count, wanted=wanted: wanted)
        np.testing.assert_array_equal(frames, [plain[number] for number in wanted])
    assert len(fed) == 13 and sum(fed) < 13 * COUNT, "nothing was left out, so nothing was shown"


UNPROVEN = {
    "open-groups": ("a.mp4", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "start-codes": ("a.ts", {"g": "12"}),
    "no-container": ("a.h264", {"g": "12"}),
}


@pytest.mark.parametrize(("name", "options"), UNPROVEN.values(), ids=UNPROVEN)
def test_other_streams_are_right_too(name: str, options: dict[str, str], tmp_path: Path) -> None:
    encode(tmp_path / name, options)
    plain = sequential(tmp_path / name)
    wanted = np.array([3, 13, 14, 30, 46])
    frames = decode_frames(tmp_path / name, lambda count: wanted)
    np.testing.assert_array_equal(frames, [plain[number] for number in wanted])


def test_large_files_are_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fed: list[int]) -> None:
    encode(tmp_path / "a.mp4", {"g": "12"})
    wanted = np.array([5, 40])
    held = decode_frames(tmp_path / "a.mp4", lambda count: wanted)
    monkeypatch.setattr(video, "_HELD_BYTES", 100)
    np.testing.assert_array_equal(decode_frames(tmp_path / "a.mp4", lambda count: wanted), held)
    assert len(fed) == 2 and fed[0] == fed[1] < 20


def test_a_stream_that_breaks_its_promise_is_decoded_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tmp_path / "a.mp4", {"x264-params": "bframes=3:keyint=60"})
    plain = sequential(tmp_path / "a.mp4")

    def all_droppable(packets: list[Packet], wanted: set[int]) -> list[list[int]]:
        # The last group without its IDR picture: FFmpeg shows nothing, or something else.
        return [[number for number in range(1, COUNT) if packets[number].pts in wanted]]

    monkeypatch.setattr(selective, "groups_to_feed", all_droppable)
    frames = decode_frames(tmp_path / "a.mp4", lambda count: np.array([4, 20]))
    np.testing.assert_array_equal(frames, [plain[4], plain[20]])


def test_a_count_that_disagrees_with_the_packets_is_not_trusted(tmp_path: Path, fed: list[int]) -> None:
    encode(tmp_path / "a.mp4", {})
    plain = sequential(tmp_path / "a.mp4")
    frames = decode_frames(tmp_path / "a.mp4", lambda count: np.array([0, count - 1]), num_frames=COUNT + 5)
    np.testing.assert_array_equal(frames, [plain[0], plain[-1]])
    assert not fed


def packets(stamps: list[int | None], idr: set[int], parameters: set[int] = frozenset()) -> list[Packet]:
    return [Packet(pts, n % 2 == 0 or n in idr, n in idr, n in parameters) for n, pts in enumerate(stamps)]


def test_what_counts_as_proof() -> None:
    assert regular(packets([0, 4, 2, 1, 3], {0}), 2)
    assert not regular(packets([0, 4, 2, 1, 3], {0}), 1)  # the decoder would give up on picture 1
    assert not regular(packets([5, 8, 3], {0}), 1)
    assert not regular(packets([0, 2, 2], {0}), 2)
    assert not regular(packets([0, None, 2], {0}), 2)
    assert not regular(packets([0, 1, 2], {1}), 2)
    assert regular(packets([0, 2, 1, 3, 5, 4], {0, 3}), 1)
    assert not regular(packets([0, 2, 4, 3, 5, 1], {0, 3}), 4)  # the second group shows a picture inside the first
    assert regular(packets([0, 1, 2, 3], {0, 2}, {0, 2}), 0)
    assert not regular(packets([0, 1, 2, 3], {0, 2}, {2}), 0)
    assert not regular(packets([0, 1, 2, 3], {0, 2}, {1}), 0)
    assert not regular([], 0)


def test_what_is_fed() -> None:
    stream = packets([0, 2, 1, 3, 10, 11, 12, 20, 21], {0, 4, 7})
    # references are the even ones and IDR pictures; a group ends with its last wanted picture, the second is left out
    assert groups_to_feed(stream, {1, 21}) == [[0, 2], [7, 8]]
    assert groups_to_feed(stream, {3}) == [[0, 2, 3]]


def test_a_damaged_length_is_noticed(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", {})
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        size = selective.length_size_of(stream)
        packet = next(container.demux(stream))
    whole = selective.describe(packet, size)
    assert size == 4 and whole.idr and whole.reference
    for content in (bytes(packet)[:-1], bytes(packet) + b"\0\0\0\0", b"\0\0\0\x02\x06\0"):
        assert selective.describe(av.Packet(content), size) is None
