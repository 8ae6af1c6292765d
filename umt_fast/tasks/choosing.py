"""`eval choose`: multiple choice on a list of clips with several texts each (MSRVTT-MC)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import DataConfig, VitConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.choices import Choices, read_choices
from umt_fast.engine.distributed import Ranks
from umt_fast.files import write_json
from umt_fast.models.weights import WeightsFile
from umt_fast.tasks.base import register_evaluation
from umt_fast.tasks.matching import TASKS_WITH_TEXT, TextOptions, load_matcher, whole_frames
from umt_fast.tasks.multiple_choice import Chosen, choose


class ChoiceColumns:
    """What batches hold beside the clips: `ids` int64 and `mask` bool (B, O, l), `answer` and `row` int64 (B,). Picklable."""

    def __init__(self, choices: Choices, tokens: Tokens) -> None:
        """tokens: of choices.options."""
        self.answer, self.count, self.tokens = choices.answer, choices.count, tokens

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        every = rows[:, None] * self.count + torch.arange(self.count)
        ids, mask = (part.unflatten(0, every.shape) for part in self.tokens[every.flatten()])
        return {"ids": ids, "mask": mask, "answer": self.answer[rows], "row": rows}


def choice_batches(
    choices: Choices, tokens: Tokens, data: DataConfig, vit: VitConfig, ranks: Ranks, *, batch_size: int
) -> Iterator[dict[str, Tensor] | None]:
    """A rank's batches as multiple_choice.choose takes them; None for turns in which only other ranks have clips."""
    loader = ClipLoader(
        choices.clips,
        data,
        num_frames=vit.num_frames,
        image_size=vit.image_size,
        batch_size=batch_size,
        train=False,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    loader.add_columns(ChoiceColumns(choices, tokens))
    most = -(-len(choices.clips) // ranks.world_size)
    yield from loader
    for _ in range(-(-most // batch_size) - len(loader)):
        yield None


def listing(choices: Choices, chosen: Chosen) -> dict[str, list[dict[str, Any]]]:
    """Every clip with its options and their scores: what `eval choose --scores` writes."""
    rows = zip(chosen.rows.tolist(), chosen.scores.tolist(), strict=True)
    return {
        "clips": [
            {
                "clip": choices.clips[row].name,
                "answer": answer,
                "choice": choice,
                "options": choices.options[row * choices.count : (row + 1) * choices.count],
                "scores": [round(score, 5) for score in scores],
            }
            for (row, choice, answer), scores in rows
        ]
    }


@dataclass(frozen=True, kw_only=True)
class ChooseOptions(TextOptions):
    """How multiple choice is judged."""


class Choose:
    """Multiple choice: the share of clips whose right text scores highest, by matching and similarity together.

    The list is .json: {"video": name, "caption": list of texts, "answer": number of the right one, from 0}.
    """

    name, tasks, Options = "choose", TASKS_WITH_TEXT, ChooseOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: ChooseOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """`accuracy` (a share), `clips`, `options` of each."""
        choices = read_choices(list_path, data.root)
        matcher = load_matcher(file, described, source, options, ranks)
        tokens, whole = matcher.tokens(choices.options), whole_frames(data)
        batches = choice_batches(choices, tokens, whole, matcher.vit, ranks, batch_size=options.batch_size)
        chosen = choose(matcher.model, batches, ranks, dtype=matcher.dtype)
        if options.scores is not None and ranks.first:
            write_json(options.scores, listing(choices, chosen))
        return chosen.figures | {"options": choices.count}


register_evaluation(Choose())
