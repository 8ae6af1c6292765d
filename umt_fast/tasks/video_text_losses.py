"""The losses of stage 2 (paper section 3.2): contrastive, matching, masked language, alignment, and all of a batch together.

Legend: B pairs of this rank, G of all ranks, E embedding width, l text positions. All return fp32 device scalars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kernels
from umt_fast.config import AlignConfig, Stage2Losses
from umt_fast.models.video_text import HEAD_EPS, VideoText

_IGNORED = -100


class Similarity(NamedTuple):
    """v2t and t2v: (B, G) similarities of this rank's rows to all columns, divided by the temperature; targets (B, G)."""

    v2t: Tensor
    t2v: Tensor
    targets: Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward sums what every rank's loss says about this rank's rows.

    Not torch.distributed.nn's, which is deprecated and refuses to be compiled; what it names instead is private.
    """

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


def stage2_losses(
    model: VideoText,
    losses: Stage2Losses,
    *,
    video: Tensor,
    visible: Tensor,
    ids: Tensor,
    mask: Tensor,
    index: Tensor,
    masked_ids: Tensor,
    labels: Tensor,
    seed: Tensor,
    targets: Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    rank: int = 0,
    capacity: int | None = None,
    pooled: int = 1,
    align: AlignConfig | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch of clips (or of images, as clips of one frame).

    Args:
        video: uint8 (B, T, H, W, 3), or normalized (B, 3, T, H, W).
        visible: int32 (B, n), the tokens the tower sees.
        ids, mask: int64 (B, l) text with the class token first, and bool (B, l), False at padding.
        index: int64 (B,), equal for rows of one sample.
        masked_ids, labels: as mask_tokens makes them.
        seed: int64 (1,), draws the hard negatives unless they are given.
        targets: (K, B, n, D) teacher outputs at visible, for the alignment loss; None: that loss is left out.
        negatives: (clip of each text, text of each clip), int64 (B,) each, rows of this rank.
        rank: this rank's place among the gathered rows.
        capacity: most positions of a batch that masked-language logits are computed for; None: all of them.
        pooled: equal parts of the tokens that are pooled apart; similarities are their mean. 1: all tokens together.
        align: normalization and distance of the alignment loss; None: the official ones.

    The model's temperature is first brought into its bounds, in place.

    Returns:
        fp32 scalars: `loss`, the weighted sum, and `vtc`, `vtm`, `mlm`, `uta` (detached) as far as their weights are not 0.
    """
    pairs = Pairs(video, visible, ids, mask, index, masked_ids, labels, seed, targets, negatives, capacity=capacity)
    return joint_losses(model, losses, [pairs._replace(pooled=pooled)], rank, align)


class Pairs(NamedTuple):
    """A batch of clips, or of images, with their captions; see stage2_losses for each.

    image, caption: fp32 (B, D) CLIP's embeddings of the clip and of its caption, for the alignment of the projected ones,
    or None.
    """

    video: Tensor
    visible: Tensor
    ids: Tensor
    mask: Tensor
    index: Tensor
    masked_ids: Tensor
    labels: Tensor
    seed: Tensor
    targets: Tensor | None = None
    negatives: tuple[Tensor, Tensor] | None = None
    image: Tensor | None = None
    caption: Tensor | None = None
    capacity: int | None = None
    pooled: int = 1


def joint_losses(
    model: VideoText, losses: Stage2Losses, batches: Sequence[Pairs], rank: int = 0, align: AlignConfig | None = None
) -> dict[str, Tensor]:
    """As stage2_losses, the mean of several batches: what the mean of their single steps would give, gradients too."""
    align, temperature = align or AlignConfig(), model.bound_temperature()
    heads = losses.uta > 0 and all(pairs.targets is not None for pairs in batches)
    if len(batches) == 1:
        seen = [model.vision_encoder.embed(batches[0].video, batches[0].visible, heads=heads)]
    else:
        seen = model.vision_encoder.embed_packed([(pairs.video, pairs.visible) for pairs in batches], heads=heads)
    texts = _encode(model, batches)
    found: dict[str, Tensor] = {}
    for pairs, (tokens, outputs), (plain, masked) in zip(batches, seen, texts, strict=True):
        parts = _losses_of(model, losses, align, temperature, pairs, tokens, outputs, plain, masked, rank)
        for name, value in parts.items():
            found[name] = found.get(name, 0) + value / len(batches)
    total = sum(getattr(losses, name) * value for name, value in found.items())
    return {"loss": total} | {name: value.detach() for name, value in found.items()}


def _encode(model: VideoText, batches: Sequence[Pairs]) -> list[tuple[Tensor, Tensor]]:
    """Plain and masked text (B, l, W) of each batch, all in one pass, padded to the longest of all batches."""
    longest = max(pairs.ids.shape[1] for pairs in batches)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])

    ids = joined([pairs.ids for pairs in batches] + [pairs.masked_ids for pairs in batches])
    mask = joined([pairs.mask for pairs in batches] * 2)
    parts = model.text_encoder.encode(ids, mask).split([len(pairs.ids) for pairs in batches] * 2)
    every = zip(batches, parts[: len(batches)], parts[len(batches) :], strict=True)
    return [tuple(part[:, : pairs.ids.shape[1]] for part in both) for pairs, *both in every]


def _losses_of(
    model: VideoText,
    losses: Stage2Losses,
    align: AlignConfig,
    temperature: Tensor,
    pairs: Pairs,
    tokens: Tensor,
    heads: Tensor | None,
    plain: Tensor,
    masked: Tensor,
    rank: int,
) -> dict[str, Tensor]:
    """The losses of one kind by name, from its vision tokens (B, n, C) and its plain and masked text (B, l, W)."""
    text, tower, found = model.text_encoder, model.vision_encoder, {}
    vision, caption = model.project_vision(tower.pool(tokens, pairs.pooled)), model.project_text(plain)
    sim = similarity(vision, caption, pairs.index, temperature, losses.gather)
    if losses.vtc:
        found["vtc"] = contrastive_loss(sim)
    if losses.vtm or losses.mlm:
        mask, labels = pairs.mask, pairs.labels
        clip_of, text_of = pairs.negatives or draw_negatives(sim, pairs.seed, rank)
        # Groups of texts: masked, matched, with a wrong text; last, the texts that ask a wrong clip.
        groups = torch.stack([masked, plain, plain[text_of], plain])
        masks = torch.stack([mask, mask, mask[text_of], mask])
        filled, judged = text.fuse_for_losses(groups, masks, text.clip_keys(tokens), clip_of)
        if losses.vtm:
            found["vtm"] = matching_loss(*(model.match(judged[group]) for group in (0, 2, 1)))
        if losses.mlm:
            rows, asked = masked_rows(labels, pairs.capacity or labels.numel())
            logits = text.cls.predictions(filled.flatten(0, 1)[rows])
            found["mlm"] = masked_language_loss(logits, asked)
    if heads is not None:
        found["uta"] = kernels.align_loss(
            heads,
            pairs.targets,
            tower.norm_weight,
            tower.norm_bias,
            eps=HEAD_EPS,
            normalize=align.normalize,
            loss=align.loss,
        )
    if losses.vision_projection and pairs.image is not None:
        found["vision_projection"] = (1 - F.cosine_similarity(vision, pairs.image, dim=-1)).mean()
    if losses.text_projection and pairs.caption is not None:
        found["text_projection"] = (1 - F.cosine_similarity(caption, pairs.caption, dim=-1)).mean()
    return found
