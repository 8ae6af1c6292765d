"""Clips per second and core of the loader with several readers: `pytest benchmarks/bench_input.py`.

Over the files of UMT_BENCH_VIDEOS (paths with a colon between; three Kinetics clips of the shared test data by default), 8
random sparse frames, 224-pixel crops, all in one process. Readers: `prepared` (shards made before the timing), `cpu` (files),
`sequential` (the shortest PyAV program), `decord` (where it is installed). extra_info has clips per second of processor
time in the best round, which other load on the machine disturbs least.
"""

import os
import time
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.config import DataConfig
from umt_fast.data.cpu import ClipReader
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import Clip, read_list
from umt_fast.data.prepare import prepare

SHARED = Path(os.environ.get("UMT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DEFAULT = ":".join(str(SHARED / "videos" / name) for name in ("test.mp4", "demo.mp4", "part_0.mp4"))
FILES = [path for path in os.environ.get("UMT_BENCH_VIDEOS", DEFAULT).split(":") if Path(path).is_file()]
CLIPS = 4


class SequentialReader(ClipReader):
    """Counts packets, then decodes from the start to the last wanted picture."""

    def frames(self, clip: Clip, random_key: tuple[int, ...]) -> np.ndarray:
        with av.open(clip.path) as container:
            count = sum(1 for packet in container.demux(video=0) if packet.size)
        chosen = self.chooser(random_key)(count)
        wanted, pictures = set(chosen.tolist()), {}
        with av.open(clip.path) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    pictures[number] = frame.to_ndarray(format="rgb24")
                if number == chosen[-1]:
                    break
        return np.stack([pictures[number] for number in chosen.tolist()])


class DecordReader(ClipReader):
    def frames(self, clip: Clip, random_key: tuple[int, ...]) -> np.ndarray:
        import decord

        video = decord.VideoReader(clip.path, num_threads=1)
        return video.get_batch(self.chooser(random_key)(len(video))).asnumpy()


READERS = {"cpu": ClipReader, "sequential": SequentialReader, "decord": DecordReader, "prepared": ClipReader}


def loader_of(name: str, path: str, folder: Path) -> ClipLoader:
    clips = [Clip(path=path)]
    if name == "prepared":
        (folder / "list.csv").write_text(f"{path},0\n")
        prepare(folder / "list.csv", folder / "out", workers=0)
        clips = [*read_list(folder / "out", DataConfig())]
    kind = {"num_frames": 8, "image_size": 224, "seed": 1}
    loader = ClipLoader(clips * CLIPS, DataConfig(workers=0, max_bad_share=0), batch_size=2, **kind)
    loader._reader = READERS[name](loader.clips, loader.data, train=True, **kind)
    return loader


@pytest.mark.parametrize("path", FILES, ids=lambda path: Path(path).name)
@pytest.mark.parametrize("reader", READERS)
def test_input(benchmark, reader: str, path: str, tmp_path: Path) -> None:
    if reader == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    loader, spent = loader_of(reader, path, tmp_path), []
    if reader in ("decord", "cpu"):
        expected = loader_of("sequential", path, tmp_path)
        assert all((a["video"] == b["video"]).all() for a, b in zip(loader, expected, strict=True))

    def epoch() -> None:
        loader.position = 0
        start = time.process_time()
        assert sum(len(batch["index"]) for batch in loader) == CLIPS
        spent.append(time.process_time() - start)

    benchmark.pedantic(epoch, rounds=3)
    benchmark.extra_info.update(reader=reader, file=Path(path).name, clips_per_cpu_s=CLIPS / min(spent))
