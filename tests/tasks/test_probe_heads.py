"""Heads of probes against single modules of torch, neighbors against a loop, and how one head is chosen."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.models.probes import AttentiveProbes, LinearProbes
from umt_fast.probing.features import Features
from umt_fast.probing.kinds import KINDS, Sweep
from umt_fast.probing.sweep import choose, held_out, judge, train


def sweep(**changes: object) -> Sweep:
    values = {
        "rates": (1e-2,),
        "weight_decays": (0.0,),
        "epochs": 20,
        "head_batch_size": 16,
        "neighbors": 5,
        "temperature": 0.07,
        "classes": 3,
        "attention_heads": 2,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return Sweep(**(values | changes))


def alone(module: nn.Module, x: Tensor, label: Tensor, rate: float, decay: float, epochs: int, batch: int) -> None:
    """Training of one module by torch's own AdamW and cosine, in the order that seed 3 draws."""
    flat = [value for value in module.parameters() if value.ndim < 2]
    deep = [value for value in module.parameters() if value.ndim >= 2]
    groups = [{"params": deep, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(x) / batch))
    generator = torch.Generator().manual_seed(3)
    for _ in range(epochs):
        for clips in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(module(x[clips]), label[clips]).backward()
            optimizer.step()
            schedule.step()


def test_a_sweep_is_every_head_trained_alone() -> None:
    torch.manual_seed(0)
    x, label = torch.randn(50, 6), torch.randint(4, (50,))
    pairs = [(1e-3, 0.0), (1e-3, 0.5), (1e-1, 0.0), (1e-1, 0.5)]
    rates, decays = torch.tensor(pairs).t()
    heads = LinearProbes(4, 6, 4)
    train(
        heads,
        lambda clips: x[clips],
        label,
        rates=rates,
        weight_decays=decays,
        epochs=3,
        batch_size=16,
        generator=torch.Generator().manual_seed(3),
    )
    for head, (rate, decay) in enumerate(pairs):
        single = nn.Linear(6, 4)
        with torch.no_grad():
            for value in single.parameters():
                value.zero_()
        alone(single, x, label, rate, decay, 3, 16)
        torch.testing.assert_close(heads.weight[head], single.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(heads.bias[head], single.bias, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(heads.weight[2], heads.weight[3], atol=1e-3)  # decay does something


class OneAttentive(nn.Module):
    """The same block from torch's own modules."""

    def __init__(self, probes: AttentiveProbes, head: int) -> None:
        super().__init__()
        width = probes.query.shape[1]
        self.query = nn.Parameter(probes.query[head].detach().clone())
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, probes.attention_heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, probes.bias.shape[1])
        with torch.no_grad():
            for own, names in self.pairs():
                own.copy_(torch.cat([getattr(probes, name)[head] for name in names]))
            self.attention.in_proj_bias.copy_(
                torch.cat([probes.query_bias[head], torch.randn(width), probes.value_bias[head]])
            )

    def pairs(self) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
        return [
            (self.query, ("query",)),
            (self.norm1.weight, ("norm_weight",)),
            (self.norm1.bias, ("norm_bias",)),
            (self.attention.in_proj_weight, ("query_weight", "key_weight", "value_weight")),
            (self.attention.out_proj.weight, ("out_weight",)),
            (self.attention.out_proj.bias, ("out_bias",)),
            (self.norm2.weight, ("mlp_norm_weight",)),
            (self.norm2.bias, ("mlp_norm_bias",)),
            (self.fc1.weight, ("hidden_weight",)),
            (self.fc1.bias, ("hidden_bias",)),
            (self.fc2.weight, ("mlp_weight",)),
            (self.fc2.bias, ("mlp_bias",)),
            (self.head.weight, ("weight",)),
            (self.head.bias, ("bias",)),
        ]

    def forward(self, tokens: Tensor) -> Tensor:
        query, keys = self.query.expand(len(tokens), 1, -1), self.norm1(tokens)
        found = query + self.attention(query, keys, keys)[0]
        found = found + self.fc2(F.gelu(self.fc1(self.norm2(found))))
        return self.head(found[:, 0])


def test_attentive_heads_are_multihead_attention() -> None:
    """Outputs and all gradients, in double, of heads that differ."""
    torch.manual_seed(0)
    probes = AttentiveProbes(2, 8, 3, 4, torch.Generator().manual_seed(1)).double()
    assert torch.equal(probes.query_weight[0], probes.query_weight[1])  # all heads begin alike
    with torch.no_grad():
        for value in probes.parameters():
            value.add_(0.5 * torch.randn_like(value))
    tokens, label = 3 * torch.randn(5, 7, 8, dtype=torch.double) + 1, torch.tensor([0, 2, 1, 1, 0])
    logits = probes(tokens)
    F.cross_entropy(logits.permute(1, 2, 0), label[:, None].expand(-1, 2), reduction="none").mean(0).sum().backward()
    for head in range(2):
        single = OneAttentive(probes, head).double()
        # Its own copies were rounded to fp32 while it was made.
        with torch.no_grad():
            for own, names in single.pairs():
                own.copy_(torch.cat([getattr(probes, name)[head] for name in names]))
            single.attention.in_proj_bias[:8] = probes.query_bias[head]
            single.attention.in_proj_bias[16:] = probes.value_bias[head]
        expected = single(tokens)
        torch.testing.assert_close(logits[head], expected)
        F.cross_entropy(expected, label).backward()
        for own, names in single.pairs():
            mine = torch.cat([getattr(probes, name).grad[head] for name in names])
            torch.testing.assert_close(mine, own.grad, msg=lambda said, names=names: f"{names}: {said}")
        bias = single.attention.in_proj_bias.grad
        torch.testing.assert_close(probes.query_bias.grad[head], bias[:8])
        torch.testing.assert_close(probes.value_bias.grad[head], bias[16:])
        assert bias[8:16].abs().max() < 1e-12  # the bias of keys, which heads do not have
        assert all(value.grad[head].abs().max() > 1e-6 for value in probes.parameters())


def separable(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pooled features of three classes apart along directions that large noise elsewhere hides from distances."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 3
    x = torch.randn(count, 8, generator=generator)
    x[:, :3] = 0.1 * x[:, :3] + F.one_hot(label, 3)
    x[:, 3:] *= 30
    return x, label


def features(rows: Tensor, label: Tensor) -> Features:
    return Features(rows, torch.arange(len(rows)), label)


def test_linear_probes_find_classes_that_neighbors_do_not() -> None:
    known, own = separable(150, 0)
    unseen, label = separable(60, 1)
    told = sweep(rates=(1e-3, 1e-2, 1e-1), weight_decays=(0.0, 0.1), epochs=30)
    found = KINDS["linear"].judge(features(known, own), unseen, told)
    assert torch.equal(found.best[found.chosen][:, 0], label)
    assert len(found.table) == found.figures["heads"] == 6 and found.figures["held_out_clips"] == 15
    assert found.figures["held_out_top1"] == 1.0
    assert {name: found.figures[name] for name in ("rate", "weight_decay")} == {
        name: found.table[found.chosen][name] for name in ("rate", "weight_decay")
    }
    # Labels of held-out clips choose, and train nothing.
    fit, held = held_out(150, torch.Generator().manual_seed(0))
    wrong = own.clone()
    wrong[held] = (own[held] + 1) % 3
    misled = KINDS["linear"].judge(features(known, wrong), unseen, told)
    assert torch.equal(misled.shares, found.shares) and misled.figures["held_out_top1"] < 0.5
    wrong[fit[:75]] = (own[fit[:75]] + 1) % 3
    assert not torch.equal(KINDS["linear"].judge(features(known, wrong), unseen, told).shares, found.shares)
    again = KINDS["linear"].judge(features(known, own), unseen, told)
    assert torch.equal(again.shares, found.shares) and again.table == found.table
    other = KINDS["linear"].judge(features(known, own), unseen, sweep(rates=(1e-3, 1e-2, 1e-1), seed=1))
    assert not torch.equal(other.shares[0], found.shares[0])
    # Features of other scales and places are the same to a head: they are standardized.
    scale, place = 10 ** torch.linspace(-3, 3, 8), torch.linspace(-2, 2, 8)
    moved = KINDS["linear"].judge(features(known * scale + place, own), unseen * scale + place, told)
    torch.testing.assert_close(moved.shares, found.shares, rtol=1e-2, atol=1e-3)
    votes = KINDS["knn"].judge(features(known, own), unseen, sweep())
    assert (votes.best[0][:, 0] == label).float().mean() < 0.7


def test_attentive_probes_find_a_token_that_the_mean_hides() -> None:
    """One token of nine tells the class, the others are noise of its length: seen by the attentive probe, not by the mean."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(2, (count,), generator=generator)
        tokens = 2 * torch.randn(count, 9, 8, generator=generator)
        tokens[..., 0] = 0
        place = torch.randint(9, (count,), generator=generator)
        tokens[torch.arange(count), place] = 0.0
        tokens[torch.arange(count), place, 0] = 6.0
        tokens[torch.arange(count), place, 1] = 3.0 * (2 * label - 1)
        return tokens, label

    (known, own), (unseen, label) = drawn(240), drawn(100)
    told = sweep(classes=2, rates=(1e-3, 1e-2), weight_decays=(0.01,), epochs=15, head_batch_size=32)
    found = KINDS["attentive"].judge(features(known.bfloat16(), own), unseen.bfloat16(), told)
    attentive = (found.best[found.chosen][:, 0] == label).double().mean()
    diverged = KINDS["attentive"].judge(
        features(known, own), unseen, sweep(classes=2, rates=(1e30, 1e-3), epochs=1, seed=2)
    )
    assert diverged.chosen == 1 and diverged.table[0]["held_out_loss"] is None
    json.dumps(diverged.table, allow_nan=False)
    pooled = KINDS["linear"].judge(features(known.mean(1), own), unseen.mean(1), told)
    linear = (pooled.best[pooled.chosen][:, 0] == label).double().mean()
    assert attentive > 0.97 > 0.85 > linear


def test_neighbors_vote_as_a_loop_counts() -> None:
    torch.manual_seed(0)
    known, own = torch.randn(40, 5), torch.randint(6, (40,))
    unseen = torch.randn(9, 5)
    rows = torch.full((43, 5), float("nan"))  # rows of clips that could not be read are never looked at
    index = torch.cat([torch.arange(10), torch.arange(13, 43)])
    rows[index] = known
    found = KINDS["knn"].judge(Features(rows, index, own), unseen, sweep(classes=6, neighbors=7, temperature=0.2))
    for row, clip in enumerate(unseen.tolist()):
        near = []
        for number, other in enumerate(known.tolist()):
            dot = sum(a * b for a, b in zip(clip, other, strict=True))
            near.append((dot / math.hypot(*clip) / math.hypot(*other), own[number].item()))
        votes = [0.0] * 6
        for cosine, name in sorted(near, reverse=True)[:7]:
            votes[name] += math.exp(cosine / 0.2)
        order = sorted(range(6), key=lambda name: -votes[name])
        positive = [name for name in order if votes[name] > 0]
        assert found.best[0][row].tolist()[: len(positive)] == positive[:5]
        shares = [votes[name] / sum(votes) for name in order[:5]]
        assert found.shares[0][row].tolist() == pytest.approx(shares, abs=1e-5)
    few = KINDS["knn"].judge(features(known, own), unseen, sweep(classes=6, neighbors=500, temperature=1e-3))
    assert few.figures == {"neighbors": 40} and few.shares.isfinite().all()


def test_the_held_out_clips_choose() -> None:
    for count in (2, 3, 10, 101):
        fit, held = held_out(count, torch.Generator().manual_seed(0))
        assert sorted([*fit.tolist(), *held.tolist()]) == list(range(count))
        assert len(held) == max(1, round(count / 10)) and len(fit) >= 1
    assert choose([0.5, 0.9, 0.9, 0.9], [0.1, 0.4, 0.3, 0.3]) == 2
    assert choose([1.0, 0.2], [math.nan, 1.0]) == 1 and choose([1.0], [math.inf]) is None
    heads = LinearProbes(2, 2, 3)
    with torch.no_grad():
        heads.weight[1] = torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    x, label = torch.tensor([[2.0, 0], [0, 2], [3, 0]]), torch.tensor([0, 1, 2])
    said = judge(heads, lambda clips: x[clips], 3, batch_size=2, label=label)
    assert said.best[1, :, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(said.entropy[0], torch.full((3,), math.log(3)))
    torch.testing.assert_close(said.entropy[1], F.cross_entropy(x @ heads.weight[1].t(), label, reduction="none"))
