"""The kinds of probes: linear, attentive, nearest neighbors. A kind never sees the labels of the test list."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from umt_fast.config import ConfigError
from umt_fast.data.errors import DataError
from umt_fast.models.probes import AttentiveProbes, LinearProbes
from umt_fast.probing.features import Feature, Features
from umt_fast.probing.sweep import choose, held_out, judge, train
from umt_fast.tasks.ranking import nearest


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What probes are told; a kind reads the fields that it names."""

    rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    epochs: int
    head_batch_size: int
    neighbors: int
    temperature: float
    classes: int
    attention_heads: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Found:
    """What H heads say of V test clips.

    best: int64 (H, V, k), the k best classes of each clip. shares: fp32 likewise, their probabilities. chosen: the head
    that was chosen. table: what is known of every head without the test list; a loss of None: it diverged. figures: others.
    """

    best: Tensor
    shares: Tensor
    chosen: int = 0
    table: list[dict[str, float | None]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


class Kind(Protocol):
    """One way to judge features."""

    feature: Feature
    reads: tuple[str, ...]
    """Names of options that this kind reads and another may not."""
    rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    """The usual sweep."""

    def judge(self, known: Features, unseen: Tensor, sweep: Sweep) -> Found:
        """Classes of unseen clips, (V, ...) features, told from clips with labels."""


class Trained(ABC):
    """A kind whose heads are trained: all rates times all decays at once, the best chosen by held-out training clips."""

    reads = ("rates", "weight_decays", "epochs", "head_batch_size", "seed")

    @abstractmethod
    def prepared(self, rows: Tensor, fit: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What makes inputs of heads, on the device, of features, on the CPU. rows[fit] are those that heads are trained on."""

    @abstractmethod
    def heads(self, count: int, width: int, sweep: Sweep, generator: torch.Generator) -> nn.Module:
        """Stacked heads, fp32 on the CPU."""

    def judge(self, known: Features, unseen: Tensor, sweep: Sweep) -> Found:
        if len(known.index) < 2:
            raise DataError(
                f"{len(known.index)} clip of the train list can be read; a probe needs two: one is held out"
            )
        # On the CPU, so that the same seed means the same split, weights and order on every machine.
        generator = torch.Generator().manual_seed(sweep.seed)
        fit, held = held_out(len(known.index), generator)
        pairs = list(itertools.product(sweep.rates, sweep.weight_decays))
        rates, decays = (torch.tensor(column, device=sweep.device) for column in zip(*pairs, strict=True))
        heads = self.heads(len(pairs), known.rows.shape[-1], sweep, generator).to(sweep.device)
        prepared = self.prepared(known.rows, known.index[fit], sweep.device)

        train(
            heads,
            lambda clips: prepared(known.rows[known.index[fit[clips]]]),
            known.label[fit].to(sweep.device),
            rates=rates,
            weight_decays=decays,
            epochs=sweep.epochs,
            batch_size=sweep.head_batch_size,
            generator=generator,
        )
        own, size = known.label[held], sweep.head_batch_size
        on_held = judge(
            heads,
            lambda clips: prepared(known.rows[known.index[held[clips]]]),
            len(held),
            batch_size=size,
            label=own,
        )
        top1 = (on_held.best[..., 0] == own).double().mean(1).tolist()
        loss = on_held.entropy.double().mean(1).tolist()
        chosen = choose(top1, loss)
        if chosen is None:
            raise ConfigError(
                f"every head diverged at the rates {', '.join(map(str, sweep.rates))}; give lower --rates"
            )
        table = [
            {
                "rate": rate,
                "weight_decay": decay,
                "held_out_top1": right,
                "held_out_loss": value if math.isfinite(value) else None,
            }
            for (rate, decay), right, value in zip(pairs, top1, loss, strict=True)
        ]
        on_test = judge(heads, lambda clips: prepared(unseen[clips]), len(unseen), batch_size=size)
        figures = table[chosen] | {"heads": len(pairs), "held_out_clips": len(held)}
        return Found(on_test.best, on_test.shares, chosen, table, figures)


class Linear(Trained):
    """Linear layers on pooled features, which are standardized by the clips that heads are trained on."""

    feature = "pooled"
    rates, weight_decays = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.0, 0.01, 0.1)

    def prepared(self, rows: Tensor, fit: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
        own = rows[fit].double()
        mean, deviation = own.mean(0), own.std(0, correction=0).clamp(min=1e-5)
        mean, scale = mean.float().to(device), (1 / deviation).float().to(device)
        return lambda pooled: (pooled.to(device) - mean) * scale

    def heads(self, count: int, width: int, sweep: Sweep, generator: torch.Generator) -> nn.Module:
        return LinearProbes(count, width, sweep.classes)


class Attentive(Trained):
    """Cross-attention over all tokens, then a linear layer, as V-JEPA judges."""

    feature = "tokens"
    rates, weight_decays = (1e-4, 3e-4, 1e-3), (0.01, 0.1)

    def prepared(self, rows: Tensor, fit: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda tokens: tokens.to(device)

    def heads(self, count: int, width: int, sweep: Sweep, generator: torch.Generator) -> nn.Module:
        return AttentiveProbes(count, width, sweep.classes, sweep.attention_heads, generator)


class Neighbors:
    """The k nearest training clips by the cosine vote, each with weight exp(cosine / temperature), as DINO judges."""

    feature = "pooled"
    reads = ("neighbors", "temperature")
    rates, weight_decays = (), ()

    def judge(self, known: Features, unseen: Tensor, sweep: Sweep) -> Found:
        items, scores = nearest(unseen, known.rows[known.index], sweep.neighbors, device=sweep.device, cosine=True)
        # Shares of the votes: the largest weight is 1, which no temperature makes overflow.
        weights = ((scores - scores[:, :1]) / sweep.temperature).exp()
        votes = torch.zeros(len(unseen), sweep.classes).scatter_add_(1, known.label[items], weights)
        shares, best = (votes / votes.sum(1, keepdim=True)).topk(min(5, sweep.classes))
        return Found(best[None], shares[None], figures={"neighbors": min(sweep.neighbors, len(known.index))})


KINDS: dict[str, Kind] = {"linear": Linear(), "attentive": Attentive(), "knn": Neighbors()}
