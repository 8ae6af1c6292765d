"""Memory of the loader over many clips: `python -m benchmarks.soak_input VIDEO ... [--clips 20000] [--workers 1]`.

Prepares the given videos at a small size in a temporary folder, reads clips from the shards epoch after epoch and prints the
resident memory of this process and of its children (shared pages count once per process).
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro

from umt_fast.config import DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.lists import read_list
from umt_fast.data.sources.prepared import Settings


def resident_mib() -> dict[str, float]:
    """Resident memory of this process and of all below it, in MiB."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # gone meanwhile
            continue
        parents[int(fields["Pid"])] = int(fields["PPid"])
        sizes[int(fields["Pid"])] = int(fields.get("VmRSS", "0").split()[0]) / 1024
    own = int(Path("/proc/self").resolve().name)

    def below(process: int) -> bool:
        while process in parents and process != own:
            process = parents[process]
        return process == own

    return {"main": sizes[own], "children": sum(size for p, size in sizes.items() if p != own and below(p))}


def main(
    videos: Annotated[list[Path], tyro.conf.Positional],
    clips: int = 20_000,
    workers: int = 1,
    short_side: int = 64,
    image_size: int = 32,
) -> None:
    """Read many clips from prepared shards and print the memory in use, one JSON line per tenth."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "list.csv"
        table.write_text("".join(f"{path.resolve()},0\n" for path in videos))
        prepare(table, Path(folder) / "out", settings=Settings(short_side=short_side), workers=0)
        listed = [*read_list(Path(folder) / "out", DataConfig())] * (1000 // len(videos))
        loader = ClipLoader(
            listed, DataConfig(workers=workers, max_bad_share=0), num_frames=8, image_size=image_size, batch_size=20
        )
        seen, start = 0, time.monotonic()
        while seen < clips:
            loader.set_epoch(loader.epoch + 1)
            for batch in loader:
                seen += len(batch["index"])
                if seen % max(20, clips // 10 // 20 * 20) == 0:
                    memory = {name: round(size, 1) for name, size in resident_mib().items()}
                    print(json.dumps({"clips": seen, "mib": memory, "s": round(time.monotonic() - start)}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
