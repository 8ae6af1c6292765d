"""Fine-tuned question-answering models to be used: what is seen in a clip, asked in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from umt_fast.config import require
from umt_fast.data.loaders.given import Videos
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.captions import clean_texts
from umt_fast.data.sources.clip import DataError
from umt_fast.models.description import text_config, vit_config
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.vit import VisionTransformer
from umt_fast.models.weights.downstream import fit_question
from umt_fast.pretrained.base import PretrainedModel
from umt_fast.tasks.answer_ranking import Rule
from umt_fast.tasks.answering import Judge, Prediction, chooser, states_of_clips, writer


class Answer(NamedTuple):
    """A text, and how probable it is among the candidates."""

    text: str
    probability: float


class QuestionAnsweringModel(PretrainedModel):
    """Questions about clips, answered from a list of answers or freely. `pooled` is the plain mean of the tower's tokens."""

    task = "question_answering"
    sampling, augment = "intervals", "whole"
    network: QuestionModel

    @classmethod
    def empty(cls, description: dict[str, Any]) -> QuestionModel:
        return QuestionModel(vit_config(description), text_config(description))

    @classmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        fit_question(network, state, source)

    @property
    def tower(self) -> VisionTransformer:
        return self.network.vision_encoder.encoder

    def answer(
        self,
        videos: Videos,
        questions: str | Sequence[str],
        answers: Sequence[str],
        *,
        top: int = 5,
        top_k: int = 128,
        rule: Rule = "official",
    ) -> list[list[Answer]]:
        """The `top` best answers of a list to each question, best first.

        Args:
            videos: as for features.
            questions: one to every clip, or as many as there are clips; with one clip any number.
            answers: the texts to choose from; one that is there twice counts once.
            top_k: candidates that are kept by their first word and judged whole.
            rule: `official` counts the first word twice, as the published scores do; `chain` ranks by probability.

        Raises:
            DataError: a file that cannot be read, a question without a word, no answers, other numbers of clips and questions.
            ConfigError: top or top_k below 1, no tokenizer known, or not the model's.
        """
        for name, value in (("top", top), ("top_k", top_k)):
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        require(rule in ("official", "chain"), f"rule is {rule!r}; give 'official' or 'chain'")
        if isinstance(answers, str) or not answers:
            raise DataError(f"answers is {answers!r}; give a list of at least one text")
        odd = next((answer for answer in answers if not (isinstance(answer, str) and answer.strip())), None)
        if odd is not None:
            raise DataError(f"answers holds {odd!r:.60}; give texts (str) with at least one character")
        with torch.no_grad(), self._autocast():
            judge = self._chooser(tuple(dict.fromkeys(answers)), top, top_k, rule)
            found = self._predictions(videos, questions, judge)
        return [
            [Answer(*pair) for pair in zip(prediction.answers, prediction.probabilities, strict=True)]
            for prediction in found
        ]

    def answer_freely(self, videos: Videos, questions: str | Sequence[str]) -> list[str]:
        """What the model writes to each question, the most probable word each time; arguments and errors as for answer."""
        with torch.no_grad(), self._autocast():
            judge = writer(self.network, self.tokenizer, max_answer=self.description["max_answer"])
            return [prediction.answers[0] for prediction in self._predictions(videos, questions, judge)]

    def _chooser(self, answers: tuple[str, ...], top: int, top_k: int, rule: Rule) -> Judge:
        """Kept from call to call: the list is prepared once. What is prepared is of these weights, on this device."""
        key = (answers, top, top_k, rule, self.device, self.compute)
        if self.__dict__.get("_prepared", (None,))[0] != key:
            judge = chooser(
                self.network,
                answers,
                self.tokenizer,
                max_answer=self.description["max_answer"],
                top_k=top_k,
                rule=rule,
                listed=top,
            )
            self.__dict__["_prepared"] = key, judge
        return self.__dict__["_prepared"][1]

    def _predictions(self, videos: Videos, questions: str | Sequence[str], judge: Judge) -> list[Prediction]:
        video = self.pixels(videos)
        cleaned = clean_texts([questions] if isinstance(questions, str) else questions, "question")
        texts = cleaned * len(video) if isinstance(questions, str) else cleaned
        if len(texts) != len(video) and len(video) != 1 or not texts:
            raise DataError(f"{len(texts)} questions to {len(video)} clips; give one to each, or several to one clip")
        tokens = Tokens(texts, self.tokenizer, max_length=self.description["max_length"])
        asked = [list(range(len(texts)))] if len(video) == 1 else [[row] for row in range(len(texts))]
        found: dict[int, Prediction] = {}
        for numbers, states, mask in states_of_clips(self.network, video, asked, tokens, at_once=64):
            found |= dict(zip(numbers, judge(states, mask), strict=True))
        return [found[row] for row in range(len(texts))]

    def _finish(self, last: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tower.norm(last)
        return tokens, tokens.mean(1)
