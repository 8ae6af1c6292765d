"""Fine-tuning for question answering: clips with questions and weighted answers. How it is judged: answering.py.

Legend: B clips, each with a question of m positions; A rows of answers to each, of l positions; M answers in all.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import AttentionBackend, ConfigError, QuestionConfig, TextConfig, VitConfig, require
from umt_fast.config.unused import Refuse
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.questions import QuestionTokens
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer, warn_of_unknown
from umt_fast.data.sources.questions import QuestionList, read_answers, read_questions
from umt_fast.engine.distributed import Ranks
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.description import base_description, text_description
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import load_question
from umt_fast.tasks.answering import answer_list, chooser, count_answerable, right_rows, shares_of
from umt_fast.tasks.base import register
from umt_fast.tasks.clips import clip_loader, random_clips, random_integers
from umt_fast.tasks.matching import whole_frames

log = logging.getLogger("umt_fast")

_IGNORED = -100


def question_states(model: QuestionModel, video: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The whole BERT over questions int64 (B, m), bool mask (B, m), and their clips: (B, m, W)."""
    tokens, _ = model.vision_encoder.embed(video)
    text = model.text_encoder
    return text.fuse(text.encode(ids, mask)[None], mask[None], text.clip_keys(tokens))[0]


def answer_losses(
    model: QuestionModel, states: Tensor, mask: Tensor, ids: Tensor, answer_mask: Tensor, question: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each answer's words, summed: fp32, of the shape of `ids` without its last axis.

    states, mask: of the questions, see question_states. ids, answer_mask: int64 and bool, the class token first: (B, A, l),
    A answers to each question, or (M, l) with `question`. question: int64 (M,), the question of each answer; None with (M, l):
    answer i is to question i. Keys and values are computed once for each question. Logits are computed at every position but
    the last: a batch has few, and a fixed number of them.
    """
    decoder = model.text_decoder
    keys = decoder.question_keys(states)
    if question is not None:
        keys, mask = [(k[question], v[question]) for k, v in keys], mask[question]
    hidden = decoder(ids.view(len(mask), -1, ids.shape[-1])[..., :-1], keys, mask)
    labels = ids[..., 1:].masked_fill(~answer_mask[..., 1:], _IGNORED)
    logits = decoder.cls.predictions(hidden).float()
    losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=_IGNORED, reduction="none")
    return losses.view(labels.shape).sum(-1)


class QuestionTuning(nn.Module):
    """batch of clips with questions and answers -> loss. The whole model is trained and saved."""

    def __init__(
        self,
        vit: VitConfig,
        text: TextConfig,
        *,
        init: str = "",
        max_length: int = 25,
        max_answer: int = 5,
        answers: int = 1,
        dtype: Literal["fp32", "bf16"] = "fp32",
        attention: AttentionBackend = "auto",
    ) -> None:
        """init: a stage-2 or fine-tuned file to start from; empty: untrained. max_length, max_answer, answers: positions of
        questions and answers, and answers to a question, that flops_per_clip counts. dtype: what products are computed in."""
        super().__init__()
        self.vit, self.text, self.dtype = vit, text, dtype
        self.max_length, self.max_answer, self.answers = max_length, max_answer, answers
        self.model = QuestionModel(vit, text)
        if init:
            load_question(self.model, init)
        use_attention(self, attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official layout of question-answering models."""
        return self.model

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some parameters get no gradient: none."""
        return False

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network: tower, text, decoder."""
        model = self.model
        parts = [*model.vision_encoder.encoder.pieces(), *model.text_encoder.pieces()]
        return [*parts, (model.text_decoder, "forward"), (model.text_decoder.cls.predictions, "forward")]

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """The official loss: answers' cross-entropies by their weights, summed over all, divided by the number of clips.

        batch: `video`, `ids`, `mask` of the questions; `answer_ids` int64 and `answer_mask` bool (B, A, l), `answer_weights`
        fp32 (B, A), 0 for rows that only fill up, as QuestionTokens gives them. Or, answers one after another, (M, l) and
        (M,) with `answer_question` int64 (M,), the row of the batch that each belongs to (may be left out where every
        question has one). Returns the fp32 scalar `loss`. Nothing is drawn from the seed.
        """
        with torch.autocast(batch["video"].device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            states = question_states(self.model, batch["video"], batch["ids"], batch["mask"])
            losses = answer_losses(
                self.model,
                states,
                batch["mask"],
                batch["answer_ids"],
                batch["answer_mask"],
                batch.get("answer_question"),
            )
        return {"loss": (batch["answer_weights"] * losses).sum() / len(batch["video"])}

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip, its question and its answers, forward and backward."""
        return flops.question_flops(
            self.vit, self.text, length=self.max_length, answers=self.answers, answer=self.max_answer - 1
        )


class AnswerValidation:
    """Accuracy on the questions of data.validation between epochs, chosen from `answers` by the official rule."""

    best = "accuracy"

    def __init__(self, config: QuestionConfig, ranks: Ranks) -> None:
        """Raises DataError: lists that cannot be read. ConfigError: no list of answers."""
        require(
            config.answers != "",
            f"data.validation is {config.data.validation}, and answers is empty; give the list of answers to choose from",
        )
        self.config, self.ranks = config, ranks
        self.questions = read_questions([config.data.validation], train=False)
        self.answers, self.words = read_answers(config.answers), load_tokenizer(config.tokenizer)
        beyond = len(self.questions) - count_answerable(self.questions, self.answers)
        if beyond and ranks.first:
            log.warning(
                "%d of the %d questions of %s have no answer in %s: whatever is chosen counts as wrong",
                beyond,
                len(self.questions),
                config.data.validation,
                config.answers,
            )

    def figures(self, objective: QuestionTuning) -> dict[str, float]:
        """The list of answers is prepared anew: it depends on the weights."""
        config, model = self.config, objective.model
        whole = whole_frames(dataclasses.replace(config.data, flip=None, num_sample=1, reader="cpu"))
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=config.run.dtype == "bf16"):
            found = answer_list(
                model,
                self.questions,
                Tokens(self.questions.questions, self.words, max_length=config.max_length),
                chooser(model, self.answers, self.words, max_answer=config.max_answer),
                whole,
                self.ranks,
                batch_size=config.run.batch_size,
            )
        return shares_of(self.questions, right_rows(self.questions, found, None))


# Places in the vocabulary of random text: the class token, and the first word that is none of the special tokens.
_CLS, _FIRST_WORD = 1, 4


class QuestionAnswering:
    """Fine-tuning of a stage-2 model on questions about clips; judged by the answers it chooses or writes."""

    name = "question_answering"
    Config = QuestionConfig

    def settled(self, config: QuestionConfig) -> QuestionConfig:
        """With as many rows of answers as the lists need, where none were given."""
        return config if config.answer_rows else dataclasses.replace(config, answer_rows=listed(config).most_answers)

    def refuse_unread(self, config: QuestionConfig, refuse: Refuse, world_size: int) -> None:
        refuse("data.train", "question answering reads question lists: give them with --questions")
        refuse("data.root", "question lists carry their folders: give LIST=FOLDER")
        refuse("data.separator data.frame_pattern", "question lists have neither columns nor frame folders")
        if not config.data.validation or config.run.validate_epochs == 0:
            refuse("answers", "nothing is judged during training (data.validation, run.validate_epochs)")

    def objective(self, config: QuestionConfig) -> QuestionTuning:
        return QuestionTuning(
            config.student,
            config.text,
            init=config.init,
            max_length=config.max_length,
            max_answer=config.max_answer,
            answers=config.answer_rows or 1,
            dtype=config.run.dtype,
            attention=config.run.attention,
        )

    def untrained(self, config: QuestionConfig) -> QuestionTuning:
        config = copy.copy(config)
        config.init = ""
        return self.objective(config)

    def loader(self, config: QuestionConfig, ranks: Ranks) -> ClipLoader:
        """A clip for each question; see QuestionTokens for what batches hold beside it."""
        questions, tokenizer = listed(config), load_tokenizer(config.tokenizer)
        require(
            len(tokenizer) <= config.text.vocab_size,
            f"text.vocab_size is {config.text.vocab_size}, but the tokenizer {config.tokenizer} has {len(tokenizer)} words",
        )
        if ranks.first:
            texts = {"questions": questions.questions, "answers": questions.answers}
            warn_of_unknown(tokenizer, texts)
        tokens = QuestionTokens(
            questions,
            tokenizer,
            max_length=config.max_length,
            max_answer=config.max_answer,
            rows=config.answer_rows or questions.most_answers,
            # With run.tune the winner is not known yet, and the candidates were timed with this shape.
            fixed=config.run.compile or config.run.cuda_graph or config.run.tune != "off",
        )
        loader = clip_loader(config, questions.clips, config.student.num_frames, ranks)
        loader.add_columns(tokens.columns)
        return loader

    def validation(self, config: QuestionConfig, ranks: Ranks) -> AnswerValidation | None:
        return AnswerValidation(config, ranks) if config.data.validation else None

    def random_batches(self, config: QuestionConfig) -> list[dict[str, Tensor]]:
        """Questions and answers are of full length, and every row of answers is one."""
        batch, words = random_clips(config, config.student.num_frames), config.text.vocab_size
        count, rows = len(batch["index"]), config.answer_rows or 1
        ids = random_integers(words, count, config.max_length, least=min(_FIRST_WORD, words - 1))
        answers = random_integers(words, count, rows, config.max_answer, least=min(_FIRST_WORD, words - 1))
        ids[:, 0] = answers[..., 0] = _CLS
        batch |= {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
        batch |= {"answer_ids": answers, "answer_mask": torch.ones_like(answers, dtype=torch.bool)}
        return [batch | {"answer_weights": torch.full((count, rows), 1 / rows)}]

    def without_noise(self, config: QuestionConfig) -> QuestionConfig:
        student = dataclasses.replace(config.student, drop_path=0.0)
        text = dataclasses.replace(config.text, hidden_dropout=0.0, attention_dropout=0.0)
        return dataclasses.replace(config, student=student, text=text)

    def clips_of_epoch(self, config: QuestionConfig) -> tuple[int, str] | None:
        if not config.questions:
            return None
        return len(listed(config)), f"questions of {', '.join(config.questions)}"

    def visible_tokens(self, config: QuestionConfig) -> int:
        return flops.visible_of(config.student, None)

    def describe(self, config: QuestionConfig) -> dict[str, Any]:
        return base_description(self.name, config) | {
            "text": text_description(config.text),
            "max_length": config.max_length,
            "max_answer": config.max_answer,
        }


def listed(config: QuestionConfig) -> QuestionList:
    """The training questions. Raises ConfigError: there is no list. DataError: one cannot be read."""
    if not config.questions:
        raise ConfigError("questions is empty; give question lists: --questions list.json=folder")
    return read_questions(config.questions, train=True)


register(QuestionAnswering())
