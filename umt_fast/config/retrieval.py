"""Fine-tuning for retrieval and multiple choice (the official ret_* and mc_* configurations)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from umt_fast.config.core import check_numbers, require
from umt_fast.config.models import TextConfig, VitConfig
from umt_fast.config.run import DataConfig, OptimConfig, RunConfig, video_text_optim


@dataclass(kw_only=True, slots=True)
class RetrievalLosses:
    """Weights of the two losses of retrieval; 0 switches one off. The official ones are 1."""

    vtc: float = 1.0
    """Contrastive: which caption belongs to which clip of the batch."""
    vtm: float = 1.0
    """Matching: whether a caption belongs to a clip, with hard negatives."""
    gather: Literal["official", "full"] = "official"
    """Gradient of the contrastive loss over several ranks, as in stage 2."""

    def __post_init__(self) -> None:
        check_numbers(self, "losses")
        for name in ("vtc", "vtm"):
            require(getattr(self, name) >= 0, f"losses.{name} is {getattr(self, name)}; it must not be negative")
        require(self.vtc + self.vtm > 0, "losses.vtc and losses.vtm are 0; nothing would be trained")


@dataclass(kw_only=True, slots=True)
class RetrievalConfig:
    """Captioned clips from stage-2 weights: contrastive and matching losses over whole clips, frame by frame."""

    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=32, epochs=10, warmup_epochs=1))
    data: DataConfig = field(default_factory=lambda: DataConfig(sampling="intervals", augment="random_resized_crop"))
    """How clips are cut; the lists are `videos`, data.train is not used."""
    videos: tuple[str, ...] = ()
    """Caption lists (.json, SQLite or tars), each as LIST or LIST=FOLDER, the folder its names are relative to."""
    captions: Literal["each", "paragraph"] = "each"
    """Of an entry's list of captions, `each` makes a row with the clip (MSVD), or all together are one `paragraph` (DiDeMo,
    ActivityNet)."""
    same_sample: Literal["file", "caption"] = "file"
    """Which rows are each other's right answers: those of one `file` name, whatever its folder, or those of one `caption`, as
    it is written (SSV2)."""
    student: VitConfig = field(default_factory=lambda: VitConfig(num_frames=12, drop_path=0.2))
    """More frames than stage 2 had continue its position table, as officially: leave position_grid empty."""
    text: TextConfig = field(default_factory=TextConfig)
    losses: RetrievalLosses = field(default_factory=RetrievalLosses)
    optim: OptimConfig = field(default_factory=lambda: video_text_optim(2e-5))
    embed_dim: int = 512
    """Width of the common space of clips and captions."""
    validate: Literal["retrieval", "choices"] = "retrieval"
    """How clips of data.validation judge the model between epochs: as a caption list, by the mean of all recalls after
    re-ranking (`match_r_mean`, officially), or as a list of choices, by accuracy (MSRVTT-MC)."""
    select_on_test: str = ""
    """The test set in place of data.validation, LIST or LIST=FOLDER: the best weights are then chosen by what they are reported
    on, as officially (but for DiDeMo). The figure flatters."""
    init: str = ""
    """Stage-2 weights, ours or official, or weights that were fine-tuned for retrieval; empty: from scratch."""
    tokenizer: str = "bert-base-uncased"
    """By name, or a local folder with a vocab.txt."""
    max_length: int = 32
    """Tokens of a caption, class token included; longer ones are cut."""
    sep_token: bool = False
    """Close captions with [SEP]; released UMT checkpoints were trained without."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(
            not (self.select_on_test and self.data.validation),
            f"data.validation is {self.data.validation} and select_on_test {self.select_on_test}; the best weights are chosen "
            "by one of them: leave the other out",
        )
        require(self.embed_dim >= 2, f"embed_dim is {self.embed_dim}; a direction needs at least 2")
        least = 3 if self.sep_token else 2  # a word besides the special tokens
        require(
            least <= self.max_length <= self.text.max_positions,
            f"max_length is {self.max_length}; it must lie in [{least}, text.max_positions = {self.text.max_positions}]",
        )
        require(
            not self.losses.vtm or self.run.batch_size >= 2,
            f"run.batch_size is {self.run.batch_size}; losses.vtm draws its negatives within a rank's batch, which needs at "
            "least 2: raise it, or set losses.vtm to 0",
        )
