"""Training of stacked heads, each at its own rate and weight decay, and the choice of one by held-out training clips."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 0.1
"""Share of the training clips that no head is trained on and that choose among heads."""


class StackedAdamW:
    """AdamW (arXiv 1711.05101) on parameters (H, ...), with a rate and a decay for each head; betas 0.9 and 0.999.

    Biases, norms and queries, (H, C), are not decayed.
    """

    def __init__(self, module: nn.Module, rates: Tensor, weight_decays: Tensor) -> None:
        """rates, weight_decays: fp32 (H,) on the module's device."""
        self.parameters = list(module.parameters())
        self.rates, self.weight_decays, self.steps = rates, weight_decays, 0
        self.first = [torch.zeros_like(value) for value in self.parameters]
        self.second = [torch.zeros_like(value) for value in self.parameters]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the rates; gradients are forgotten."""
        self.steps += 1
        bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for value, first, second in zip(self.parameters, self.first, self.second, strict=True):
            gradient, value.grad = value.grad, None
            rate = (self.rates * factor).view(-1, *[1] * (value.ndim - 1))
            if value.ndim > 2:
                value.mul_(1 - rate * self.weight_decays.view(rate.shape))
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            value.sub_(rate / bias1 * first / (second.sqrt() / math.sqrt(bias2) + 1e-8))


Rows = Callable[[Tensor], Tensor]
"""Numbers of clips, int64 on the CPU -> their features on the device."""


def train(
    module: nn.Module,
    rows: Rows,
    label: Tensor,
    *,
    rates: Tensor,
    weight_decays: Tensor,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Trains stacked heads on clips 0 to V - 1, all on the same batches, by cross-entropy; the rates fall by half a cosine.

    Args:
        module: features of a batch -> logits (H, B, K).
        label: int64 (V,) on the device.
        generator: of the CPU, for the order. Each epoch ends with a smaller batch where batch_size does not divide V.
    """
    optimizer = StackedAdamW(module, rates, weight_decays)
    steps = epochs * -(-len(label) // batch_size)
    for _ in range(epochs):
        for clips in torch.randperm(len(label), generator=generator).split(batch_size):
            logits, own = module(rows(clips)), label[clips.to(label.device)]
            # The sum over heads: none sees another's gradient.
            losses = F.cross_entropy(logits.permute(1, 2, 0), own[:, None].expand(-1, len(logits)), reduction="none")
            losses.mean(0).sum().backward()
            optimizer.step(0.5 * (1 + math.cos(math.pi * optimizer.steps / steps)))


class Judged(NamedTuple):
    """best: int64 (H, V, k), each head's k best classes of every clip. shares: fp32 (H, V, k), their probabilities. entropy:
    fp32 (H, V), cross-entropy with labels, where these were given. All on the CPU."""

    best: Tensor
    shares: Tensor
    entropy: Tensor | None


@torch.no_grad()
def judge(module: nn.Module, rows: Rows, count: int, *, batch_size: int, label: Tensor | None = None) -> Judged:
    """What stacked heads say of clips 0 to count - 1. label: int64 (count,) on the CPU."""
    parts = []
    for clips in torch.arange(count).split(batch_size):
        logs = module(rows(clips)).log_softmax(-1).cpu()
        shares, best = logs.exp().topk(min(5, logs.shape[-1]))
        own = torch.zeros(0) if label is None else label[clips].expand(len(logs), -1)
        entropy = torch.empty(len(logs), 0) if label is None else -logs.gather(2, own[..., None])[..., 0]
        parts.append((best, shares, entropy))
    best, shares, entropy = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return Judged(best, shares, None if label is None else entropy)


def held_out(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips to train on and held-out ones, at least one of either, of `count` >= 2; ascending."""
    order = torch.randperm(count, generator=generator)
    held = min(max(1, round(HELD_OUT * count)), count - 1)
    return order[held:].sort().values, order[:held].sort().values


def choose(top1: list[float], loss: list[float]) -> int | None:
    """The head of the highest top-1, of the lowest loss among equals, and the first of those; None: no loss is finite."""
    finite = [head for head, value in enumerate(loss) if math.isfinite(value)]
    return min(finite, key=lambda head: (-top1[head], loss[head], head), default=None)
