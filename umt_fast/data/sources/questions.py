"""Questions about clips with their answers, and the lists of answers to choose from: the official .json layouts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import clean_caption, list_and_folder
from umt_fast.data.sources.clip import Clip, missing_files, require_list
from umt_fast.data.sources.columns import Clips, ClipsBuilder, Strings, StringsBuilder
from umt_fast.data.sources.json_lists import json_list, shortened

log = logging.getLogger("umt_fast.data")

_LAYOUT = '{"video" or "image": name, "question": text, "answer": text or texts}'


@dataclass(frozen=True, slots=True)
class QuestionList:
    """N questions, row i about clips[i]; the answers of all of them one after another."""

    clips: Clips
    """N rows; a clip with several questions has several."""
    questions: Strings
    """As the official code cleans them."""
    answers: Strings
    """Different answers of each question in the order they are first given, as they are written."""
    ends: Tensor
    """int64 (N + 1,): the answers of question i are ends[i] to ends[i + 1]."""
    weights: Tensor
    """fp32, the share of annotators that gave each answer."""
    names: Strings
    """The `question_id` of each, or its number in the list."""
    kinds: Strings
    """The `type` of each, as ActivityNet-QA has one; empty where there is none."""

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def most_answers(self) -> int:
        """The most different answers that a question has."""
        return int(self.ends.diff().max())

    def answers_of(self, row: int) -> list[str]:
        """The different answers of a question."""
        return self.answers[int(self.ends[row]) : int(self.ends[row + 1])]


def weighted_answers(answers: str | Sequence[str]) -> tuple[list[str], list[float]]:
    """The different answers of an annotation, in order, and the share of annotators that gave each."""
    given = [answers] if isinstance(answers, str) else list(answers)
    if not given:
        raise ValueError("a question has no answer; give a text or a list of at least one")
    counts = Counter(given)
    return list(counts), [count / len(given) for count in counts.values()]


def read_questions(entries: Sequence[str], *, train: bool) -> QuestionList:
    """Question lists, each given as LIST or LIST=FOLDER, as one list.

    A list is the official .json: {"video" or "image": name, "question": text, "answer": text or texts, and optionally
    "question_id" and "type"}. Names are relative to FOLDER, or to the list's own.

    Args:
        train: leave out questions without any word after the clean-up (one line counts them). In evaluation they stay, and
            files that are not there are refused: a score of other questions than the list's would be wrong.

    Raises:
        DataError: no such file, not such a list, an entry without clip, question or answer, an answer without a character, a
            list without any question, files that are not there (counted, the first named).
    """
    builder = _Builder()
    for listed in entries:
        source, root = list_and_folder(listed)
        if root and not Path(root).is_dir():
            raise DataError(f"{source}={root} is not a list, and {root} is not a folder; give LIST or LIST=FOLDER")
        before, empty = len(builder.questions), 0
        for place, number, entry in _entries(Path(source)):
            cleaned = clean_caption(_text(place, entry, "question"))
            if train and not cleaned.strip():
                empty += 1
                continue
            builder.add(_clip(place, entry, source, root), cleaned, _answers(place, entry), entry, number)
        if empty:
            log.warning("%s: left out %d questions without any word", source, empty)
        if len(builder.questions) == before:
            raise DataError(f"{source} holds no questions")
    found = builder.done()
    if not train:
        _require_files(found.clips, ", ".join(entries))
    return found


def read_answers(path: str | Path) -> list[str]:
    """The different texts of a list of answers (.json), in order; one line counts those that are there more than once.

    Raises DataError: no such file, not a list of texts, no text, one without a character.
    """
    path = Path(path)
    require_list(path, "list of answers", "a .json list of texts")
    given = []
    for number, answer in enumerate(json_list(path, "a text")):
        if not isinstance(answer, str):
            raise DataError(f"{path}, entry {number}: it is {shortened(answer)}; an answer must be a text")
        given.append(_answer(f"{path}, entry {number}", answer))
    if not given:
        raise DataError(f"{path} holds no answers; give a list of at least one text")
    different = list(dict.fromkeys(given))
    if len(different) < len(given):
        log.warning("%s: %d answers are there more than once; each is taken once", path, len(given) - len(different))
    return different


class _Builder:
    def __init__(self) -> None:
        self.clips, self.questions, self.answers = ClipsBuilder(), StringsBuilder(), StringsBuilder()
        self.names, self.kinds = StringsBuilder(), StringsBuilder()
        self.ends, self.weights = [0], []

    def add(self, clip: Clip, question: str, answers: list[str], entry: dict[str, Any], number: int) -> None:
        texts, weights = weighted_answers(answers)
        self.clips.add(clip)
        self.questions.add(question)
        for text in texts:
            self.answers.add(text)
        self.weights += weights
        self.ends.append(self.ends[-1] + len(texts))
        self.names.add(str(entry.get("question_id", number)))
        self.kinds.add(str(entry.get("type", "")))

    def done(self) -> QuestionList:
        return QuestionList(
            self.clips.done(),
            self.questions.done(),
            self.answers.done(),
            torch.tensor(self.ends),
            torch.tensor(self.weights, dtype=torch.float32),
            self.names.done(),
            self.kinds.done(),
        )


def _entries(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    require_list(path, "question list", "a .json list of questions")
    for number, entry in enumerate(json_list(path, _LAYOUT)):
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: it is {shortened(entry)}; expected {_LAYOUT}")
        yield place, number, entry


def _text(place: str, entry: dict[str, Any], key: str) -> str:
    if entry.get(key) is None:
        raise DataError(f'{place} has no "{key}": {shortened(entry)}; expected {_LAYOUT}')
    if not isinstance(entry[key], str):
        raise DataError(f'{place}: "{key}" is {shortened(entry[key])}; it must be a text')
    return entry[key]


def _clip(place: str, entry: dict[str, Any], source: str, root: str) -> Clip:
    key = "image" if entry.get("video") is None else "video"
    if entry.get(key) is None:
        raise DataError(f'{place} has no "video" or "image": {shortened(entry)}; expected {_LAYOUT}')
    name = _text(place, entry, key)
    if not name:
        raise DataError(f'{place}: "{key}" is empty; it must name a file')
    base = root or str(Path(source).resolve().parent)
    return Clip(path=name if name[0] == "/" else f"{base}/{name}")


def _answers(place: str, entry: dict[str, Any]) -> list[str]:
    value = entry.get("answer")
    if value is None:
        raise DataError(f'{place} has no "answer": {shortened(entry)}; expected {_LAYOUT}')
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{place}: "answer" is {shortened(value)}; it must be a text or a list of at least one')
    return [_answer(place, text) for text in texts]


def _answer(place: str, text: str) -> str:
    # Half of a surrogate pair, which JSON may hold, is no text that a tokenizer takes.
    text = text.encode("utf-8", "ignore").decode()
    if not text.strip():
        raise DataError(f"{place}: the answer {text!r} has no character; correct it or take it out")
    return text


def _require_files(clips: Clips, source: str) -> None:
    names = list(dict.fromkeys(clip.path for clip in clips))
    missing = [name for name in names if not Path(name).exists()]
    if missing:
        raise missing_files(missing, len(names), source, "give the folder that names are relative to")
