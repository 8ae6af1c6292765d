"""The losses of stage 2 as functions of embeddings (paper section 3.2): contrastive, matching, masked language.

Legend: B pairs of this rank, G of all ranks, E embedding width, l text positions. All return fp32 device scalars.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kernels

_IGNORED = -100


class Similarity(NamedTuple):
    """v2t and t2v: (B, G) similarities of this rank's rows to all columns, divided by the temperature; targets (B, G)."""

    v2t: Tensor
    t2v: Tensor
    targets: Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward sums what every rank's loss says about this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()  # not ours to change
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, differentiable; x itself in a run of one process."""
    return _Gather.apply(x.contiguous()) if dist.is_initialized() else x


def similarity(
    vision: Tensor, text: Tensor, index: Tensor, temperature: Tensor, gather: Literal["official", "full"] = "official"
) -> Similarity:
    """Similarities of this rank's pairs with those of all ranks.

    vision, text: unit vectors (B, E). index: int64 (B,), equal where rows show the same sample; such rows are all right
    answers and share the target. gather: how much of the gradient goes on to vision and text, see contrastive_loss.
    """
    if gather == "official" and dist.is_initialized():
        share = 1 / dist.get_world_size()
        vision, text = (x.detach() + (x - x.detach()) * share for x in (vision, text))
    every = gathered(index)
    equal = (index[:, None] == every[None]).float()
    # In fp32 whatever autocast says: a temperature of .01 turns bf16's rounding of a cosine into a change of .4.
    with torch.autocast(vision.device.type, enabled=False):
        return Similarity(
            v2t=vision @ gathered(text).t() / temperature,
            t2v=text @ gathered(vision).t() / temperature,
            targets=equal / equal.sum(1, keepdim=True),
        )


def contrastive_loss(sim: Similarity) -> Tensor:
    """Mean soft-target cross-entropy of both directions over this rank's rows.

    Averaged over ranks, as DDP averages gradients, this is the loss of the joint batch. With similarity(gather="full") its
    gradient is the joint batch's too. The official code's gathering, the default, keeps 1 / ranks of that at the encoders,
    though all of it at the temperature (its all_gather returns the local slice alone).
    """
    both = (F.cross_entropy(part, sim.targets) for part in (sim.v2t, sim.t2v))
    return sum(both) / 2


@torch.no_grad()
def draw_negatives(sim: Similarity, seed: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """A hard negative of this rank for each row: (clip for each text, text for each clip), int64 (B,) each.

    Drawn with probability proportional to exp(similarity), the row's own sample left out: the official weights, whose
    constant of 1e-4 within the softmax cancels. The softmax is taken over the allowed rows alone. Where the model is so sure
    of the right answer that every other weight underflows, the official draw fails; this one still follows the similarities.
    Uniform over the allowed rows where similarities are not finite (official), over all rows where all show one sample.
    """
    batch = len(sim.targets)
    local = slice(rank * batch, (rank + 1) * batch)
    right = sim.targets[:, local] > 0

    def draw(scores: Tensor, salt: int) -> Tensor:
        weights = scores[:, local].float().masked_fill(right, -torch.inf).softmax(1)
        weights = weights.nan_to_num(0.01, 0.01, 0.01).masked_fill(right, 0.0)
        return kernels.sample_visible(weights, 1, seed + salt)[:, 0].long()

    return draw(sim.t2v, 1), draw(sim.v2t, 2)


def matching_loss(positive: Tensor, wrong_clip: Tensor, wrong_text: Tensor) -> Tensor:
    """Mean two-class cross-entropy over 3 B pairs; logits (B, 2) each, index 1: they match."""
    logits = torch.cat([positive, wrong_clip, wrong_text]).float()
    label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    label[: len(positive)] = 1
    return F.cross_entropy(logits, label)


def mask_tokens(
    ids: Tensor, mask: Tensor, *, probability: float, mask_id: int, vocab_size: int, special: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """BERT's masking: (ids with masks, labels), labels -100 where nothing is asked.

    ids: int64 (B, l); mask: bool (B, l), False at padding; special: ids never chosen. Of the chosen 80% become mask_id, 10% a
    random id, 10% stay. Drawn from torch's generator on the ids' device.
    """
    allowed = mask.clone()
    for number in special:
        allowed &= ids != number
    chosen = (torch.rand(ids.shape, device=ids.device) < probability) & allowed
    kind = torch.rand(ids.shape, device=ids.device)
    replaced = torch.where(kind < 0.8, mask_id, torch.randint_like(ids, vocab_size))
    replaced = torch.where(kind < 0.9, replaced, ids)
    return torch.where(chosen, replaced, ids), torch.where(chosen, ids, _IGNORED)


def masked_rows(labels: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Where to compute vocabulary logits: the first `capacity` asked positions, flat (capacity,), and their labels.

    A fixed number, so that the host need not wait to know it; places left over point anywhere and have the label -100.
    """
    flat = labels.flatten()
    rows = (flat == _IGNORED).to(torch.uint8).sort(stable=True).indices[:capacity]
    return rows, flat[rows]


def masked_capacity(positions: int, probability: float) -> int:
    """Rows that hold all hidden words of a batch but once in a billion batches: the mean and six deviations."""
    expected = positions * probability
    return min(positions, math.ceil(expected + 6 * math.sqrt(expected * (1 - probability))))


def masked_language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over asked positions, 0 where none is; logits (m, vocabulary), labels int64 (m,), -100 for none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=_IGNORED, reduction="sum")
    return total / (labels != _IGNORED).sum().clamp_min(1)
