"""Options that a run would not read: refused when it begins, because only then all of them are known.

A recipe page may set what a later command-line option makes useless, so configurations themselves do not check this. An
option at its default is never refused. What only one task has or ignores, that task refuses (tasks/base.py).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from umt_fast.config.core import require

Refuse = Callable[..., None]
"""refuse(names, why, *harmless): raises ConfigError for each option of `names` (blanks between them, as on the command line)
that is not at its default; harmless: further values that ask for nothing."""


def refuser(config: Any) -> Refuse:
    """What refuses options of this configuration."""
    defaults = type(config)()

    def refuse(names: str, why: str, *harmless: Any) -> None:
        for name in names.split():
            value, default = (attrgetter(name)(each) for each in (config, defaults))
            require(value == default or value in harmless, f"{name} is {value!r}, but {why}; leave it at {default!r}")

    return refuse


def refuse_unread(config: Any, refuse: Refuse, world_size: int) -> None:
    """What no task reads in such a run."""
    run = config.run
    if world_size == 1:
        refuse("run.parallel run.compress", "there is one rank: start several with torchrun")
    if run.checkpoint != "sharded":
        refuse("run.async_save", f"run.checkpoint {run.checkpoint} is written at once; take run.checkpoint sharded")
    if run.tune == "off":
        refuse("run.tune_axes run.tune_deadline", "run.tune is off")
    if run.warmup_epochs == 0:
        refuse("optim.warmup_lr", "run.warmup_epochs is 0, so that no step has that rate", 0.0)
    if config.data.workers == 0 and config.data.reader != "dali":
        refuse("data.prefetch", "data.workers is 0, and the training process reads nothing ahead")
    if config.student.depth == 1:
        refuse("student.drop_path", "rates grow from 0 at the first block, and student.depth is 1", 0.0)
