"""`embed`: one vector for each clip of a list, in a file that `search` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from umt_fast.cli.command import call
from umt_fast.cli.outputs import check_output
from umt_fast.config import ConfigError, DataConfig, RunConfig, by_option, require
from umt_fast.data.sources.clip import Clip, DataError
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.entries import is_sqlite, read_entries
from umt_fast.data.sources.lists import read_list
from umt_fast.engine.distributed import distributed_run
from umt_fast.files import WriteError, atomic_path
from umt_fast.hub import load_model
from umt_fast.pretrained.passes import embed

# Names of files that are taken for videos where a folder is given.
SUFFIXES = (
    ".3gp",
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
)
_METADATA = "umt_fast.features"
# safetensors takes heads of up to 100 MB; names go there.
_MAX_NAMES = 90_000_000


def command(
    source: Annotated[Path, tyro.conf.Positional],
    /,
    weights: str = "",
    out: Path | None = None,
    model: str = "",
    num_frames: int = 0,
    image_size: int = 0,
    batch_size: int = 16,
    workers: int = 4,
    separator: str = ",",
    root: str = "",
    frame_pattern: str = "img_{:05d}.jpg",
    max_seconds: float = 0.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
) -> None:
    """Write one vector for each clip: `pooled` features and, of a stage-2 model, the `embedding` that texts are compared with.

    Frames and pixels are those of evaluation, unmasked. Clips that cannot be read are left out, named and counted. The file is
    written as a whole at the end. Under torchrun the ranks share the clips.

    Args:
        source: A video, a folder of videos (with its subfolders) or one that `prepare` wrote, a list of labeled clips, a
            manifest, or captions (.json, SQLite or tar files), whose texts are not read.
        weights: A checkpoint, weights, a folder of save_pretrained, or an official file, by path or released name.
        out: The .safetensors file to write; `search --in` reads it.
        model: What a file is of that does not say it: a name of umt_fast.list_models(), as umt_b16 or b16_25m.
        num_frames: With --model: frames of a clip; 0: as the file or the model says.
        image_size: With --model: pixels per side, likewise.
        batch_size: Clips per rank and step.
        workers: Decoding processes.
        separator: Field separator of a list of labeled clips.
        root: Folder put before relative paths; empty: the list's own folder.
        frame_pattern: File name of frame i (from 1) in a list of frame folders.
        max_seconds: Only the first so many seconds of a clip are looked at; 0: all of it.
        device: auto, cpu or cuda.
        dtype: What is computed in; auto: as `eval` does.
    """
    require(out is not None, "embed has no output; give --out features.safetensors")
    require(out.suffix == ".safetensors", f"--out is {out}; give it the suffix .safetensors")
    require(bool(weights), "embed has no weights; give --weights FILE")
    require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
    check_output(out, source, Path(weights))
    reading = {"workers": workers, "separator": separator, "root": root, "frame_pattern": frame_pattern}
    data = by_option("data", lambda: DataConfig(**reading, max_seconds=max_seconds, max_bad_share=1.0))
    clips = clips_of(source, data)
    names = [clip.name for clip in clips]
    size = len(json.dumps(names))
    require(
        size <= _MAX_NAMES,
        f"the names of {len(clips)} clips take {size} bytes, and a file holds {_MAX_NAMES}; embed {source} in parts",
    )
    with distributed_run(RunConfig(device=device)) as ranks:
        loaded = load_model(
            model or None,
            weights=weights,
            device=ranks.device,
            dtype=None if dtype == "auto" else dtype,
            num_frames=num_frames or None,
            image_size=image_size or None,
        )
        index, vectors = embed(loaded, clips, data, ranks, batch_size=batch_size)
        if not ranks.first:
            return
        if not len(index):
            raise DataError(f"none of the {len(clips)} clips of {source} can be read; the reasons are above")
        kept = [names[number] for number in index.tolist()]
        write_features(out, vectors, kept, {"model": loaded.description, "fingerprint": loaded.fingerprint()})
    left_out = len(clips) - len(index)
    said = f", {left_out} left out that cannot be read" if left_out else ""
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in vectors.items())
    print(f"{out}: {len(index)} {'clip' if len(index) == 1 else 'clips'}{said}: {shapes}")


def clips_of(source: Path, data: DataConfig) -> Clips:
    """The clips that a file, folder or list means, each once where it is a caption list. Raises DataError: none."""
    if source.is_dir():
        if any(source.glob("part-*-of-*.json")):  # written by `prepare`
            return read_list(source, data)
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(f"{source} holds no video, nor what `prepare` writes; videos end in {', '.join(SUFFIXES)}")
        return Clips.of(Clip(path=str(path)) for path in found)
    if source.suffix.lower() in SUFFIXES:
        if not source.is_file():
            raise DataError(f"no video at {source}")
        return Clips.of([Clip(path=str(source))])
    if source.suffix in (".json", ".tar") or is_sqlite(source):
        entries = read_entries(str(source), data.root, data.workers)
        clips = {clip.name: clip for entry in entries for clip in entry.clips}
        if not clips:
            raise DataError(f"{source} names no clips")
        return Clips.of(clips.values())
    return read_list(source, data)


def write_features(out: Path, vectors: dict[str, Tensor], names: Iterable[str], of: dict[str, Any]) -> None:
    """Writes vectors (V, ...) by name, the clips' names and what made them; whole or not at all."""
    content = {name: value.contiguous() for name, value in vectors.items()}
    try:
        with atomic_path(out, errors=(SafetensorError,)) as temporary:
            save_file(content, temporary, {_METADATA: json.dumps(of), "names": json.dumps(list(names))})
    except WriteError as error:
        raise ConfigError(str(error)) from error


def read_features(path: Path) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """What write_features wrote. Raises DataError: no such file, or another kind of file."""
    if not path.is_file():
        raise DataError(f"no features at {path}; `embed` writes them")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise DataError(f"{path} is no file that `embed` wrote (truncated, or of another kind)") from error
    if not {_METADATA, "names"} <= metadata.keys() or "pooled" not in vectors:
        raise DataError(f"{path} is no file that `embed` wrote: it lacks the names of clips")
    return vectors, json.loads(metadata["names"]), json.loads(metadata[_METADATA])


def main(arguments: list[str]) -> None:
    """`embed ...`."""
    call(command, arguments, "embed")
