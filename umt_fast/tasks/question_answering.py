"""Question answering: fine-tuning on questions with weighted answers, and the answers of a list that questions get.

Legend: B clips, each with a question of m positions; M answers to them, of l positions, one or more to a question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import AttentionBackend, TextConfig, VitConfig
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.models import flops
from umt_fast.models.answer_decoder import AnswerList
from umt_fast.models.attention import use_attention
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import load_question
from umt_fast.tasks.answer_ranking import LOGITS_MEMORY, Rule, rank_answers

_IGNORED = -100


def weighted_answers(answers: str | Sequence[str]) -> tuple[list[str], list[float]]:
    """The different answers of an annotation, in order, and the share of annotators that gave each."""
    given = [answers] if isinstance(answers, str) else list(answers)
    if not given:
        raise ValueError("a question has no answer; give a text or a list of at least one")
    counts = Counter(given)
    return list(counts), [count / len(given) for count in counts.values()]


def answer_tokens(answers: Sequence[str], tokenizer: Any, *, max_length: int = 5) -> tuple[Tensor, Tensor]:
    """int64 ids and bool mask (A, l) of answers: class token, word pieces, closing [SEP], cut to max_length.

    As officially the [SEP] is a part of the text: an answer that is too long loses it, too.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; an answer needs the class token and a word: 2 or more")
    if not answers:
        raise ValueError("the list of answers is empty; give at least one")
    closed = [f"{answer} {tokenizer.sep_token}" for answer in answers]
    return Tokens(closed, tokenizer, max_length=max_length)[torch.arange(len(closed))]


def question_states(model: QuestionModel, video: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The whole BERT over questions int64 (B, m), bool mask (B, m), and their clips: (B, m, W)."""
    tokens, _ = model.vision_encoder.embed(video)
    text = model.text_encoder
    return text.fuse(text.encode(ids, mask)[None], mask[None], text.clip_keys(tokens))[0]


def answer_losses(
    model: QuestionModel, states: Tensor, mask: Tensor, ids: Tensor, answer_mask: Tensor, question: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each answer's words, summed: fp32 (M,).

    states, mask: of the questions, see question_states. ids, answer_mask: int64 and bool (M, l), the class token first.
    question: int64 (M,), the question of each answer; None: answer i is to question i. Keys and values are computed once for
    each question. Logits are computed at every position but the last: a batch has few, and a fixed number of them.
    """
    decoder = model.text_decoder
    keys = decoder.question_keys(states)
    if question is not None:
        keys, mask = [(k[question], v[question]) for k, v in keys], mask[question]
    hidden = decoder(ids[:, None, :-1], keys, mask)[:, 0]
    labels = ids[:, 1:].masked_fill(~answer_mask[:, 1:], _IGNORED)
    logits = decoder.cls.predictions(hidden).float()
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none").sum(1)


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
        dtype: Literal["fp32", "bf16"] = "fp32",
        attention: AttentionBackend = "auto",
    ) -> None:
        """init: a stage-2 or fine-tuned file to start from; empty: untrained. max_length, max_answer: positions of questions
        and answers that flops_per_clip counts. dtype: what products are computed in."""
        super().__init__()
        self.vit, self.text, self.max_length, self.max_answer, self.dtype = vit, text, max_length, max_answer, dtype
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

        batch: `video`, `ids`, `mask` of the questions; `answer_ids` int64 and `answer_mask` bool (M, l), `answer_weights`
        fp32 (M,), and `answer_question` int64 (M,), the row of the batch that each belongs to (may be left out where every
        question has one). Rows of weight 0 fill M up to a fixed number. Returns the fp32 scalar `loss`. Nothing is drawn
        from the seed.
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
        """Matrix-product FLOPs of a clip, its question and one answer, forward and backward."""
        return flops.question_flops(self.vit, self.text, length=self.max_length, answer=self.max_answer - 1)


@torch.no_grad()
def answer_questions(
    model: QuestionModel,
    batches: Iterable[dict[str, Tensor]],
    answers: AnswerList,
    ranks: Ranks,
    *,
    top_k: int = 128,
    rule: Rule = "official",
    memory: int = LOGITS_MEMORY,
) -> dict[int, int]:
    """The best answer of a list to each question of all ranks: question's number -> answer's number, on every rank.

    batches: of this rank, `video`, `ids`, `mask`, and `row` int64 (B,), the questions' numbers; a rank may have none. answers,
    top_k, rule, memory: see rank_answers.
    """
    model.eval()
    found: dict[int, int] = {}
    for batch in batches:
        video, ids, mask = (batch[name].to(ranks.device) for name in ("video", "ids", "mask"))
        states = question_states(model, video, ids, mask)
        ranked = rank_answers(model.text_decoder, states, mask, answers, top_k=top_k, rule=rule, memory=memory)
        found |= dict(zip(batch["row"].tolist(), ranked.answers[:, 0].tolist(), strict=True))
    return {row: answer for part in gather(found) for row, answer in part.items()}


def exact_match(truth: Mapping[Hashable, str], predicted: Mapping[Hashable, str]) -> float:
    """The share of questions whose predicted answer is the right text, letter by letter; one that is missing is wrong."""
    if not truth:
        raise ValueError("no question to judge; give at least one")
    return sum(predicted.get(question) == answer for question, answer in truth.items()) / len(truth)
