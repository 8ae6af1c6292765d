"""One entry of any list of clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from umt_fast.data.errors import DataError


def require_list(path: Path, kind: str, wanted: str) -> None:
    """Raises DataError unless a list is a file, which can be read again and has an end."""
    if path.is_file():
        return
    if not path.exists():
        raise DataError(f"no {kind} at {path}; give {wanted}")
    found = "a folder" if path.is_dir() else "a pipe or device"
    raise DataError(f"{path} is {found}, not a {kind}; give {wanted}")


def missing_files(missing: Sequence[str], count: int, source: object) -> DataError:
    """The error of a list that names `count` files of which some are not there."""
    return DataError(
        f"{len(missing)} of the {count} files of {source} are not there, the first: {missing[0]}; "
        "--root sets the folder that names are relative to"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One entry of a list. Fields after `label` are known only from a manifest (or a frame-folder list)."""

    path: str
    label: int = 0
    num_frames: int = 0
    """Decodable frames; 0: not known."""
    frame_folder: bool = False
    rate: float = 0.0
    """Frames per second."""
    width: int = 0
    height: int = 0
    """Pixels as decoded, before rotation."""
    rotation: int = 0
    """Degrees counter-clockwise."""
    codec: str = ""
    key_frame_spacing: float = 0.0
    """Mean frames from one key frame to the next."""
    checksum: str = ""
    """BLAKE2b-128 of the file."""
    member: str = ""
    """Name inside the tar file at `path`; empty: `path` is the clip itself."""
    shard: str = ""
    """File that holds the clip's prepared frames; `num_frames` then counts those."""
    offset: int = 0
    size: int = 0
    """Where in the shard or tar file the clip's bytes begin, and how many there are."""

    @property
    def name(self) -> str:
        """What messages call this clip."""
        return f"{self.path}/{self.member}" if self.member else self.path

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)
