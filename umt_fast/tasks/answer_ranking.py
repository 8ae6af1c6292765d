"""Which answer of a list a question gets, and answers written freely, with an AnswerDecoder.

Legend: B questions, m positions of a question, A answers of the list, K candidates kept of them, l positions of an answer.

The official ranking: the probabilities of the first words keep K candidates, those are judged whole. What is computed once
that the official step computes for each of the K: a question's keys and values, and the class token, which is what the
first words are predicted from. What is left out because nothing reads it: the last word's position, and vocabulary logits
where no word follows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from umt_fast.models.answer_decoder import AnswerDecoder, AnswerList, KeysValues, word_log_probabilities

Rule = Literal["official", "chain"]
# Bytes that vocabulary logits may take at a time.
LOGITS_MEMORY = 256 << 20


class Ranked(NamedTuple):
    """Candidates, best first: their numbers in the list int64 (B, K), and fp32 (B, K) probabilities among the K."""

    answers: Tensor
    probabilities: Tensor


def _begin(
    decoder: AnswerDecoder, states: Tensor, mask: Tensor, start: Tensor
) -> tuple[Tensor, list[KeysValues], list[KeysValues]]:
    """The decoder's states (B, W) at the class token `start` (an int64 scalar), the questions' keys, and the past."""
    questions = decoder.question_keys(states)
    x = decoder.bert.embeddings(start.view(1, 1, 1)).expand(len(states), 1, 1, -1)
    hidden, past = decoder.run(x, questions, mask)
    return hidden[:, 0, 0], questions, past


def _first_words(decoder: AnswerDecoder, hidden: Tensor, words: Tensor, memory: int) -> Tensor:
    """fp32 (B, A) log-probabilities of each answer's first word, from the states at the class token (B, W)."""
    # Logits, a copy in fp32 and their log-softmax, as many questions at a time as `memory` holds.
    rows = max(1, memory // (3 * 4 * decoder.config.vocab_size))
    parts = (decoder.cls.predictions(part).float().log_softmax(1)[:, words] for part in hidden.split(rows))
    return torch.cat(list(parts))


@torch.no_grad()
def first_word_probabilities(
    decoder: AnswerDecoder, states: Tensor, mask: Tensor, answers: AnswerList, *, memory: int = LOGITS_MEMORY
) -> Tensor:
    """fp32 (B, A): how probable each answer's first word is; arguments as in rank_answers."""
    hidden, _, _ = _begin(decoder, states, mask, answers.ids[0, 0])
    return _first_words(decoder, hidden, answers.ids[:, 1], memory).exp()


@torch.no_grad()
def rank_answers(
    decoder: AnswerDecoder,
    states: Tensor,
    mask: Tensor,
    answers: AnswerList,
    *,
    top_k: int = 128,
    rule: Rule = "official",
    memory: int = LOGITS_MEMORY,
) -> Ranked:
    """The most probable answers of a list to each question.

    Args:
        states, mask: (B, m, W) question states and bool (B, m), False at padding.
        answers: prepare_answers' list of the decoder as it is now.
        top_k: candidates kept by their first word and judged whole; more than there are: all.
        rule: `official` adds the first word's log-probability to that of the whole answer, where it is a factor already;
            `chain` does not: the logarithm of the answer's probability.
        memory: bytes that vocabulary logits may take at a time.

    Answers of equal scores keep the order of their first words' probabilities. Everything else that is held grows with
    B * K * l * W: choose B by that.

    Raises:
        ValueError: top_k below 1, an unknown rule.
    """
    if top_k < 1 or rule not in ("official", "chain"):
        raise ValueError(f"top_k is {top_k} and rule {rule!r}; top_k must be at least 1, rule 'official' or 'chain'")
    hidden, questions, past = _begin(decoder, states, mask, answers.ids[0, 0])
    first, chosen = _first_words(decoder, hidden, answers.ids[:, 1], memory).topk(min(top_k, len(answers)), dim=1)
    scores = first * 2 if rule == "official" else first
    if answers.attended.shape[1]:
        states, _ = decoder.run(answers.attended[chosen], questions, mask, past, attended=True)
        places = torch.arange(2, answers.ids.shape[1], device=chosen.device)
        asked = places < answers.lengths[chosen][..., None]
        found = word_log_probabilities(
            decoder.cls.predictions, states[asked], answers.ids[chosen][..., 2:][asked], memory
        )
        scores = scores + torch.zeros(asked.shape, device=found.device).masked_scatter(asked, found).sum(2)
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return Ranked(chosen.gather(1, ordered.indices), ordered.values.softmax(1))


@torch.no_grad()
def generate_answers(
    decoder: AnswerDecoder, states: Tensor, mask: Tensor, *, start: int, end: int, pad: int, max_length: int = 5
) -> Tensor:
    """The most probable word after word (greedy): int64 (B, max_length - 1), `pad` behind the word that ends an answer.

    Args:
        states, mask: as in rank_answers.
        start, end, pad: ids of the class token that an answer begins with, of the word that ends it, and of padding.
        max_length: positions of an answer, the class token's included, as in training.

    Raises:
        ValueError: max_length below 2 or beyond the decoder's positions.
    """
    if not 2 <= max_length <= decoder.config.max_positions:
        raise ValueError(
            f"max_length is {max_length}; it must lie in [2, text.max_positions = {decoder.config.max_positions}]"
        )
    hidden, questions, past = _begin(decoder, states, mask, torch.tensor(start, device=states.device))
    ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    words = []
    for position in range(1, max_length):
        word = decoder.cls.predictions(hidden).argmax(1).masked_fill(ended, pad)
        words.append(word)
        ended = ended | (word == end)
        if position + 1 == max_length:
            break
        x, own = decoder.run(decoder.bert.embeddings(word[:, None, None], position), questions, mask, past)
        hidden = x[:, 0, 0]
        past = [
            tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True)) for old, new in zip(past, own, strict=True)
        ]
    return torch.stack(words, 1)
