"""Multiple choice: clips, each with several texts of which one is right (the official layout of MSRVTT-MC)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import clean_caption
from umt_fast.data.sources.clip import Clip, missing_files, require_list
from umt_fast.data.sources.columns import Clips, ClipsBuilder, Strings, StringsBuilder
from umt_fast.data.sources.json_lists import json_list, shortened

_LAYOUT = '{"video": name, "caption": [text, ...], "answer": number of the right text, from 0}'


class Choices(NamedTuple):
    """Clips with their options: those of clip i are options[i * count : (i + 1) * count]."""

    clips: Clips
    options: Strings
    """Cleaned, as the official pre-processing of captions does. One without any word stays, and is empty."""
    answer: Tensor
    """int64 (V,): the right option of each clip, from 0."""
    count: int
    """Options of each clip."""


def read_choices(source: str | Path, root: str = "") -> Choices:
    """Reads a .json list of {"video": name, "caption": list of texts, "answer": index}.

    root: folder put before relative names; empty: the list's own folder. A clip may stand in several entries.

    Raises:
        DataError: no such file, another layout, fewer than two options or other than the first entry has, an answer that is
            no option, right texts without any word, files that are not there (counted, the first named).
    """
    if root and not Path(root).is_dir():
        raise DataError(f"{root} is not a folder; give the one that the names of {source} are relative to")
    path = Path(source)
    require_list(path, "list of choices", f"a .json list of {_LAYOUT}")
    base = str(Path(root) if root else path.resolve().parent)
    clips, options, answers, missing, count = ClipsBuilder(), StringsBuilder(), [], {}, 0
    for number, entry in enumerate(json_list(path, _LAYOUT)):
        place = f"{path}, entry {number}"
        name, texts, answer = _entry(place, entry)
        count = count or len(texts)
        if len(texts) != count:
            raise DataError(f"{place} has {len(texts)} choices, and the first entry {count}; give each clip as many")
        if not 0 <= answer < count:
            raise DataError(f"{place}: its answer is {answer}, but it has {count} choices; answers count from 0")
        clip = Clip(path=f"{base}/{name}" if name[0] != "/" else name)
        if not Path(clip.path).exists():
            missing[clip.path] = None
        clips.add(clip)
        cleaned = [clean_caption(text) for text in texts]
        if not cleaned[answer].strip():
            raise DataError(
                f"{place}: its right choice {texts[answer]!r} has no word; correct the entry or take it out"
            )
        for text in cleaned:
            options.add(text)
        answers.append(answer)
    if not answers:
        raise DataError(f"{source} holds no choices; expected {_LAYOUT}")
    table = clips.done()
    if missing:
        raise missing_files(list(missing), len({clip.path for clip in table}), source)
    return Choices(table, options.done(), torch.tensor(answers), count)


def _entry(place: str, entry: Any) -> tuple[str, list[str], int]:
    """Name, texts and answer of an entry."""
    if not isinstance(entry, dict) or not {"video", "caption", "answer"} <= entry.keys():
        raise DataError(f"{place}: it is {shortened(entry)}; expected {_LAYOUT}")
    name, texts, answer = entry["video"], entry["caption"], entry["answer"]
    if not isinstance(name, str) or not name:
        raise DataError(f'{place}: "video" is {shortened(name)}; it must name a file')
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{place}: "caption" is {shortened(texts)}; it must be a list of at least two texts')
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f'{place}: "answer" is {shortened(answer)}; it must be a whole number, counted from 0')
    return name, texts, answer
