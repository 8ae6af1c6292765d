"""What a kind of training is: a task. Trainer, command line, checkpoints, plan and run.tune know tasks by name alone.

A task is an object with the members of Task, in a file of its own that ends with `register(...)`. Its configuration is a
dataclass with at least `run`, `data`, `student` and `optim` (umt_fast/config). What it trains is an objective, a module; what
it reads is a loader. docs/extending.md adds one step by step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor, nn

from umt_fast.config import ConfigError, DataConfig
from umt_fast.config.unused import Refuse, refuse_unread, refuser
from umt_fast.engine.distributed import Ranks
from umt_fast.models.weights import WeightsFile

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


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How a model is judged; see `python -m umt_fast eval --help`. A task refuses what it does not read."""

    batch_size: int = 16
    top_k: int = 128
    joining: Literal["each", "paragraph"] = "each"
    max_length: int = 0
    memory_gib: float = 8.0
    scores: Path | None = None
    tokenizer: str = ""
    usual_tokenizer: str = ""

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Raises ConfigError for options set away from their defaults."""
        shown = {"joining": "captions"}
        for name in names:
            if getattr(self, name) != getattr(type(self)(), name):
                raise ConfigError(f"--{shown.get(name, name)} is {why}; leave it out")


class Task(Protocol, Generic[C]):
    """One kind of training, and how what it trained is judged."""

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

    def evaluate(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: EvalOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """Figures by name of a model on unseen clips, over all ranks and the same on each.

        Args:
            file: its weights, and what lies beside them.
            described: what it is of (Task.describe), complete.
            source: where it came from, for messages.
            list_path: the clips; what kind of list, the task says.
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
        near = difflib.get_close_matches(name, TASKS, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown task {name!r}{hint} Known: {', '.join(TASKS)}")
    return TASKS[name]


def task_of(config: Any) -> Task:
    """The task that a configuration belongs to. Raises ConfigError: none."""
    for task in TASKS.values():
        if type(config) is task.Config:
            return task
    known = ", ".join(task.Config.__name__ for task in TASKS.values())
    raise ConfigError(f"{type(config).__name__} is no configuration of a task; there are: {known}")


def check_used(config: Any, world_size: int) -> None:
    """Raises ConfigError for an option set away from its default that a run on world_size ranks would not read."""
    refuse = refuser(config)
    refuse_unread(config, refuse, world_size)
    task = task_of(config)
    if not getattr(task, "fuses_linear", False):
        refuse("run.linear", f"only stage 1 has products that carry what follows them, not task {task.name}")
    task.refuse_unread(config, refuse, world_size)
    config.data.require_used()
