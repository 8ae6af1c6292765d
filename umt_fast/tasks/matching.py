"""Models that compare clips with texts, as evaluations want them: filled, on their device, with the words they know.

Stage-2 weights and those fine-tuned for retrieval are judged by one model: what only stage 2 trains is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from umt_fast.config import MAX_FRAMES, DataConfig, Dtype, VitConfig, require
from umt_fast.data.loaders.tokens import Tokens, tokenizer_of, warn_of_unknown
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.precision import usable_dtype
from umt_fast.models.description import text_config, vit_config
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.weights import WeightsFile, fit_retrieval, vocabulary_in
from umt_fast.tasks.base import EvalOptions

TASKS_WITH_TEXT = ("video_text", "retrieval")
"""Names of the tasks whose weights load_matcher takes."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(EvalOptions):
    """What every evaluation with texts is told."""

    frames: int = 0
    """Frames of a clip; 0: as trained (officially 4 after stage 2, 12 when fine-tuned). More continue the position table, as
    officially."""
    max_length: int = 0
    """Tokens of a text (DiDeMo 64, ActivityNet 150, LSMDC 96); 0: as in training."""
    tokenizer: str = ""
    """By name, or a folder with a vocab.txt; empty: as the run was given it, or the usual one of the named model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.frames <= MAX_FRAMES, f"frames is {self.frames}; it must lie in [0, {MAX_FRAMES}]")


class Matcher(NamedTuple):
    """A model in evaluation mode on its device, and how it takes texts and clips."""

    model: RetrievalModel
    words: Any
    """Its tokenizer."""
    max_length: int
    sep: bool
    dtype: Dtype
    """What it is judged in: fp32 after stage 2, as it was trained when fine-tuned."""
    first: bool
    """Whether this rank says what is to be said once."""

    @property
    def vit(self) -> VitConfig:
        return self.model.vision_encoder.encoder.config

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """The ids of cleaned texts; one line counts those with words that the tokenizer does not know."""
        if self.first:
            warn_of_unknown(self.words, {"texts": texts})
        return Tokens(texts, self.words, max_length=self.max_length, sep=self.sep)


def whole_frames(data: DataConfig) -> DataConfig:
    """As the official evaluation cuts clips: the middle frame of each interval, pressed into a square."""
    return replace(data, sampling="intervals", augment="whole")


def load_matcher(
    file: WeightsFile, described: dict[str, Any], source: Path, options: TextOptions, ranks: Ranks
) -> Matcher:
    """The model of a file of stage 2 or of fine-tuned retrieval; arguments as for Evaluation.run.

    Raises:
        ConfigError: frames or max_length that the model does not take.
        DataError: a tokenizer that cannot be had, is not the model's own, or is not known.
        WeightsError: tensors that do not fit.
    """
    least, limit = 3 if described["sep_token"] else 2, described["text"]["max_positions"]
    require(
        options.max_length == 0 or least <= options.max_length <= limit,
        f"max_length is {options.max_length}; it must lie in [{least}, {limit}], the positions of this model's text encoder "
        "(0: as trained)",
    )
    vit = vit_config(described)
    tubelet = vit.tubelet_size
    require(
        options.frames % tubelet == 0,
        f"frames is {options.frames}, and a token of {source} takes {tubelet}; give a multiple of it",
    )
    words = tokenizer_of(options.tokenizer, vocabulary_in(file.rest), described["text"]["vocab_size"], source)
    vit = replace(vit, num_frames=options.frames or vit.num_frames)
    model = RetrievalModel(vit, text_config(described), embed_dim=described["embed_dim"])
    fit_retrieval(model, file.state, str(source))
    trained = described["dtype"] if described["task"] == "retrieval" else "fp32"
    return Matcher(
        model.to(ranks.device).eval(),
        words,
        options.max_length or described["max_length"],
        described["sep_token"],
        usable_dtype(trained, ranks.device),
        ranks.first,
    )
