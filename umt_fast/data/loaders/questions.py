"""Token ids of questions and of their weighted answers, in shapes that do not depend on how many answers there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.questions import QuestionList


class AnswerTokens(Tokens):
    """Token ids of answers: class token, word pieces, closing [SEP], cut to max_length.

    As officially the [SEP] is a part of the text: an answer that is too long loses it, too.
    """

    def __init__(self, answers: Sequence[str], tokenizer: Any, *, max_length: int, fixed: bool = False) -> None:
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; an answer needs the class token and a word: 2 or more")
        closed = [f"{answer} {tokenizer.sep_token}" for answer in answers]
        super().__init__(closed, tokenizer, max_length=max_length, fixed=fixed)


class QuestionTokens:
    """Columns of a batch of B questions, made by the decoding processes (ClipLoader.add_columns).

    `ids` int64 and `mask` bool (B, l) of the questions; of the answers `answer_ids` int64 and `answer_mask` bool (B, A, m),
    and `answer_weights` fp32 (B, A). Every question has `rows` = A rows of answers; those it has no answer for are empty and
    weigh 0. Of a question with more answers the most frequent ones are taken, the first of equals.
    """

    def __init__(
        self,
        questions: QuestionList,
        tokenizer: Any,
        *,
        max_length: int,
        max_answer: int,
        rows: int,
        fixed: bool = False,
    ) -> None:
        self.questions = Tokens(questions.questions, tokenizer, max_length=max_length, fixed=fixed)
        self.answers = AnswerTokens(questions.answers, tokenizer, max_length=max_answer, fixed=fixed)
        self.ends, self.weights, self.rows = questions.ends, questions.weights, rows

    def columns(self, chosen: Tensor) -> dict[str, Tensor]:
        """The columns of some questions by their numbers, int64 (B,)."""
        ids, mask = self.questions[chosen]
        answers, weights = self._chosen(chosen)
        held = answers >= 0
        found, filled = self.answers[answers[held]]
        answer_ids = found.new_full((*answers.shape, found.shape[1]), self.answers.pad)
        answer_mask = torch.zeros_like(answer_ids, dtype=torch.bool)
        answer_ids[held], answer_mask[held] = found, filled
        return {
            "ids": ids,
            "mask": mask,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "answer_weights": weights,
        }

    def _chosen(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) numbers of answers, -1 where there is none, and their weights, there 0."""
        answers = torch.full((len(chosen), self.rows), -1)
        weights = torch.zeros(len(chosen), self.rows)
        for row, number in enumerate(chosen.tolist()):
            first, end = self.ends[number : number + 2].tolist()
            own = self.weights[first:end]
            kept = own.argsort(descending=True, stable=True)[: self.rows].sort().values
            answers[row, : len(kept)], weights[row, : len(kept)] = first + kept, own[kept]
        return answers, weights


def answer_tokens(answers: Sequence[str], tokenizer: Any, *, max_length: int = 5) -> tuple[Tensor, Tensor]:
    """int64 ids and bool mask (A, l) of a whole list of answers; see AnswerTokens. Raises ValueError: none, or no room."""
    if not answers:
        raise ValueError("the list of answers is empty; give at least one")
    return AnswerTokens(answers, tokenizer, max_length=max_length)[torch.arange(len(answers))]
