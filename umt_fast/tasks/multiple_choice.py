"""Multiple choice: which of several texts belongs to a clip (MSRVTT-MC), with a fine-tuned retrieval model.

Legend: B clips, O options of each, l text positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from umt_fast.config import Dtype
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.models.video_text import Matching
from umt_fast.models.weights import WeightsError

# The official shares of the matching head and of the similarities.
MATCHING_SHARE, SIMILARITY_SHARE = 0.7, 0.3


class OptionScores(NamedTuple):
    """Of each option, fp32: `scores` (B, O), their parts `logits` (B, O, 2; index 1: they match) and `similarity` (B, O)."""

    scores: Tensor
    logits: Tensor
    similarity: Tensor

    @property
    def choice(self) -> Tensor:
        """int64 (B,): the best option of each clip, the first of equal ones."""
        return self.scores.argmax(1)


@torch.no_grad()
def score_options(model: Matching, video: Tensor, ids: Tensor, mask: Tensor) -> OptionScores:
    """The official score: .7 of the matching head's probability, .3 of a softmax over options of similarity / temperature.

    Keys and values of a clip are computed once; its options ask them side by side.

    Args:
        model: in evaluation mode.
        video: uint8 (B, T, H, W, 3), or normalized (B, 3, T, H, W).
        ids, mask: int64 (B, O, l), the class token first, and bool (B, O, l), False at padding.

    Raises:
        ValueError: ids that are not (B, O, l), or of other clips than the video.
    """
    if ids.ndim != 3 or ids.shape != mask.shape or len(ids) != len(video) or ids.shape[1] == 0:
        raise ValueError(
            f"ids {tuple(ids.shape)} and mask {tuple(mask.shape)} must both be (clips, options, positions) of {len(video)} "
            "clips; pad every clip's options to one length"
        )
    text, tower = model.text_encoder, model.vision_encoder
    tokens, _ = tower.embed(video)
    hidden = text.encode(ids.flatten(0, 1), mask.flatten(0, 1))
    frames = tokens.shape[1] // tower.encoder.grid.per_frame
    clip = model.project_vision(tower.pool(tokens, frames))
    captions = model.project_text(hidden).view(*ids.shape[:2], -1)
    # In fp32 whatever autocast says: a temperature of .01 turns bf16's rounding of a cosine into a change of .4.
    with torch.autocast(clip.device.type, enabled=False):
        similarity = ((captions @ clip[:, :, None])[..., 0] / model.temperature).softmax(1)
    options = hidden.view(*ids.shape, -1).transpose(0, 1)
    fused = text.fuse(options, mask.transpose(0, 1), text.clip_keys(tokens), asked=1)
    logits = model.match(fused).float().transpose(0, 1)
    scores = MATCHING_SHARE * logits.softmax(-1)[..., 1] + SIMILARITY_SHARE * similarity
    return OptionScores(scores, logits, similarity)


class Chosen(NamedTuple):
    """What clips chose, the same on every rank: `figures`, `accuracy` (a share) and `clips`; `rows` int64 (clips, 3): row,
    choice, answer, by row; `scores` fp32 (clips, O) of their options."""

    figures: dict[str, float]
    rows: Tensor
    scores: Tensor


@torch.no_grad()
def choose(
    model: Matching, batches: Iterable[dict[str, Tensor] | None], ranks: Ranks, *, dtype: Dtype = "fp32"
) -> Chosen:
    """The choices of all ranks' clips.

    Args:
        batches: of this rank: `video`, `ids`, `mask` as in score_options, `answer` int64 (B,), the right option, and `row`
            int64 (B,), the clip's number in the list. A rank may have none; a clip that several ranks have counts once. None:
            a turn without clips, in which the rank computes along, as the parts of a sharded model are gathered by all.
        dtype: what products are computed in.

    Raises:
        ValueError: no rank has a clip; an answer that is no option.
        WeightsError: scores that are not finite.
    """
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        held = _nothing(model) if batch is None else batch
        answer, options = held["answer"], held["ids"].shape[1]
        wrong = (answer < 0) | (answer >= options)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"clip {int(held['row'][row])} has the answer {int(answer[row])}, but {options} options; answers count from 0"
            )
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            scored = score_options(model, *(held[name].to(ranks.device) for name in ("video", "ids", "mask")))
        if batch is not None:
            found.append((torch.stack([held["row"], scored.choice.cpu(), answer], 1), scored.scores.float().cpu()))
    every = {
        row[0]: (row, own) for part in gather(found) for rows, scores in part for row, own in _by_row(rows, scores)
    }
    if not every:
        raise ValueError("no rank has a clip to judge; give a list with at least one")
    order = sorted(every)
    rows, scores = torch.tensor([every[row][0] for row in order]), torch.stack([every[row][1] for row in order])
    if not scores.isfinite().all():
        raise WeightsError("the options' scores are not finite: the run that made this checkpoint diverged")
    accuracy = (rows[:, 1] == rows[:, 2]).double().mean().item()
    return Chosen({"accuracy": accuracy, "clips": len(rows)}, rows, scores)


def _by_row(rows: Tensor, scores: Tensor) -> Iterable[tuple[list[int], Tensor]]:
    return zip(rows.tolist(), scores, strict=True)


def _nothing(model: Matching) -> dict[str, Tensor]:
    """A batch of one blank clip with two options of one word."""
    vit, one = model.vision_encoder.encoder.config, torch.zeros(1, dtype=torch.int64)
    video = torch.zeros(1, vit.num_frames, vit.image_size, vit.image_size, 3, dtype=torch.uint8)
    ids = torch.zeros(1, 2, 1, dtype=torch.int64)
    return {"video": video, "ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "answer": one, "row": one}
