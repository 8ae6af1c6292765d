"""Fine-tuning for question answering (the official qa_* configurations)."""

from __future__ import annotations

from dataclasses import dataclass, field

from umt_fast.config.core import check_numbers, require
from umt_fast.config.models import TextConfig, VitConfig
from umt_fast.config.run import DataConfig, OptimConfig, RunConfig


@dataclass(kw_only=True, slots=True)
class QuestionConfig:
    """Questions about clips from stage-2 weights: a causal decoder learns to say the answer, word by word."""

    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=32, epochs=12, warmup_epochs=1))
    data: DataConfig = field(default_factory=lambda: DataConfig(sampling="intervals", augment="random_resized_crop"))
    """How clips are cut; the lists are `questions`, data.train is not used. data.validation is a question list too, as LIST or
    LIST=FOLDER."""
    questions: tuple[str, ...] = ()
    """Question lists (.json), each as LIST or LIST=FOLDER, the folder its names are relative to."""
    answer_rows: int = 0
    """Rows that a batch holds for the different answers of each question; those that a question does not need weigh nothing.
    0: as many as the question with the most answers has. Of a question with more the most frequent ones are learned."""
    answers: str = ""
    """List of answers (.json) that the questions of data.validation are answered from."""
    student: VitConfig = field(default_factory=lambda: VitConfig(num_frames=12, drop_path=0.2))
    """More frames than stage 2 had continue its position table, as officially: leave position_grid empty."""
    text: TextConfig = field(default_factory=TextConfig)
    """The whole of it reads the question; the decoder has as many layers as there are from fusion_layer on."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=4e-5,
            schedule="scaled_cosine",
            min_factor=0.01,
            min_lr=0.0,
            lr_batch=0,
            betas=(0.9, 0.999),
            weight_decay=0.02,
        )
    )
    init: str = ""
    """Stage-2 weights, ours or official, or weights that were fine-tuned for question answering; empty: from scratch."""
    tokenizer: str = "bert-base-uncased"
    """By name, or a local folder with a vocab.txt."""
    max_length: int = 25
    """Tokens of a question, class token included; longer ones are cut."""
    max_answer: int = 5
    """Tokens of an answer, class token and closing [SEP] included; longer ones are cut and lose the [SEP]."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.answer_rows >= 0, f"answer_rows is {self.answer_rows}; it must not be negative")
        for name in ("max_length", "max_answer"):
            value = getattr(self, name)
            require(
                2 <= value <= self.text.max_positions,
                f"{name} is {value}; it must lie in [2, text.max_positions = {self.text.max_positions}]",
            )
