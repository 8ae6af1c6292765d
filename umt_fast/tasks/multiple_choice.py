"""Multiple choice: which of several texts belongs to a clip (MSRVTT-MC), with a fine-tuned retrieval model.

Legend: B clips, O options of each, l text positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from umt_fast.engine.distributed import Ranks, gather
from umt_fast.models.video_text import Matching

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


@torch.no_grad()
def choose(model: Matching, batches: Iterable[dict[str, Tensor]], ranks: Ranks) -> tuple[dict[str, float], Tensor]:
    """Accuracy (a share) over all ranks' clips, and the choices.

    Args:
        batches: of this rank: `video`, `ids`, `mask` as in score_options, `answer` int64 (B,), the right option, and `row`
            int64 (B,), the clip's number in the list. A rank may have none; a clip that several ranks have counts once.

    Returns:
        `accuracy` and `clips`, and int64 (clips, 3): row, choice, answer, by row. The same on every rank.

    Raises:
        ValueError: no rank has a clip; an answer that is no option.
    """
    model.eval()
    found = [torch.empty(0, 3, dtype=torch.int64)]
    for batch in batches:
        answer, options = batch["answer"], batch["ids"].shape[1]
        wrong = (answer < 0) | (answer >= options)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"clip {int(batch['row'][row])} has the answer {int(answer[row])}, but {options} options; answers count from 0"
            )
        scored = score_options(model, *(batch[name].to(ranks.device) for name in ("video", "ids", "mask")))
        found.append(torch.stack([batch["row"], scored.choice.cpu(), answer], 1))
    every = {row[0]: row for part in gather(torch.cat(found)) for row in part.tolist()}
    if not every:
        raise ValueError("no rank has a clip to judge; give a list with at least one")
    rows = torch.tensor([every[row] for row in sorted(every)])
    return {"accuracy": (rows[:, 1] == rows[:, 2]).double().mean().item(), "clips": len(rows)}, rows
