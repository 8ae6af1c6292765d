"""The sampler as a distribution: successive draws without replacement (Plackett-Luce).

On a GPU both backends are tested. Interpreted, a row takes tens of milliseconds: there the kernel is compared with the
reference draw by draw (here and in test_kernels.py), and the reference tested as a distribution.

Statistics are exact chi-square sums; p-values come from the chi-square distribution. Seeds are fixed, so a test that passes
always passes; each limit is a p-value of 1e-4, and each statistic is shown to reject a sampler with a planted bias.
"""

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
SETS = list(combinations(range(len(WEIGHTS)), 3))
LIMIT = 1e-4
BACKENDS = ["reference", "triton"] if DEVICE == "cuda" else ["reference"]


def p_value(statistic: float, degrees: int) -> float:
    """P(chi-square with so many degrees of freedom exceeds the statistic)."""
    return torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2)).item()


def exact_set_probabilities() -> Tensor:
    """P(three draws without replacement leave this set), by enumeration of all draw orders."""
    found = dict.fromkeys(SETS, 0.0)
    for order in permutations(range(len(WEIGHTS)), 3):
        probability, rest = 1.0, sum(WEIGHTS)
        for token in order:
            probability *= WEIGHTS[token] / rest
            rest -= WEIGHTS[token]
        found[tuple(sorted(order))] += probability
    return torch.tensor([found[chosen] for chosen in SETS], dtype=torch.float64)


def p_of_sets(draws: Tensor) -> float:
    """Against the exact probability of each of the 20 possible sets: inclusion and pair probabilities follow from these."""
    number = {chosen: place for place, chosen in enumerate(SETS)}
    counts = torch.bincount(torch.tensor([number[tuple(row)] for row in draws.tolist()]), minlength=len(SETS))
    expected = len(draws) * exact_set_probabilities()
    return p_value(((counts - expected).square() / expected).sum().item(), len(SETS) - 1)


def draws_of(weights: Tensor, n: int, count: int, seed: int, backend: str) -> Tensor:
    scores = weights.to(DEVICE).repeat(count, 1)
    return kernels.sample_visible(scores, n, torch.tensor([seed], device=DEVICE), backend=backend).cpu()


@pytest.mark.parametrize("seed", [5, 6, 2**40 + 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_set_has_its_exact_probability(backend: str, seed: int) -> None:
    assert p_of_sets(draws_of(torch.tensor(WEIGHTS), 3, 40000, seed, backend)) > LIMIT


def test_a_biased_sampler_is_caught() -> None:
    """Keys weight * uniform instead of log weight + Gumbel: a common mistake that favors large weights differently."""
    torch.manual_seed(0)
    weights = torch.tensor(WEIGHTS)
    assert p_of_sets((weights * torch.rand(2000, 6)).topk(3).indices.sort(1).values) < 1e-12
    # A bias of one part in eight on a single weight.
    wrong = weights * torch.tensor([1.0, 1.0, 1.125, 1.0, 1.0, 1.0])
    assert p_of_sets(draws_of(wrong, 3, 40000, 5, "reference")) < LIMIT


def two_sample_p(ours: Tensor, theirs: Tensor, tokens: int) -> tuple[float, float]:
    """p-values that two samplers share inclusion counts, and counts of neighboring pairs in a fixed order of tokens.

    Counts of different tokens of a draw are negatively correlated, which only makes the test milder.
    """

    def p(a: Tensor, b: Tensor) -> float:
        pooled = (a + b) / (len(ours) + len(theirs))
        variance = pooled * (1 - pooled) * (1 / len(ours) + 1 / len(theirs))
        seen = variance > 0
        z = (a / len(ours) - b / len(theirs))[seen].square() / variance[seen]
        return p_value(z.sum().item(), int(seen.sum()))

    held = [torch.zeros(len(d), tokens).scatter_(1, d.long(), 1.0) for d in (ours, theirs)]
    inclusion = p(*(h.sum(0).double() for h in held))
    pairs = p(*((h * h.roll(1, 1)).sum(0).double() for h in held))
    return inclusion, pairs


def attention_like(tokens: int) -> Tensor:
    """Peaked scores, as a class token's: a few tokens hold most of the mass."""
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(tokens, generator=generator)).softmax(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_196_tokens_it_is_torch_multinomial(backend: str) -> None:
    weights = attention_like(196)
    torch.manual_seed(3)
    theirs = torch.multinomial(weights.repeat(20000, 1), 40)
    inclusion, pairs = two_sample_p(draws_of(weights, 40, 8000, 11, backend), theirs, 196)
    assert min(inclusion, pairs) > LIMIT, (inclusion, pairs)


@pytest.mark.parametrize("seed", [11, pytest.param(2**33 + 5, marks=pytest.mark.slow)])
def test_at_196_tokens_the_kernel_draws_what_the_reference_draws(seed: int) -> None:
    drawn = [draws_of(attention_like(196), 40, 20, seed, backend) for backend in ("triton", "reference")]
    # A logarithm may differ in its last bit and swap a near tie.
    assert (drawn[0] == drawn[1]).float().mean() > 0.99


def test_at_196_tokens_a_bias_is_caught() -> None:
    """Scores sharpened by a twentieth of their logarithm: no token's probability moves far, the statistic still sees it."""
    weights = attention_like(196)
    torch.manual_seed(3)
    theirs = torch.multinomial(weights.repeat(20000, 1), 40)
    inclusion, _ = two_sample_p(draws_of(weights**1.05, 40, 8000, 11, "reference"), theirs, 196)
    assert inclusion < LIMIT


def test_rows_and_seeds_are_independent() -> None:
    """Equal scores in all rows: draws of neighboring rows and of neighboring seeds coincide as often as chance has it."""
    scores = torch.ones(4000, 20, device=DEVICE)
    first, second = (
        kernels.sample_visible(scores, 5, torch.tensor([seed], device=DEVICE)).cpu() for seed in (100, 101)
    )
    held = [torch.zeros(4000, 20).scatter_(1, draws.long(), 1.0) for draws in (first, second)]
    for a, b in ((held[0][:-1], held[0][1:]), held):
        common = (a * b).sum(1)
        # Hypergeometric: mean 5 * 5 / 20, variance 5 * (1/4) * (3/4) * (15/19).
        z = (common.mean() - 1.25) / (0.7401 / len(common)) ** 0.5
        assert abs(z) < 4
