"""What retrieval is judged on: a gallery of clips, captions that search it, and which belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import clean_caption
from umt_fast.data.sources.clip import missing_files
from umt_fast.data.sources.columns import Clips, ClipsBuilder, Strings, StringsBuilder
from umt_fast.data.sources.entries import read_entries

Joining = Literal["each", "paragraph"]


class Queries(NamedTuple):
    """V different clips, N captions, and their pairs."""

    clips: Clips
    captions: Strings
    right: Tensor
    """int64 (P, 2): clip and caption numbers of every right answer, each pair once, sorted."""


def read_queries(source: str | Path, root: str = "", *, joining: Joining = "each", workers: int = 4) -> Queries:
    """Reads a caption list (see data/sources/entries.py) for retrieval.

    A file named by several entries is one clip of the gallery, and all its captions are right answers of it (MSVD). An entry
    with a list of files is one caption with several right answers (SSV2).

    Args:
        joining: of an entry's list of captions, `each` is a query (MSVD), or all together are one `paragraph` (DiDeMo,
            ActivityNet).

    Raises:
        DataError: also an empty list, a caption without any word, and files that are not there (counted, the first named).
    """
    if root and not Path(root).is_dir():
        raise DataError(f"{root} is not a folder; give the one that the names of {source} are relative to")
    numbers: dict[str, int] = {}
    clips, captions, right, missing = ClipsBuilder(), StringsBuilder(), set(), []
    for entry in read_entries(source, root, workers):
        if not entry.captions:
            raise DataError(f"{entry.place}: its list of captions is empty")
        for clip in entry.clips:
            if clip.name not in numbers:
                numbers[clip.name] = len(clips)
                clips.add(clip)
                if not Path(clip.path).exists():
                    missing.append(clip.path)
        for text in [" ".join(entry.captions)] if joining == "paragraph" else entry.captions:
            cleaned = clean_caption(text)
            if not cleaned.strip():
                raise DataError(f"{entry.place}: the caption {text!r} has no word; correct the entry or take it out")
            right.update((numbers[clip.name], len(captions)) for clip in entry.clips)
            captions.add(cleaned)
    if not numbers:
        raise DataError(f"{source} holds no captions")
    if missing:
        raise missing_files(missing, len(clips), source)
    return Queries(clips.done(), captions.done(), torch.tensor(sorted(right)))
