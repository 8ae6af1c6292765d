"""Captions with their clips as retrieval is fine-tuned on them: rows, and which rows are each other's right answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from torch import Tensor

from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import CaptionList, clean_caption, list_and_folder
from umt_fast.data.sources.columns import ClipsBuilder, StringsBuilder
from umt_fast.data.sources.entries import read_entries
from umt_fast.data.sources.queries import Joining

log = logging.getLogger("umt_fast.data")

SameSample = Literal["file", "caption"]


def match_ids(keys: Sequence[str]) -> Tensor:
    """int64 (N,), equal where keys are: numbers in the order of first appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def read_pairs(
    entries: Sequence[str], *, joining: Joining = "each", same_sample: SameSample = "file", workers: int = 4
) -> CaptionList:
    """Reads caption lists, each given as LIST or LIST=FOLDER, as one list for training; layouts: see data/sources/entries.py.

    A list of captions becomes a row each, or with `paragraph` one row, its texts joined by blanks; a list of files becomes a
    row each. A caption without any word is left out; one line says how many were.

    Args:
        joining: what a list of captions is, see read_queries.
        same_sample: rows of equal `sample` are right answers of each other. `file`: those whose files have the same name,
            whatever their folders, over all lists, as officially; `caption`: those whose captions, as written, are equal (the
            official choice where several clips share one, SSV2).

    Raises:
        DataError: an entry with an empty list of captions, a list without any row, a folder that is none.
    """
    clips, captions = ClipsBuilder(), StringsBuilder()
    keys: list[str] = []
    for listed in entries:
        source, root = list_and_folder(listed)
        if root and not Path(root).is_dir():
            raise DataError(f"{source}={root} is not a list, and {root} is not a folder; give LIST or LIST=FOLDER")
        before, empty = len(keys), 0
        for entry in read_entries(source, root, workers):
            if not entry.captions:
                raise DataError(
                    f"{entry.place}: its list of captions is empty; give at least one, or take the entry out"
                )
            for text in [" ".join(entry.captions)] if joining == "paragraph" else entry.captions:
                cleaned = clean_caption(text)
                if not cleaned.strip():
                    empty += 1
                    continue
                for clip in entry.clips:
                    clips.add(clip)
                    captions.add(cleaned)
                    keys.append(text if same_sample == "caption" else PurePosixPath(clip.member or clip.path).name)
        if empty:
            log.warning("%s: left out %d captions without any word", source, empty)
        if len(keys) == before:
            raise DataError(f"{source} holds no captions")
    return CaptionList(clips.done(), captions.done(), match_ids(keys))
