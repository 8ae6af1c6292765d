"""Captions with their clips, their text as the official code cleans it, and their tokens, made beside the decoding."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umt_fast.config import CLIP_TEXT_LENGTH
from umt_fast.data.clip import DataError
from umt_fast.data.entries import read_entries
from umt_fast.data.loader import ClipLoader
from umt_fast.data.packed import Clips, ClipsBuilder, Strings, StringsBuilder, first_of_each

log = logging.getLogger("umt_fast.data")

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/]")
_BLANKS = re.compile(r"\s{2,}")


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
    """Reads a caption list for training; see data.entries for the layouts and their errors.

    A list of captions becomes a row each, and so does a list of files. A caption without any word is left out; one line says
    how many were.

    Raises:
        DataError: also a list without any row.
    """
    return _join([(str(path), root)], workers)


def read_corpora(entries: Sequence[str], *, workers: int = 4) -> CaptionList:
    """Several caption lists as one, each given as LIST or LIST=FOLDER; a file keeps its identity within a list."""
    sources = [_list_and_folder(entry) for entry in entries]
    for name, root in sources:
        if root and not Path(root).is_dir():
            raise DataError(f"{name}={root} is not a list, and {root} is not a folder; give LIST or LIST=FOLDER")
    return _join(sources, workers)


def _list_and_folder(entry: str) -> tuple[str, str]:
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


class Tokens:
    """Token ids of captions, made when they are asked for: by the decoding processes, ahead of the training step.

    Sequences are [CLS] and word pieces without a closing [SEP], as released UMT checkpoints were trained (`sep` adds it).
    Batches are as long as their longest text, or always `max_length` where `fixed`: compiled steps want one shape.
    `teacher` adds what CLIP's text tower reads of the same (cleaned) captions, see teacher_ids.
    """

    def __init__(
        self, captions: Sequence[str], tokenizer: Any, *, max_length: int, sep: bool = False, fixed: bool = False,
        teacher: bool = False,
    ) -> None:  # fmt: skip
        self.captions = captions if isinstance(captions, Strings) else Strings.of(captions)
        # The Rust object alone: a decoding process need not import transformers.
        self.tokenizer = tokenizer.backend_tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.cls, self.pad = tokenizer.cls_token_id, tokenizer.pad_token_id
        self.end = [tokenizer.sep_token_id] if sep else []
        self.pieces = max_length - 1 - len(self.end)
        self.least = max_length if fixed else 1
        self.fixed, self.teacher = fixed, teacher

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """int64 ids and bool mask (B, l) of some rows."""
        texts = [self.captions[row] for row in rows.tolist()]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        sequences = [[self.cls, *text.ids[: self.pieces], *self.end] for text in encoded]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        longest = max(self.least, int(lengths.max()))
        ids = torch.tensor([sequence + [self.pad] * (longest - len(sequence)) for sequence in sequences])
        return ids, torch.arange(longest) < lengths[:, None]

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """The same by the names of a batch, and `teacher_ids` where they were asked for."""
        ids, mask = self[rows]
        return {"ids": ids, "mask": mask} | ({"teacher_ids": self.teacher_ids(rows)} if self.teacher else {})

    def teacher_ids(self, rows: Tensor) -> Tensor:
        """int64 (B, l): start token, CLIP's word pieces, end token, zeros; longer captions lose their last pieces."""
        import open_clip  # slow to import, and most runs need no such ids

        ids = open_clip.tokenize([self.captions[row] for row in rows.tolist()], CLIP_TEXT_LENGTH)
        # The end token has the largest id.
        return ids if self.fixed else ids[:, : int(ids.argmax(1).max()) + 1]


def load_tokenizer(name: str) -> Any:
    """A BERT tokenizer by name (fetched) or from a local folder with a vocab.txt.

    Raises DataError where it is neither.
    """
    from transformers import BertTokenizerFast

    # Of a folder without a vocabulary a tokenizer is made all the same, to which every word is unknown.
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("vocab.txt", "tokenizer.json")):
        raise DataError(f"the folder {name} holds no tokenizer: neither vocab.txt nor tokenizer.json")
    missing = f"no tokenizer {name!r}: neither a folder with a vocab.txt nor a name that can be fetched"
    try:
        # Where it cannot be reached, Hugging Face would be asked for each of ten files for half a minute.
        unreachable = not Path(name).is_dir() and not _reached(name)
        tokenizer = BertTokenizerFast.from_pretrained(name, local_files_only=unreachable)
    except (OSError, ValueError) as error:
        raise DataError(missing) from error
    # What cannot be fetched may come as its special tokens alone, without an error.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(missing)
    return tokenizer


def _reached(name: str) -> bool:
    """Whether Hugging Face answers, or has answered before, when asked for the first file of a tokenizer."""
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(name, "tokenizer_config.json")
    except errors.LocalEntryNotFoundError:
        return False
    except (OSError, ValueError):  # an answer: no such name, or no such file
        pass
    return True


class CaptionLoader:
    """A ClipLoader's batches with the captions of their clips: adds `ids`, `mask` and `sample` to each."""

    def __init__(self, clips: ClipLoader, tokens: Tokens, sample: Tensor) -> None:
        self.clips, self.sample = clips, sample
        clips.add_columns(tokens.columns)

    @property
    def bad_files(self) -> dict[str, str]:
        return self.clips.bad_files

    @property
    def identity(self) -> str:
        return self.clips.identity

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
                yield batch | {"sample": self.sample[batch["index"]]}
        finally:
            batches.close()
