"""One entry of any list of clips."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from umt_fast.data.errors import DataError

# Missing files that a message names.
_NAMED = 3


def require_list(path: Path, kind: str, wanted: str) -> None:
    """Raises DataError unless a list is a file, which can be read again and has an end."""
    if path.is_file():
        return
    if not path.exists():
        raise DataError(f"no {kind} at {path}; give {_list_of(str(path)) or wanted}")
    found = "a folder" if path.is_dir() else "a pipe or device"
    raise DataError(f"{path} is {found}, not a {kind}; give {wanted}")


def _list_of(given: str) -> str:
    """What to give in place of LIST=FOLDER where a list alone is asked for; empty where this is none."""
    for place in [number for number, letter in enumerate(given) if letter == "="]:
        name, folder = given[:place], given[place + 1 :]
        if Path(name).is_file():
            return f"the list alone, {name}, and its folder as an option: --root {folder} (train: --data.root)"
    return ""


def missing_files(
    missing: Sequence[str],
    count: int,
    source: object,
    remedy: str = "--root sets the folder that names are relative to",
) -> DataError:
    """The error of a list that names `count` files of which some are not there: how many, and the first three."""
    return DataError(f"{absence(missing, count, source)}; {remedy}")


def absence(missing: Sequence[str], count: int, source: object) -> str:
    """How many of a list's files are not there, and the first three."""
    return f"{len(missing)} of the {count} files of {source} are not there, the first: {', '.join(missing[:_NAMED])}"


def absent(clips: Iterable[Clip]) -> tuple[list[str], int]:
    """The different files that hold clips and are not there, in order, and how many different files there are."""
    files = dict.fromkeys(clip.shard or clip.path for clip in clips)
    return [file for file in files if not Path(file).exists()], len(files)


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
