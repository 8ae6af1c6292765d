"""Which answers the questions of a list get: chosen from a list of answers, or written word by word.

A clip is read once, and its keys and values are computed once, however many questions ask about it; the list of answers is
prepared once. Legend: B clips, G questions to each of them at a time, Q questions, m positions of a question, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.questions import AnswerTokens, answer_tokens
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.questions import QuestionList
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.models.answer_decoder import prepare_answers
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import WeightsError
from umt_fast.tasks.answer_ranking import Rule, generate_answers, rank_answers

# Candidates that a prediction lists.
LISTED = 10


class Prediction(NamedTuple):
    """Answers to a question, best first, and their probabilities among the candidates; none where they were written."""

    answers: list[str]
    probabilities: list[float]
    words: list[int] = []
    """Of a written answer: the ids of its words, closing [SEP] included."""


Judge = Callable[[Tensor, Tensor], list[Prediction]]
"""Question states (Q, m, W) and their mask (Q, m) -> a prediction for each."""


def chooser(
    model: QuestionModel,
    answers: Sequence[str],
    tokenizer: Any,
    *,
    max_answer: int,
    top_k: int = 128,
    rule: Rule = "official",
    listed: int = LISTED,
) -> Judge:
    """Chooses from a list of answers, which is prepared here, once; top_k and rule: see rank_answers."""
    device = next(model.parameters()).device
    ids, mask = answer_tokens(answers, tokenizer, max_length=max_answer)
    prepared = prepare_answers(model.text_decoder, ids.to(device), mask.to(device))

    def judge(states: Tensor, asked: Tensor) -> list[Prediction]:
        ranked = rank_answers(model.text_decoder, states, asked, prepared, top_k=top_k, rule=rule)
        if not ranked.probabilities.isfinite().all():
            raise WeightsError("probabilities of answers are not finite: the run that made this checkpoint diverged")
        rows = zip(ranked.answers[:, :listed].tolist(), ranked.probabilities[:, :listed].tolist(), strict=True)
        return [Prediction([answers[number] for number in numbers], shares) for numbers, shares in rows]

    return judge


def writer(model: QuestionModel, tokenizer: Any, *, max_answer: int) -> Judge:
    """Writes answers, the most probable word each time, up to the [SEP] or max_answer positions."""
    names = {"start": tokenizer.cls_token_id, "end": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}

    def judge(states: Tensor, asked: Tensor) -> list[Prediction]:
        written = generate_answers(model.text_decoder, states, asked, max_length=max_answer, **names)
        rows = [[word for word in words if word != names["pad"]] for words in written.tolist()]
        return [Prediction([tokenizer.decode(words, skip_special_tokens=True)], [], words) for words in rows]

    return judge


class Asked(NamedTuple):
    """V different clips, and the numbers of the questions that each is asked."""

    clips: Clips
    questions: list[list[int]]


def by_clip(questions: QuestionList) -> Asked:
    """The questions of a list by their clips, both in the list's order."""
    rows: dict[str, list[int]] = {}
    for number, clip in enumerate(questions.clips):
        rows.setdefault(clip.path, []).append(number)
    first = Clips.of(questions.clips[numbers[0]] for numbers in rows.values())
    return Asked(first, list(rows.values()))


def _rounds(asked: Sequence[Sequence[int]], at_once: int) -> tuple[int, int]:
    """Questions that each clip is asked together, and how often that takes to ask all."""
    groups = max(1, at_once // max(1, len(asked)))
    return groups, -(-max(map(len, asked), default=0) // groups)


@torch.no_grad()
def states_of_clips(
    model: QuestionModel, video: Tensor, asked: Sequence[Sequence[int]], tokens: Tokens, *, at_once: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yields numbers of questions, their states (Q, m, W) and mask (Q, m), some at a time.

    asked: the numbers of the questions to each clip of `video`. at_once: about as many questions are read together; clips
    that have fewer than others are asked idle ones beside, which are dropped.
    """
    text, device = model.text_encoder, video.device
    keys = text.clip_keys(model.vision_encoder.embed(video)[0])
    groups, rounds = _rounds(asked, at_once)
    for first in range(0, groups * rounds, groups):
        parts = [rows[first : first + groups] for rows in asked]
        table = torch.full((max(map(len, parts)), len(parts)), -1)
        for clip, rows in enumerate(parts):
            table[: len(rows), clip] = torch.tensor(rows, dtype=torch.int64)
        held, idle = table >= 0, next(row for rows in parts for row in rows)
        ids, mask = tokens[table.masked_fill(~held, idle).flatten()]
        hidden = text.encode(ids.to(device), mask.to(device))
        mask = mask.to(device).view(*table.shape, -1)
        states = text.fuse(hidden.view(*mask.shape, -1), mask, keys)
        chosen = held.to(device)
        yield table[held].tolist(), states[chosen], mask[chosen]


@torch.no_grad()
def _idle(model: QuestionModel, tokens: Tokens, device: torch.device, *, clips: int, questions: int) -> None:
    """Reads clips and questions for nothing: parts of a sharded model are gathered by all ranks together."""
    vit = model.vision_encoder.encoder.config
    for _ in range(clips):
        shape = (1, vit.num_frames, vit.image_size, vit.image_size, 3)
        model.vision_encoder.embed(torch.zeros(shape, dtype=torch.uint8, device=device))
    for _ in range(questions):
        model.text_encoder.encode(*(part.to(device) for part in tokens[torch.tensor([0])]))


@torch.no_grad()
def answer_batches(
    model: QuestionModel,
    batches: Iterable[dict[str, Tensor]],
    asked: Sequence[Sequence[int]],
    tokens: Tokens,
    judge: Judge,
    ranks: Ranks,
    *,
    batch_size: int,
) -> list[Prediction]:
    """A prediction for each question, the same on every rank.

    Args:
        model: in evaluation mode, on the ranks' device.
        batches: of this rank's clips, `video` and `index`, the clip's number; a rank may have none, a clip counts once.
        asked: the numbers of the questions to each clip. tokens: of all questions.
        batch_size: questions judged at a time; four times as many are read.
    """
    own: dict[int, Prediction] = {}
    at_once, coming = 4 * batch_size, iter(batches)
    while True:
        batch = next(coming, None)
        rows = [] if batch is None else [asked[clip] for clip in batch["index"].tolist()]
        rounds = _rounds(rows, at_once)[1]
        shared = gather((batch is not None, rounds))
        if not any(has for has, _ in shared):
            break
        if batch is not None:
            video = batch["video"].to(ranks.device)
            for numbers, states, mask in states_of_clips(model, video, rows, tokens, at_once=at_once):
                for first in range(0, len(numbers), batch_size):
                    part = slice(first, first + batch_size)
                    own |= dict(zip(numbers[part], judge(states[part], mask[part]), strict=True))
        idle = max(others for _, others in shared) - rounds
        _idle(model, tokens, ranks.device, clips=int(batch is None), questions=idle)
    found = {row: prediction for part in gather(own) for row, prediction in part.items()}
    return [found[row] for row in range(sum(map(len, asked)))]


def answer_list(
    model: QuestionModel,
    questions: QuestionList,
    tokens: Tokens,
    judge: Judge,
    data: DataConfig,
    ranks: Ranks,
    *,
    batch_size: int,
) -> list[Prediction]:
    """The same for a list of questions, whose clips the ranks share, `batch_size` at a time. Raises DataError: a clip that
    cannot be read. WeightsError: probabilities that are not finite."""
    vit, asked = model.vision_encoder.encoder.config, by_clip(questions)
    loader = ClipLoader(
        asked.clips,
        data,
        num_frames=vit.num_frames,
        image_size=vit.image_size,
        batch_size=batch_size,
        train=False,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return answer_batches(model, loader, asked.questions, tokens, judge, ranks, batch_size=batch_size)


def count_answerable(questions: QuestionList, answers: Sequence[str]) -> int:
    """How many questions have one of their answers in a list to choose from."""
    known = set(answers)
    return sum(not known.isdisjoint(questions.answers_of(row)) for row in range(len(questions)))


def right_rows(questions: QuestionList, predictions: Sequence[Prediction], written: AnswerTokens | None) -> list[bool]:
    """Whether each question got one of its answers, letter by letter.

    The official figure differs where a list is unusual. It keeps one entry for each `question_id`, the last answer and the last
    prediction, so that questions that share one count once, and against each other's answer; here every entry counts. And it
    compares a prediction with the whole annotation, so that a list of right answers is never met, even a list of one; here any
    of them is right. On the published lists, of one text and one id to each question, both are the same.

    written: the tokens of questions.answers, where answers were written: then word by word, as an answer reads in training,
    so that one which is too long is right when its beginning is.
    """
    right = []
    for row, prediction in enumerate(predictions):
        if written is None:
            right.append(prediction.answers[0] in questions.answers_of(row))
            continue
        ids, mask = written[torch.arange(*questions.ends[row : row + 2].tolist())]
        right.append(any(its[held][1:].tolist() == prediction.words for its, held in zip(ids, mask, strict=True)))
    return right


def shares_of(questions: QuestionList, right: Sequence[bool]) -> dict[str, float]:
    """`accuracy`, the share of all entries of the list (see right_rows for the official figure), and `accuracy_TYPE` for each
    type of questions that the list names."""
    figures = {"accuracy": sum(right) / len(right)}
    by_kind: dict[str, list[bool]] = {}
    for kind, its in zip(questions.kinds, right, strict=True):
        if kind:
            by_kind.setdefault(kind, []).append(its)
    return figures | {f"accuracy_{kind}": sum(its) / len(its) for kind, its in sorted(by_kind.items())}


def listing(questions: QuestionList, predictions: Sequence[Prediction], right: Sequence[bool]) -> list[dict[str, Any]]:
    """What `eval --scores` writes: `question_id` and `answer` as in the official prediction files, and more."""
    return [
        {
            "question_id": questions.names[row],
            "answer": prediction.answers[0],
            "clip": questions.clips[row].name,
            "question": questions.questions[row],
            "expected": questions.answers_of(row),
            "right": right[row],
            "found": [
                [answer, round(share, 5)]
                for answer, share in zip(prediction.answers, prediction.probabilities, strict=False)
            ],
        }
        for row, prediction in enumerate(predictions)
    ]
