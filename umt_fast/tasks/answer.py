"""`eval answer`: accuracy of a fine-tuned model on questions about clips, its answers chosen from a list or written freely."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from umt_fast.config import ConfigError, DataConfig, require
from umt_fast.data.loaders.questions import AnswerTokens
from umt_fast.data.loaders.tokens import Tokens, tokenizer_of, warn_of_unknown
from umt_fast.data.sources.questions import read_answers, read_questions
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.precision import usable_dtype
from umt_fast.files import write_json
from umt_fast.models.description import text_config, vit_config
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import WeightsFile, vocabulary_in
from umt_fast.models.weights.downstream import fit_question
from umt_fast.tasks.answering import (
    answer_list,
    chooser,
    count_answerable,
    listing,
    right_rows,
    shares_of,
    writer,
)
from umt_fast.tasks.base import EvalOptions, register_evaluation
from umt_fast.tasks.matching import whole_frames

log = logging.getLogger("umt_fast")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(EvalOptions):
    """How answers are found."""

    answers: Path | None = None
    """List of the answers to choose from: .json, texts; needed unless answers are written (free)."""
    top_k: int = 128
    """Candidates that are kept by their first word and judged whole; more than there is: all."""
    rule: Literal["official", "chain"] = "official"
    """`official`: the first word's probability counts twice, as in the published scores; `chain`: once."""
    free: bool = False
    """Write answers word by word, the most probable each time, up to [SEP] or max_answer; right if every word is."""
    max_length: int = 0
    """Tokens of a question, class token included; longer ones are cut. 0: as in training."""
    max_answer: int = 0
    """Tokens of an answer, class token and [SEP] included; 0: as in training."""
    tokenizer: str = ""
    """By name, or a folder with a vocab.txt; empty: as the run was given it, or the usual one of the named model."""

    def check(self) -> None:
        """Raises ConfigError: no list to choose from and none to be written, options of choosing where answers are written."""
        require(self.top_k >= 1, f"top_k is {self.top_k}; it must be at least 1")
        if not self.free:
            require(self.answers is not None, "answers is empty; give the list to choose from, or --free to write them")
            return
        for name in ("answers", "top_k", "rule"):
            unset = type(self).__dataclass_fields__[name].default
            require(getattr(self, name) == unset, f"--{name} is for answers that are chosen; leave it or --free out")


class Answer:
    """Accuracy on a list of questions about clips: official .json lists as they are, see data/sources/questions.py."""

    name, tasks, Options = "answer", ("question_answering",), AnswerOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: AnswerOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """`accuracy` over all entries of the list, and `accuracy_TYPE` where it names types; `questions`, `clips`;
        `answerable`, the share of questions whose answer is in the list; `cut`, questions longer than max_length. With scores
        every prediction."""
        options.check()
        lengths = {name: self._length(name, options, described) for name in ("max_length", "max_answer")}
        words = tokenizer_of(options.tokenizer, vocabulary_in(file.rest), described["text"]["vocab_size"], source)
        questions = read_questions([f"{list_path}={data.root}" if data.root else str(list_path)], train=False)
        answers = [] if options.answers is None else read_answers(options.answers)
        model = QuestionModel(vit_config(described), text_config(described))
        fit_question(model, file.state, str(source))
        model.to(ranks.device).eval()
        tokens = Tokens(questions.questions, words, max_length=lengths["max_length"])
        if ranks.first:
            asked = {"questions": questions.questions} | ({} if options.free else {"answers to choose from": answers})
            repeated = len(questions) - len(set(questions.names))
            if repeated:
                log.warning(
                    "%s: %d of %d questions have the question_id of another one; here each counts, the official figure keeps "
                    "the last of each",
                    list_path,
                    repeated,
                    len(questions),
                )
            warn_of_unknown(words, asked)
        whole, dtype = whole_frames(replace(data, root="")), usable_dtype(described["dtype"], ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=dtype == "bf16"):  # as it was trained
            if options.free:
                judge = writer(model, words, max_answer=lengths["max_answer"])
            else:
                kept = {"top_k": options.top_k, "rule": options.rule}
                judge = chooser(model, answers, words, max_answer=lengths["max_answer"], **kept)
            found = answer_list(model, questions, tokens, judge, whole, ranks, batch_size=options.batch_size)
        written = AnswerTokens(questions.answers, words, max_length=lengths["max_answer"]) if options.free else None
        right = right_rows(questions, found, written)
        figures: dict[str, Any] = shares_of(questions, right)
        figures |= {"questions": len(questions), "clips": len({clip.name for clip in questions.clips})}
        if not options.free:
            figures["answerable"] = count_answerable(questions, answers) / len(questions)
        figures["cut"] = tokens.count_cut()
        if options.scores is not None and ranks.first:
            write_json(options.scores, {"questions": listing(questions, found, right)})
        return figures

    @staticmethod
    def _length(name: str, options: AnswerOptions, described: dict[str, Any]) -> int:
        value, limit = getattr(options, name), described["text"]["max_positions"]
        if value and not 2 <= value <= limit:
            raise ConfigError(
                f"{name} is {value}; it must lie in [2, {limit}], the positions of this model (0: as trained)"
            )
        return value or described[name]


register_evaluation(Answer())
