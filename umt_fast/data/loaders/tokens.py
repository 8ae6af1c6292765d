"""Token ids of captions, made when they are asked for: by the decoding processes, ahead of the training step."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import CLIP_TEXT_LENGTH, Vocabulary
from umt_fast.data.errors import DataError
from umt_fast.data.sources.columns import Strings
from umt_fast.extras import packages_of
from umt_fast.files import checksum

log = logging.getLogger("umt_fast")

# Texts that are encoded together where all of them are.
_AT_ONCE = 4096


class Tokens:
    """Token ids of captions, made when they are asked for: by the decoding processes, ahead of the training step.

    Sequences are [CLS] and word pieces without a closing [SEP], as released UMT checkpoints were trained (`sep` adds it).
    Batches are as long as their longest text, or always `max_length` where `fixed`: compiled steps want one shape.
    `teacher` adds what CLIP's text tower reads of the same (cleaned) captions, see teacher_ids.
    """

    def __init__(
        self,
        captions: Sequence[str],
        tokenizer: Any,
        *,
        max_length: int,
        sep: bool = False,
        fixed: bool = False,
        teacher: bool = False,
    ) -> None:
        self.captions = captions if isinstance(captions, Strings) else Strings.of(captions)
        # The Rust object alone: a decoding process need not import transformers.
        self.tokenizer = tokenizer.backend_tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.cls, self.pad, self.unknown = tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
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

    def count_cut(self) -> int:
        """How many of the texts are longer than max_length and lose their last pieces."""
        parts = (self.captions[first : first + _AT_ONCE] for first in range(0, len(self), _AT_ONCE))
        encoded = (self.tokenizer.encode_batch_fast(part, add_special_tokens=False) for part in parts)
        return sum(len(text.ids) > self.pieces for part in encoded for text in part)

    def count_unknown(self) -> int:
        """How many of the texts have a word that the tokenizer does not know, and that is read as its unknown token."""
        parts = (self.captions[first : first + _AT_ONCE] for first in range(0, len(self), _AT_ONCE))
        encoded = (self.tokenizer.encode_batch_fast(part, add_special_tokens=False) for part in parts)
        return sum(self.unknown in text.ids for part in encoded for text in part)

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """The same by the names of a batch, and `teacher_ids` where they were asked for."""
        ids, mask = self[rows]
        return {"ids": ids, "mask": mask} | ({"teacher_ids": self.teacher_ids(rows)} if self.teacher else {})

    def teacher_ids(self, rows: Tensor) -> Tensor:
        """int64 (B, l): start token, CLIP's word pieces, end token, zeros; longer captions lose their last pieces."""
        with packages_of("train"):
            import open_clip  # slow to import, and most runs need no such ids

        ids = open_clip.tokenize([self.captions[row] for row in rows.tolist()], CLIP_TEXT_LENGTH)
        # The end token has the largest id.
        return ids if self.fixed else ids[:, : int(ids.argmax(1).max()) + 1]


def warn_of_unknown(tokenizer: Any, texts: dict[str, Sequence[str]]) -> None:
    """One line that counts texts with words that a tokenizer does not know: to the model these are all the same word.

    texts: cleaned ones, by what they are, as questions.
    """
    counts = {kind: Tokens(its, tokenizer, max_length=2).count_unknown() for kind, its in texts.items()}
    if any(counts.values()):
        said = " and ".join(f"{counts[kind]} of {len(its)} {kind}" for kind, its in texts.items())
        log.warning("%s have words that the tokenizer does not know; each is read as %s", said, tokenizer.unk_token)


def load_tokenizer(name: str) -> Any:
    """A BERT tokenizer by name (fetched) or from a local folder with a vocab.txt.

    Raises DataError where it is neither.
    """
    with packages_of("text"):
        from transformers import BertTokenizerFast

    if not name:
        raise DataError("tokenizer is empty; give a name, or a folder with a vocab.txt")
    # Of a folder without a vocabulary a tokenizer is made all the same, to which every word is unknown.
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("vocab.txt", "tokenizer.json")):
        raise DataError(f"the folder {name} holds no tokenizer: neither vocab.txt nor tokenizer.json")
    missing = f"no tokenizer {name!r}: neither a folder with a vocab.txt nor a name that can be fetched"
    missing += "; name a folder that is there (tokenizer=..., of a command --tokenizer)"
    try:
        # Where it cannot be reached, Hugging Face would be asked for each of ten files for half a minute.
        alone = Path(name).exists() or not _reached(name)
        tokenizer = BertTokenizerFast.from_pretrained(name, local_files_only=alone)
    except (OSError, ValueError) as error:
        raise DataError(missing) from error
    # What cannot be fetched may come as its special tokens alone, without an error.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(
            f"the tokenizer in {name} has no words; its vocabulary is empty" if Path(name).is_dir() else missing
        )
    return tokenizer


def fingerprint_of(tokenizer: Any, count: int | None = None) -> str:
    """The number of its tokens, or of the first `count`, and a hash of them in their order: see config.Vocabulary."""
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items())[:count]
    lines = "".join(f"{number} {token}\n" for number, token in tokens)
    return f"{len(tokens)}-{checksum(lines.encode())[:12]}"


def vocabulary_of(tokenizer: Any, name: str) -> Vocabulary:
    """What files carry of a tokenizer that was given as `name`."""
    parts = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "special_tokens": tokenizer.special_tokens_map}
    return Vocabulary(name, fingerprint_of(tokenizer), json.dumps(parts, default=str))


def load_vocabulary(vocabulary: Vocabulary) -> Any:
    """The tokenizer that a file carries or names.

    Raises DataError: it cannot be had, or what has the name now has other tokens.
    """
    if vocabulary.definition:
        with packages_of("text"):
            from tokenizers import Tokenizer
            from transformers import BertTokenizerFast

        try:
            parts = json.loads(vocabulary.definition)
            whole = Tokenizer.from_str(parts["tokenizer"])
            tokenizer = BertTokenizerFast(tokenizer_object=whole, **parts["special_tokens"])
        except Exception as error:  # the Rust library has one class for whatever is wrong
            raise DataError(f"the tokenizer {vocabulary.name} that the weights carry is damaged: {error}") from error
    else:
        tokenizer = load_tokenizer(vocabulary.name)
    found = fingerprint_of(tokenizer)
    if vocabulary.fingerprint not in ("", found):
        raise DataError(
            f"the tokenizer {vocabulary.name} has other tokens ({found}) than the one that the model was trained with "
            f"({vocabulary.fingerprint}): texts would be other texts to it. Give the model's own, or leave the option out "
            "where the weights carry it"
        )
    return tokenizer


def require_extended(vocabulary: Vocabulary, start: Vocabulary, source: object) -> None:
    """Refuses a run that starts from weights to which its words have other numbers; further words at the end are none of those.

    Raises DataError. Weights that do not know their tokens are taken as they are.
    """
    if not start.fingerprint:
        return
    count = int(start.fingerprint.partition("-")[0])
    known = fingerprint_of(load_vocabulary(vocabulary), count)
    if known != start.fingerprint:
        raise DataError(
            f"tokenizer {vocabulary.name} ({vocabulary.fingerprint}) does not begin with the tokens of {start.name} "
            f"({start.fingerprint}), which {source} was trained with: its words would be other words. Give that tokenizer, or "
            "one that adds words behind those"
        )


def tokenizer_of(given: str, vocabulary: Vocabulary, vocab_size: int, source: object) -> Any:
    """The given tokenizer of a model that knows vocab_size words, or its own; source: where it came from, for messages.

    Raises DataError: none can be had, none is known, it has more words than the model, or not those it was trained with.
    """
    if not (given or vocabulary.name):
        raise DataError(f"{source} does not say which tokenizer it was trained with; give it: --tokenizer")
    chosen = vocabulary.given(given)
    try:
        tokenizer = load_vocabulary(chosen)
    except DataError as error:
        if given:
            raise
        raise DataError(
            f"{error}. The model of {source} was trained with it; if it has moved, say where: --tokenizer"
        ) from error
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"the tokenizer {chosen.name} has {len(tokenizer)} words, but the model of {source} knows {vocab_size}; give "
            "the one it was trained with: --tokenizer"
        )
    return tokenizer


def _reached(name: str) -> bool:
    """Whether Hugging Face answers, or has answered before, when asked for the first file of a tokenizer."""
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(name, "tokenizer_config.json")
    except (errors.LocalEntryNotFoundError, RuntimeError):  # the latter from a client that was closed
        return False
    except (OSError, ValueError):  # an answer: no such name, or no such file
        pass
    return True
