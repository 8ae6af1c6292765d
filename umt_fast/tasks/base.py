"""What a kind of training is: a task. Trainer, command line, checkpoints, plan and run.tune know tasks by name alone.

A task is an object with the members of Task, in a file of its own that ends with `register(...)`. Its configuration is a
dataclass with at least `run`, `data`, `student` and `optim` (umt_fast/config). What it trains is an objective, a module; what
it reads is a loader. How weights are judged is an Evaluation, ended by `register_evaluation(...)` likewise. docs/extending.md
adds a task step by step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from umt_fast.config import ConfigError, DataConfig, Vocabulary, check_number, require
from umt_fast.config.unused import Refuse, refuse_unread, refuser
from umt_fast.data.loaders.tokens import load_tokenizer, require_extended, vocabulary_of
from umt_fast.engine.distributed import Ranks
from umt_fast.models.weights import WeightsFile, read_weights, vocabulary_in

C = TypeVar("C")


class Objective(Protocol):
    """A module that turns a batch into a loss."""

    @property
    def trainable(self) -> nn.Module:
        """The part that is trained and saved, under the names that checkpoints have."""

    def __call__(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """Device scalars by name, `loss` among them. seed: int64 (1,) on the device, all that draws may depend on."""

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip, forward and backward."""

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that run.compile compiles apart where several ranks exchange gradients."""


class Loader(Protocol):
    """Batches of one epoch after another, in an order that the seed decides; see data/loaders/clips.py."""

    bad_files: dict[str, str]
    kinds: int
    """Batches of different clips that one step takes together; 1, or 2 where clips and images are packed."""

    @property
    def identity(self) -> str:
        """A text that differs where the clips do: a run is continued with the same alone."""

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, as of the last one that was given."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def name_of(self, index: int) -> str:
        """The path of a clip by its number."""


class Validation(Protocol):
    """How a model is judged between the epochs of its training."""

    best: str
    """Name of the figure that the best weights have highest; they are kept as checkpoint-best."""

    def figures(self, objective: Any) -> dict[str, float]:
        """Figures by name on unseen clips, over all ranks and the same on each.

        objective: the task's, in evaluation mode, without gradients. Every rank must call its modules as often as the others
        do: those of a sharded model are gathered by all together. No state of the training may change.
        """


class Task(Protocol, Generic[C]):
    """One kind of training. How its weights are judged is an Evaluation of its own."""

    name: str
    """In checkpoints and files; never changed."""
    Config: type[C]
    """What a recipe page returns for it."""

    def settled(self, config: C) -> C:
        """The configuration with what only the files of the run decide. Raises ConfigError: it cannot run here."""

    def refuse_unread(self, config: C, refuse: Refuse, world_size: int) -> None:
        """Refuses options that such a run on world_size ranks would not read; see config/unused.py."""

    def objective(self, config: C) -> nn.Module:
        """The Objective, its weights loaded."""

    def untrained(self, config: C) -> nn.Module:
        """The same with random weights, without reading a file; also on the meta device."""

    def loader(self, config: C, ranks: Ranks) -> Loader:
        """The training clips of a rank. Raises DataError, ConfigError: none, or not usable."""

    def validation(self, config: C, ranks: Ranks) -> Validation | None:
        """How the model is judged every run.validate_epochs epochs; None: it is not. Raises DataError, ConfigError."""

    def random_batches(self, config: C) -> list[dict[str, Tensor]]:
        """A batch of each kind on the CPU, as the loader gives them, of random content."""

    def without_noise(self, config: C) -> C:
        """Without drop path and dropout, so that two ways of computing can be compared."""

    def clips_of_epoch(self, config: C) -> tuple[int, str] | None:
        """Clips of an epoch and where that number is from, for plans; None: only the user knows."""

    def visible_tokens(self, config: C) -> int:
        """Tokens of a clip that the trained tower sees at a time: of one view, where it sees several."""

    def describe(self, config: C) -> dict[str, Any]:
        """What a file of these weights is of, as plain values; see models/description.py."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What every evaluation is told. Its own options are fields of a class derived from this one."""

    batch_size: int = 16
    """Clips per rank and step."""
    scores: Path | None = None
    """JSON file for what was found for each clip or query, with scores."""
    workers: int = 4
    """Decoding processes; 0 decodes in this one."""
    root: str = ""
    """Folder put before relative paths; empty: the list's own folder."""
    max_seconds: float = 0.0
    """Only the first so many seconds of a clip are looked at; 0: all of it."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_number(entry.name, getattr(self, entry.name))
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be at least 1")
        for name in ("workers", "max_seconds"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")

    def data(self) -> DataConfig:
        """How clips are read. A derived class adds what its own fields say."""
        return DataConfig(workers=self.workers, root=self.root, max_seconds=self.max_seconds)


Given = TypeVar("Given", bound=EvalOptions)


class Evaluation(Protocol, Generic[Given]):
    """A way to judge weights on unseen clips: the command `eval NAME FILE LIST`."""

    name: str
    """Of the command: a verb."""
    tasks: tuple[str, ...]
    """Names of the tasks whose weights it judges."""
    Options: type[Given]
    """Every field with a default and a documentation string: the command's options."""

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: Given,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """Figures by name over all ranks, the same on each.

        Args:
            file: the weights, and what lies beside them.
            described: what they are of (Task.describe), complete.
            source: where they came from, for messages.
            list_path: the clips; what kind of list, the evaluation says.
            data: how clips are read (EvalOptions.data).
        """


TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Makes a task known by its name and its configuration. Raises ValueError: another has one of them."""
    for other in TASKS.values():
        if other.name == task.name or other.Config is task.Config:
            raise ValueError(f"task {task.name!r} with {task.Config.__name__} meets task {other.name!r}, known already")
    TASKS[task.name] = task
    return task


def task_named(name: str) -> Task:
    """The task of a name. Raises ConfigError: none has it."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"unknown task {name!r}{hint} Known: {', '.join(TASKS)}")
    return TASKS[name]


def task_of(config: Any) -> Task:
    """The task that a configuration belongs to. Raises ConfigError: none."""
    for task in TASKS.values():
        if type(config) is task.Config:
            return task
    known = ", ".join(task.Config.__name__ for task in TASKS.values())
    raise ConfigError(f"{type(config).__name__} is no configuration of a task; there are: {known}")


def validation_of(config: Any, ranks: Ranks) -> Validation | None:
    """How a run judges its model, or None. Raises ConfigError: options of it where nothing would be judged."""
    task, refuse = task_of(config), refuser(config)
    if config.run.validate_epochs == 0:
        refuse("data.validation", "run.validate_epochs is 0, so that nothing is judged during training")
        return None
    validation = task.validation(config, ranks)
    if validation is None:
        why = (
            "data.validation is empty"
            if not config.data.validation
            else f"training of task {task.name!r} judges nothing"
        )
        refuse("run.validate_epochs data.validation", why)
    return validation


def vocabulary_for(config: Any) -> Vocabulary | None:
    """The tokenizer that a task names in `tokenizer`, as checkpoints carry it; None: its model reads no texts.

    Raises DataError: it cannot be had, or it gives other numbers to the words of the weights that the run starts from.
    """
    name = getattr(config, "tokenizer", None)
    if name is None:
        return None
    vocabulary = vocabulary_of(load_tokenizer(name), name)
    if config.init:
        require_extended(vocabulary, vocabulary_in(read_weights(config.init).rest), config.init)
    return vocabulary


def check_used(config: Any, world_size: int) -> None:
    """Raises ConfigError for an option set away from its default that a run on world_size ranks would not read."""
    refuse = refuser(config)
    refuse_unread(config, refuse, world_size)
    task = task_of(config)
    if not getattr(task, "fuses_linear", False):
        refuse("run.linear", f"only stage 1 has products that carry what follows them, not task {task.name}")
    task.refuse_unread(config, refuse, world_size)
    config.data.require_used()


EVALUATIONS: dict[str, Evaluation] = {}


def register_evaluation(evaluation: Evaluation) -> Evaluation:
    """Makes a way to judge weights known by its name. Raises ValueError: another has it."""
    if evaluation.name in EVALUATIONS:
        raise ValueError(f"evaluation {evaluation.name!r} is known already")
    EVALUATIONS[evaluation.name] = evaluation
    return evaluation


def evaluation_named(name: str) -> Evaluation:
    """The evaluation of a name. Raises ConfigError: none has it."""
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name, EVALUATIONS, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"unknown evaluation {name!r}{hint} Known: {', '.join(EVALUATIONS)}")
    return EVALUATIONS[name]


def evaluations_of(task: str) -> list[str]:
    """Names of the evaluations that judge weights of a task."""
    return [evaluation.name for evaluation in EVALUATIONS.values() if task in evaluation.tasks]
