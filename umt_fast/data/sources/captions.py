"""Captions with their clips, as training reads them: rows, their text as the official code cleans it."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.errors import DataError
from umt_fast.data.sources.columns import Clips, ClipsBuilder, Strings, StringsBuilder, first_of_each
from umt_fast.data.sources.entries import read_entries

log = logging.getLogger("umt_fast.data")

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/]")
_BLANKS = re.compile(r"\s{2,}")


def clean_texts(texts: Any, kind: str = "text") -> list[str]:
    """Texts that a program hands over, cleaned as captions are. Raises DataError: one that is no text, or has no word."""
    if not isinstance(texts, Iterable):
        raise DataError(f"{kind}s are {texts!r:.60}, of type {type(texts).__name__}; give a list of texts (str)")
    cleaned = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{kind} {number} is {text!r:.60}, of type {type(text).__name__}; give texts (str)")
        cleaned.append(clean_caption(text))
        if not cleaned[-1].strip():
            raise DataError(f"the {kind} {text!r} has no word; leave it out, or give one with a word")
    return cleaned


def clean_caption(text: str) -> str:
    """Lower case, without punctuation, single blanks: the official pre-processing of captions.

    A single tab or line break inside stays as it is, as officially; tokenizers take each for a blank.
    """
    # Half of a surrogate pair, which JSON may hold, is no text that a tokenizer takes.
    text = text.encode("utf-8", "ignore").decode()
    text = _SPACED.sub(" ", _DROPPED.sub("", text.lower())).replace("<person>", "person")
    return _BLANKS.sub(" ", text).rstrip("\n").strip(" ")


@dataclass(frozen=True, slots=True)
class CaptionList:
    """Rows of captions with their media: row i is captions[i] of clips[i]."""

    clips: Clips
    captions: Strings
    sample: Tensor
    """int64: the first row with the same file. Under same_sample 'media' such rows are each other's right answers."""


def read_captions(path: str | Path, root: str = "", *, workers: int = 4) -> CaptionList:
    """Reads a caption list for training; see data/sources/entries.py for the layouts and their errors.

    A list of captions becomes a row each, and so does a list of files. A caption without any word is left out; one line says
    how many were.

    Raises:
        DataError: also a list without any row.
    """
    return _join([(str(path), root)], workers)


def read_corpora(entries: Sequence[str], *, workers: int = 4) -> CaptionList:
    """Several caption lists as one, each given as LIST or LIST=FOLDER; a file keeps its identity within a list."""
    sources = [list_and_folder(entry) for entry in entries]
    for name, root in sources:
        if root and not Path(root).is_dir():
            raise DataError(f"{name}={root} is not a list, and {root} is not a folder; give LIST or LIST=FOLDER")
    return _join(sources, workers)


def list_and_folder(entry: str) -> tuple[str, str]:
    """Splits LIST=FOLDER at the `=` before which a list ends: either path may hold others, as those of year=2024/ do."""
    if "=" not in entry or Path(entry).is_file():
        return entry, ""
    parts = entry.split("=")
    splits = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    found = [split for split in splits if split[0].endswith(".tar") or Path(split[0]).is_file()]
    found = found or [split for split in splits if Path(split[1]).is_dir()]
    if found:
        return found[0]
    return (entry, "") if entry.endswith(".tar") else splits[0]


def _join(sources: list[tuple[str, str]], workers: int) -> CaptionList:
    clips, captions = ClipsBuilder(), StringsBuilder()
    hashes: list[array] = []
    for source, root in sources:
        own, empty = array("q"), 0
        for entry in read_entries(source, root, workers):
            texts = [text for text in map(clean_caption, entry.captions) if text.strip()]
            empty += len(entry.captions) - len(texts)
            for text in texts:
                for clip in entry.clips:
                    clips.add(clip)
                    captions.add(text)
                    own.append(hash(clip.name))
        if empty:
            log.warning("%s: left out %d captions without any word", source, empty)
        if not own:
            raise DataError(f"{source} holds no captions")
        hashes.append(own)
    table, first, sample = clips.done(), 0, []
    for own in hashes:
        sample.append(first_of_each(own, lambda row, first=first: table[first + row].name) + first)
        first += len(own)
    return CaptionList(table, captions.done(), torch.from_numpy(np.concatenate(sample)))
