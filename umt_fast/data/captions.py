"""Caption lists (official JSON and SQLite), their text as the official code cleans it, and tokens made once for all epochs."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import Clip, DataError

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/]")


def clean_caption(text: str) -> str:
    """Lower case, without punctuation, single blanks: the official pre-processing of captions."""
    text = _SPACED.sub(" ", _DROPPED.sub("", text.lower()))
    return " ".join(text.replace("<person>", "person").split())


@dataclass(frozen=True, slots=True)
class CaptionList:
    """Rows of captions with their media: row i is captions[i] of clips[i]."""

    clips: list[Clip]
    captions: list[str]
    sample: list[int]
    """The first row with the same file: rows of one sample are each other's right answers."""


def read_captions(path: str | Path, root: str = "") -> CaptionList:
    """Reads a caption list.

    Args:
        path: a .json list of {"video" or "image": name, "caption": text or list of texts}, or an SQLite file with a table
            `annos` (id, filename, caption). A list of captions becomes a row each.
        root: folder put before relative names; empty: the list's own folder.

    Raises:
        DataError: no such file, not such a list, no rows, an entry without a name or caption (its number is named).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no caption list at {path}; give a .json list or an SQLite file with a table `annos`")
    base = Path(root) if root else path.resolve().parent
    rows = list(_json_rows(path) if path.suffix == ".json" else _sqlite_rows(path))
    if not rows:
        raise DataError(f"{path} holds no captions")
    first: dict[str, int] = {}
    clips, captions, sample = [], [], []
    for name, caption in rows:
        resolved = name if Path(name).is_absolute() else str(base / name)
        sample.append(first.setdefault(resolved, len(clips)))
        clips.append(Clip(path=resolved))
        captions.append(clean_caption(caption))
    return CaptionList(clips, captions, sample)


def read_corpora(entries: Sequence[str]) -> CaptionList:
    """Several caption lists as one, each given as LIST or LIST=FOLDER; a file keeps its identity within a list."""
    joint = CaptionList([], [], [])
    for entry in entries:
        name, _, root = entry.partition("=")
        if root and not Path(root).is_dir():
            raise DataError(f"{entry}: {root} is not a folder; give LIST or LIST=FOLDER")
        part = read_captions(name, root)
        joint.sample.extend(row + len(joint.clips) for row in part.sample)
        joint.clips.extend(part.clips)
        joint.captions.extend(part.captions)
    return joint


def _json_rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise DataError(f"{path} holds a JSON {type(entries).__name__}; it must be a list of entries")
    for number, entry in enumerate(entries):
        name = (entry.get("video") or entry.get("image")) if isinstance(entry, dict) else None
        texts = entry.get("caption") if isinstance(entry, dict) else None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f'{path}, entry {number}: expected {{"video" or "image": name, "caption": text}}: {str(entry)[:200]}'
            )
        for text in texts:
            yield name, text


def _sqlite_rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
            yield from base.execute("SELECT filename, caption FROM annos ORDER BY id")
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is neither .json nor an SQLite file with a table `annos` ({error})") from error


class Tokens:
    """Token ids of all captions, made once: training steps only look rows up.

    Sequences are [CLS] and word pieces without a closing [SEP], as released UMT checkpoints were trained (`sep` adds it).
    """

    def __init__(self, captions: list[str], tokenizer: Any, *, max_length: int, sep: bool = False) -> None:
        pieces = tokenizer(captions, add_special_tokens=False)["input_ids"]
        end = [tokenizer.sep_token_id] if sep else []
        rows = [[tokenizer.cls_token_id, *row[: max_length - 1 - len(end)], *end] for row in pieces]
        self.lengths = torch.tensor([len(row) for row in rows])
        self.pad = tokenizer.pad_token_id
        self.ids = torch.full((len(rows), int(self.lengths.max())), self.pad, dtype=torch.int32)
        for number, row in enumerate(rows):
            self.ids[number, : len(row)] = torch.tensor(row, dtype=torch.int32)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """int64 ids and bool mask (B, l) of some rows, l the longest of them."""
        longest = int(self.lengths[rows].max())
        mask = torch.arange(longest) < self.lengths[rows][:, None]
        return self.ids[rows, :longest].long(), mask


def load_tokenizer(name: str) -> Any:
    """A BERT tokenizer by name (fetched) or from a local folder with a vocab.txt.

    Raises DataError where it is neither.
    """
    from transformers import BertTokenizerFast

    try:
        return BertTokenizerFast.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer {name!r}: neither a folder with a vocab.txt nor a name that can be fetched"
        ) from error


class CaptionLoader:
    """A ClipLoader's batches with the captions of their clips: adds `ids`, `mask` and `sample` to each."""

    def __init__(self, clips: ClipLoader, tokens: Tokens, sample: list[int]) -> None:
        self.clips, self.tokens, self.sample = clips, tokens, torch.tensor(sample)

    @property
    def bad_files(self) -> dict[str, str]:
        return self.clips.bad_files

    def __len__(self) -> int:
        return len(self.clips)

    def set_epoch(self, epoch: int) -> None:
        self.clips.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.clips.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clips.load_state_dict(state)

    def name_of(self, index: int) -> str:
        return self.clips.name_of(index)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self.clips)
        try:
            for batch in batches:
                ids, mask = self.tokens[batch["index"]]
                yield batch | {"ids": ids, "mask": mask, "sample": self.sample[batch["index"]]}
        finally:
            batches.close()
