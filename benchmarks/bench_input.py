"""Clips per second and core of the loader with several readers: `pytest benchmarks/bench_input.py`.

Over the files of UMT_BENCH_VIDEOS (paths with a colon between; three Kinetics clips of the shared test data by default), 8
random sparse frames, 224-pixel crops, all in one process, the readers in turn: a machine of changing speed is then the same
for each. Readers: `prepared` (shards made before the timing), `cpu` (files), `sequential` (the shortest PyAV program),
`decord` (where it is installed). extra_info has clips per second of processor time in the best round, which other load on the
machine disturbs least.
"""

import importlib.util
import os
import time
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.config import DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.lists import Clip, read_list

SHARED = Path(os.environ.get("UMT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DEFAULT = ":".join(str(SHARED / "videos" / name) for name in ("test.mp4", "demo.mp4", "part_0.mp4"))
FILES = [path for path in os.environ.get("UMT_BENCH_VIDEOS", DEFAULT).split(":") if Path(path).is_file()]
CLIPS, ROUNDS = 4, 7


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


def installed(reader: str) -> bool:
    return reader != "decord" or importlib.util.find_spec("decord") is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: Path(path).name)
def test_input(benchmark, path: str, tmp_path: Path) -> None:
    loaders = {reader: loader_of(reader, path, tmp_path) for reader in READERS if installed(reader)}
    for same in loaders.keys() & {"decord", "cpu"}:
        loaders["sequential"].position = 0
        pairs = zip(loaders[same], loaders["sequential"], strict=True)
        assert all((a["video"] == b["video"]).all() for a, b in pairs)
    spent: dict[str, list[float]] = {reader: [] for reader in loaders}

    def every_reader() -> None:
        for reader, loader in loaders.items():
            loader.position = 0
            start = time.process_time()
            assert sum(len(batch["index"]) for batch in loader) == CLIPS
            spent[reader].append(time.process_time() - start)

    benchmark.pedantic(every_reader, rounds=ROUNDS)
    best = {reader: min(seconds) for reader, seconds in spent.items()}
    benchmark.extra_info.update(file=Path(path).name, clips_per_cpu_s={name: CLIPS / best[name] for name in best})
    if "decord" in best:
        benchmark.extra_info["against_decord"] = {name: best["decord"] / best[name] for name in best}
