"""Questions per second of ranking a list of answers, two ways: `pytest benchmarks/bench_answers.py`.

A decoder of BERT-base's width, untrained, 1,500 answers of one to three words, 128 kept. `ours`: tasks/answer_ranking.py.
`tiled`: the direct way, which copies a question's states for each candidate and reads every candidate whole, with vocabulary
logits at every position. `anew`: ours, but the list is prepared again for each question. All give the same ranking, which is
asserted. extra_info has questions per second in the best round. test_gain times the three in turns, so that other work on
the machine meets each of them, and has the ratios of their best rounds; also of processor time, which counts no waiting.
UMT_BENCH_QUESTIONS and UMT_BENCH_ROUNDS say how many at a time (2) and how often (3).
"""

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import TextConfig
from umt_fast.models.answer_decoder import AnswerDecoder, prepare_answers
from umt_fast.tasks.answer_ranking import Ranked, rank_answers

QUESTIONS = int(os.environ.get("UMT_BENCH_QUESTIONS", "2"))
ROUNDS = int(os.environ.get("UMT_BENCH_ROUNDS", "3"))
ANSWERS, LENGTH, QUESTION_LENGTH, TOP_K = 1500, 5, 25, 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLS, SEP, PAD = 101, 102, 0


@torch.no_grad()
def tiled(decoder: AnswerDecoder, states: Tensor, mask: Tensor, ids: Tensor, lengths: Tensor) -> Ranked:
    start = decoder(ids[:1, None, :1].expand(len(states), 1, 1), decoder.question_keys(states), mask)
    first = decoder.cls.predictions(start[:, 0, 0]).softmax(1)[:, ids[:, 1]]
    kept, chosen = first.topk(TOP_K, dim=1)
    rows = chosen.flatten()
    copies, masks = states.repeat_interleave(TOP_K, 0), mask.repeat_interleave(TOP_K, 0)
    hidden = decoder(ids[rows][:, None], decoder.question_keys(copies), masks)[:, 0]
    logits = decoder.cls.predictions(hidden)[:, :-1]
    targets = ids[rows][:, 1:].masked_fill(torch.arange(1, LENGTH, device=ids.device) >= lengths[rows][:, None], -100)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    scores = kept.log() - losses.view(len(rows), -1).sum(1).view_as(kept)
    best = scores.softmax(1).sort(1, descending=True)
    return Ranked(chosen.gather(1, best.indices), best.values)


@pytest.fixture(scope="module")
def ways() -> dict[str, Callable[[], Ranked]]:
    """What ranks the questions, by its name."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    decoder = AnswerDecoder(TextConfig(init_std=0.05)).eval().to(DEVICE)
    lengths = torch.randint(3, 6, (ANSWERS,), generator=generator)
    ids = torch.randint(1000, 30000, (ANSWERS, LENGTH), generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(ANSWERS), lengths - 1] = SEP
    filled = torch.arange(LENGTH) < lengths[:, None]
    ids, filled, lengths = (x.to(DEVICE) for x in (ids.masked_fill(~filled, PAD), filled, lengths))
    states = torch.randn(QUESTIONS, QUESTION_LENGTH, decoder.config.width, generator=generator).to(DEVICE)
    mask = torch.ones(QUESTIONS, QUESTION_LENGTH, dtype=torch.bool, device=DEVICE)
    answers = prepare_answers(decoder, ids, filled)

    @torch.no_grad()
    def anew() -> Ranked:
        parts = [
            rank_answers(decoder, *part, prepare_answers(decoder, ids, filled), top_k=TOP_K)
            for part in zip(states.split(1), mask.split(1), strict=True)
        ]
        return Ranked(*(torch.cat(column) for column in zip(*parts, strict=True)))

    return {
        "ours": lambda: rank_answers(decoder, states, mask, answers, top_k=TOP_K),
        "anew": anew,
        "tiled": lambda: tiled(decoder, states, mask, ids, lengths),
    }


def finished(way: Callable[[], Ranked]) -> Ranked:
    found = way()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return found


def require_equal(ways: dict[str, Callable[[], Ranked]]) -> None:
    expected = ways["tiled"]()
    for name in ("ours", "anew"):
        found = ways[name]()
        assert torch.equal(found.answers[:, 0], expected.answers[:, 0])
        torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", ["ours", "anew", "tiled"])
def test_questions_per_second(benchmark, ways: dict[str, Callable[[], Ranked]], way: str) -> None:
    require_equal(ways)
    benchmark.pedantic(finished, args=(ways[way],), rounds=ROUNDS)
    benchmark.extra_info["questions_per_s"] = round(QUESTIONS / benchmark.stats.stats.min, 3)


def test_gain(benchmark, ways: dict[str, Callable[[], Ranked]]) -> None:
    require_equal(ways)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    best = {(name, clock): float("inf") for name in ways for clock in clocks}

    def turn() -> None:
        for name, way in ways.items():
            before = {clock: read() for clock, read in clocks.items()}
            finished(way)
            for clock, read in clocks.items():
                best[name, clock] = min(best[name, clock], read() - before[clock])

    benchmark.pedantic(turn, rounds=ROUNDS)
    for (name, clock), seconds in best.items():
        if name != "ours":
            benchmark.extra_info[f"{name}_over_ours_{clock}"] = round(seconds / best["ours", clock], 2)
