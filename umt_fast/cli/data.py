"""`scan` and `prepare`: what is done to a list of clips once, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from umt_fast.cli.command import call
from umt_fast.cli.outputs import check_output
from umt_fast.config import ConfigError, DataConfig, by_option


def scan(arguments: list[str]) -> None:
    """Decodes every clip of a list once, or verifies a manifest."""
    from umt_fast.data.prepare import scan as scanning

    def command(
        list_path: Annotated[Path, tyro.conf.Positional],
        /,
        out: Path | None = None,
        check: Annotated[bool, tyro.conf.arg(name="verify"), tyro.conf.FlagCreatePairsOff] = False,
        workers: int = 4,
        separator: str = ",",
        root: str = "",
        frame_pattern: str = "img_{:05d}.jpg",
    ) -> None:
        """Decode every clip of a list once and write a manifest that training reads in its place; or verify a manifest.

        Args:
            list_path: The list: path and label per line, or frame folders (path, number of frames, label).
            out: Manifest to write; the bad files go beside it. An interrupted scan continues.
            check: Take the list as a manifest and read its files against their checksums; then without --out.
            workers: Decoding processes; 0 decodes in this one.
            separator: Field separator of the list.
            root: Folder put before relative paths; empty: the list's own folder.
            frame_pattern: File name of frame i (from 1) in a list of frame folders.
        """
        if (out is None) != check:
            raise ConfigError("scan needs either --out MANIFEST, to write one, or --verify, to check one")
        data = by_option("data", lambda: DataConfig(separator=separator, root=root, frame_pattern=frame_pattern))
        if out is None:
            scanning.verify(list_path, workers=workers, data=data)
            return
        if out.parent.exists():  # else it is made
            check_output(out, list_path)
        scanning.scan(list_path, out, workers=workers, data=data)

    call(command, arguments, "scan")


def prepare(arguments: list[str]) -> None:
    """Packs candidate frames of every clip."""
    from umt_fast.data.prepare import shards
    from umt_fast.data.sources.prepared import Settings

    def command(
        list_path: Annotated[Path, tyro.conf.Positional],
        /,
        out: Path,
        shard: str = "0/1",
        segments: int = 8,
        per_segment: int = 3,
        short_side: int = 256,
        quality: int = 90,
        seed: int = 0,
        sampling: Literal["sparse", "intervals"] = "sparse",
        max_seconds: float = 0.0,
        shard_mib: int = 1024,
        workers: int = 4,
        separator: str = ",",
        root: str = "",
        frame_pattern: str = "img_{:05d}.jpg",
        check: Annotated[bool, tyro.conf.arg(name="verify"), tyro.conf.FlagCreatePairsOff] = False,
    ) -> None:
        """Pack candidate frames of every clip as JPEGs, for one kind of sampling: train with --data.train DIR.

        Args:
            list_path: A list with labels, a manifest, or a caption list (then train with --data.prepared DIR).
            out: Folder for the shards. The same command again continues, and tries the bad clips again.
            shard: i/n: every n-th clip from the i-th on, so that n machines share a list.
            segments: Segments of a clip; the frames a training run takes must divide segments x per_segment.
            per_segment: Random candidates of each segment; training draws one of them.
            short_side: Larger frames are shrunk to this short side, in pixels.
            quality: JPEG quality, 1 to 100.
            seed: Seed of the candidates.
            sampling: data.sampling of the training: sparse (stage 1) or intervals (stage 2).
            max_seconds: data.max_seconds of the training: candidates of the first so many seconds; 0: of the whole clip.
            shard_mib: Size of a shard file in MiB.
            workers: Decoding processes; 0 decodes in this one.
            separator: Field separator of the list.
            root: Folder put before relative paths; empty: the list's own folder.
            frame_pattern: File name of frame i (from 1) in a list of frame folders.
            check: Then read every record of the folder against its checksum.
        """
        parts = shard.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"--shard is {shard!r}; give i/n, as 0/4")
        settings = Settings(
            segments=segments,
            per_segment=per_segment,
            short_side=short_side,
            quality=quality,
            seed=seed,
            sampling=sampling,
            max_seconds=max_seconds,
        )
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; prepare writes a folder: give another --out")
        data = by_option("data", lambda: DataConfig(separator=separator, root=root, frame_pattern=frame_pattern))
        shards.prepare(
            list_path,
            out,
            settings=settings,
            part=(int(parts[0]), int(parts[1])),
            shard_bytes=shard_mib << 20,
            workers=workers,
            data=data,
        )
        if check:
            shards.verify(out)

    call(command, arguments, "prepare")
