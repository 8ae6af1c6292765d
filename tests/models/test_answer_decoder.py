"""The answer decoder, its ranking and its writing against transformers' causal BERT, which reads every answer by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from umt_fast.config import TextConfig
from umt_fast.models.answer_decoder import AnswerDecoder, prepare_answers, word_log_probabilities
from umt_fast.tasks.answer_ranking import first_word_probabilities, generate_answers, rank_answers

PAD, CLS, SEP, VOCABULARY = 0, 1, 2, 30
LAYERS, WIDTH, HEADS, LENGTH = 3, 32, 4, 6


@pytest.fixture(scope="module")
def models() -> tuple[AnswerDecoder, BertLMHeadModel]:
    """Ours, and theirs with the same weights, both without dropout."""
    torch.manual_seed(0)
    config = TextConfig(
        width=WIDTH,
        depth=2 + LAYERS,
        fusion_layer=2,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        max_positions=12,
        init_std=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    ours = AnswerDecoder(config).eval()
    theirs = BertLMHeadModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=12,
            is_decoder=True,
            add_cross_attention=True,
            attn_implementation="eager",
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and all("position_ids" in key for key in unexpected)
    return ours, theirs


@pytest.fixture
def questions() -> tuple[Tensor, Tensor]:
    """States and masks of four questions; the last is empty but for its class token."""
    states = torch.randn(4, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    return states, torch.arange(7) < torch.tensor([7, 4, 5, 1])[:, None]


def answers_of(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and masks, padded to LENGTH, of answers with the class token in front."""
    rows = [[CLS, *text][:LENGTH] for text in texts]
    ids = torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])
    return ids, torch.arange(LENGTH) < torch.tensor([len(row) for row in rows])[:, None]


# Equal first words, one a beginning of another, one cut at the limit without its end, one of a single word.
TEXTS = [
    [5, SEP],
    [5, 6, SEP],
    [5, 6, 7, 8, 9, 10, SEP],
    [11, SEP],
    [11, 12, 13, SEP],
    [14],
    [20, 21, SEP],
    [7, 7, 7, SEP],
]


@torch.no_grad()
def word_by_word(theirs: BertLMHeadModel, state: Tensor, mask: Tensor, words: list[int]) -> list[float]:
    """The log-probability of each word of one answer to one question, without padding anywhere: a model call for each."""
    found = []
    for position in range(1, len(words)):
        logits = theirs(
            torch.tensor([words[:position]]), encoder_hidden_states=state[None, mask], use_cache=False
        ).logits[0, -1]
        found.append(logits.double().log_softmax(0)[words[position]].item())
    return found


def by_brute_force(
    theirs: BertLMHeadModel, states: Tensor, mask: Tensor, top_k: int, rule: str
) -> list[dict[int, float]]:
    """For each question answer -> probability among the top_k, every answer read by itself."""
    result = []
    for state, seen in zip(states, mask, strict=True):
        words = [word_by_word(theirs, state, seen, [CLS, *text][:LENGTH]) for text in TEXTS]
        kept = sorted(range(len(TEXTS)), key=lambda row: -words[row][0])[:top_k]
        scores = torch.tensor([sum(words[row]) + (words[row][0] if rule == "official" else 0) for row in kept])
        result.append(dict(zip(kept, scores.softmax(0).tolist(), strict=True)))
    return result


@pytest.mark.parametrize("rule", ["official", "chain"])
@pytest.mark.parametrize("top_k", [1, 3, len(TEXTS), 128])
def test_ranking_equals_reading_every_answer_by_itself(models, questions, rule: str, top_k: int) -> None:
    ours, theirs = models
    states, mask = questions
    answers = prepare_answers(ours, *answers_of(TEXTS), batch_size=3)
    ranked = rank_answers(ours, states, mask, answers, top_k=top_k, rule=rule)
    expected = by_brute_force(theirs, states, mask, top_k, rule)
    assert ranked.answers.shape == (4, min(top_k, len(TEXTS)))
    first = first_word_probabilities(ours, states, mask, answers)
    compared = 0
    for row, truth in enumerate(expected):
        found = dict(zip(ranked.answers[row].tolist(), ranked.probabilities[row].tolist(), strict=True))
        # Of answers with equal first words any may be the last that is kept.
        last = min(first[row][list(truth)]).item()
        if (first[row] >= last * (1 - 1e-6)).sum() > len(truth):
            assert first[row][list(found)].sort().values == pytest.approx(
                first[row][list(truth)].sort().values, rel=1e-5
            )
            continue
        assert found == pytest.approx(truth, rel=1e-4, abs=1e-7)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        compared += 1
    assert compared


def test_logits_in_chunks_give_the_same_within_their_memory(models, questions, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models
    states, mask = questions
    answers = prepare_answers(ours, *answers_of(TEXTS))
    whole = rank_answers(ours, states, mask, answers)
    sizes, head = [], ours.cls.predictions
    real = type(head).forward
    monkeypatch.setattr(type(head), "forward", lambda self, x: sizes.append(len(x)) or real(self, x))
    memory = 3 * 3 * 4 * VOCABULARY
    parts = rank_answers(ours, states, mask, answers, memory=memory)
    assert torch.equal(parts.answers, whole.answers)
    torch.testing.assert_close(parts.probabilities, whole.probabilities)
    # Nowhere else than where a word is asked: each question's first, and every candidate's words after that.
    assert max(sizes) == 3 and sum(sizes) == 4 + 4 * sum(min(len(text), LENGTH - 1) - 1 for text in TEXTS)
    assert rank_answers(ours, states, mask, answers, memory=1).answers.shape == whole.answers.shape
    assert word_log_probabilities(head, states[:0, 0], torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_padding_behind_an_answer_needs_no_mask(models, questions) -> None:
    """Whatever stands there, and however much: the states before are the same, bit for bit where shapes are."""
    ours, theirs = models
    states, mask = questions
    keys = ours.question_keys(states)
    ids = torch.randint(3, VOCABULARY, (4, 2, LENGTH), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[..., 3:] = PAD
    with torch.no_grad():
        one, two = ours(ids, keys, mask), ours(other, keys, mask)
        assert torch.equal(one[..., :3, :], two[..., :3, :]) and not torch.equal(one[..., 3:, :], two[..., 3:, :])
        torch.testing.assert_close(ours(ids[..., :3], keys, mask), one[..., :3, :], rtol=1e-5, atol=1e-5)
        # Theirs masks the padding.
        expected = theirs.bert(
            other[:, 0],
            attention_mask=(torch.arange(LENGTH) < 3).long().expand(4, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state
    torch.testing.assert_close(two[:, 0, :3], expected[:, :3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_writing_equals_choosing_the_best_word_each_time(models, questions) -> None:
    ours, theirs = models
    states, mask = questions
    found = generate_answers(ours, states, mask, start=CLS, end=SEP, pad=PAD, max_length=LENGTH)
    ends = set()
    for row, (state, seen) in enumerate(zip(states, mask, strict=True)):
        words = [CLS]
        while len(words) < LENGTH and words[-1] != SEP:
            logits = theirs(torch.tensor([words]), encoder_hidden_states=state[None, seen], use_cache=False).logits[
                0, -1
            ]
            words.append(int(logits.argmax()))
        assert found[row].tolist() == (words[1:] + [PAD] * LENGTH)[: LENGTH - 1]
        ends.add(len(words))
    # Whichever word is called the end, nothing is written after it.
    end = int(found[0, 1])
    again = generate_answers(ours, states, mask, start=CLS, end=end, pad=PAD, max_length=LENGTH)
    assert again[0].tolist() == [*found[0, :2].tolist(), PAD, PAD, PAD] or again[0, 0] == end
    for limit in (1, 99):
        with pytest.raises(ValueError, match=f"max_length is {limit}"):
            generate_answers(ours, states, mask, start=CLS, end=SEP, pad=PAD, max_length=limit)


def test_a_question_is_read_once_however_many_answers_are_judged(models, questions) -> None:
    """Keys and values of the questions: a product of all their positions for each layer, none of copies of them."""
    ours, _ = models
    states, mask = questions
    answers = prepare_answers(ours, *answers_of(TEXTS))
    rows = []
    keys = [layer.crossattention.self.key for layer in ours.layers]
    hooks = [key.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[:-1])) for key in keys]
    rank_answers(ours, states, mask, answers)
    for hook in hooks:
        hook.remove()
    assert rows == [states.shape[:2]] * LAYERS


def test_lists_that_cannot_be_judged_are_named(models, questions) -> None:
    ours, _ = models
    ids, mask = answers_of(TEXTS)
    with pytest.raises(ValueError, match="at least one answer"):
        prepare_answers(ours, ids[:0], mask[:0])
    with pytest.raises(ValueError, match="at least one answer"):
        prepare_answers(ours, ids[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match="answer 2 has 1 positions"):
        prepare_answers(ours, ids, mask & ((torch.arange(LENGTH) < 1) | (torch.arange(len(ids)) != 2)[:, None]))
    with pytest.raises(ValueError, match="padding before its end"):
        prepare_answers(ours, ids, mask & (torch.arange(LENGTH) != 0))
    answers = prepare_answers(ours, ids, mask)
    with pytest.raises(ValueError, match="top_k is 0"):
        rank_answers(ours, *questions, answers, top_k=0)
    with pytest.raises(ValueError, match="rule 'sum'"):
        rank_answers(ours, *questions, answers, rule="sum")


def test_answers_of_one_word_are_ranked_by_it(models, questions) -> None:
    """A limit of two positions: nothing is judged beyond the first word."""
    ours, _ = models
    ids, mask = answers_of([[5], [9], [11]])
    answers = prepare_answers(ours, ids[:, :2], mask[:, :2])
    ranked = rank_answers(ours, *questions, answers, rule="chain")
    first = first_word_probabilities(ours, *questions, answers)
    expected = (first / first.sum(1, keepdim=True)).sort(1, descending=True)
    torch.testing.assert_close(ranked.probabilities, expected.values)
    assert torch.equal(ranked.answers, expected.indices)


def test_no_questions_and_one_answer(models, questions) -> None:
    ours, _ = models
    states, mask = questions
    answers = prepare_answers(ours, *answers_of([[5, 6, SEP]]))
    assert rank_answers(ours, states[:0], mask[:0], answers).answers.shape == (0, 1)
    ranked = rank_answers(ours, states, mask, answers)
    assert not ranked.answers.any() and torch.equal(ranked.probabilities, torch.ones(4, 1))
