"""Between the epochs of a training: the model is judged on unseen clips, and the best of it is kept.

What is judged, and how, a validation says: an object with `figures(objective) -> {name: value}`, equal on each rank, and
`best`, the name of the figure that the best weights have highest. Here is when that happens and what becomes of it: a row of
metrics.jsonl with the figures as `val_NAME`, a line of the log, and `checkpoint-best.pt` (`checkpoint-best.sharded` where
run.checkpoint is sharded) with `model`, `model_config`, `config` and `validation` (step, epoch, figures, averaged). Where
weights are averaged (optim.ema_decay) the average is what is judged and what that file holds.

Judging changes nothing of the training: random numbers of a step depend on its number alone (trainer.py), weights are put
back bit for bit. What was judged is remembered by metrics.jsonl: a run that continues knows its best figure, and judges a
checkpoint that it had no time to judge.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Protocol

import torch

from umt_fast.engine import checkpoint, sharded_checkpoint, sharding
from umt_fast.engine.distributed import gather
from umt_fast.engine.logging import VALIDATION, MetricsLog

log = logging.getLogger("umt_fast")


class Training(Protocol):
    """What a validator asks of the Trainer."""

    run: Any
    objective: Any
    average: Any
    ranks: Any
    folder: Path
    steps_per_epoch: int
    last_step: int


class Validator:
    """Judges an objective after every run.validate_epochs-th epoch and after the last step."""

    def __init__(self, validation: Any, trainer: Training, records: dict[str, Any]) -> None:
        """records: what a kept file holds beside the weights and the figures."""
        self.validation, self.records = validation, records
        self.run, self.objective, self.average = trainer.run, trainer.objective, trainer.average
        self.steps_per_epoch, self.last_step = trainer.steps_per_epoch, trainer.last_step
        self.first, self.folder = trainer.ranks.first, trainer.folder
        self.best: float | None = None

    def due(self, step: int) -> bool:
        """Whether weights of this step are to be judged."""
        whole = step % (self.steps_per_epoch * self.run.validate_epochs) == 0
        return step > 0 and (whole or step == self.last_step)

    def resume(self, step: int, metrics: MetricsLog | None) -> bool:
        """Finds the best figure up to a step; all ranks together. Returns whether weights of that step were judged already."""
        best, judged = None, False
        if self.first and metrics is not None:
            rows = metrics.validations or self._kept(step)
            name = VALIDATION + self.validation.best
            for row in rows:
                best = max(best, row[name]) if best is not None else row[name]
            judged = any(row["step"] == step for row in rows)
        self.best, judged = gather((best, judged))[0]
        return judged

    def _kept(self, step: int) -> list[dict[str, Any]]:
        """The best checkpoint's own figures, for a folder whose metrics.jsonl was lost."""
        path = self.folder / "checkpoint-best.pt"
        try:
            kept = checkpoint.read_file(path)["validation"] if path.is_file() else None
        except Exception as error:  # a cut file fails in many ways
            log.warning("WARNING: %s is damaged (%s); the best weights are sought anew", path, type(error).__name__)
            kept = None
        if kept is None or kept["step"] > step:
            return []
        return [{"step": kept["step"]} | {VALIDATION + name: value for name, value in kept["figures"].items()}]

    def judge(self, step: int, metrics: MetricsLog | None) -> dict[str, float]:
        """The figures of the weights as they are; all ranks together. Writes row, line and, if due, the best checkpoint."""
        with self.average.in_use() if self.average else contextlib.nullcontext():
            self.objective.eval()
            try:
                with torch.no_grad():
                    figures = sharding.within(self.objective, lambda: self.validation.figures(self.objective))
            finally:
                self.objective.train()
            name = self.validation.best
            better = figures[name] == figures[name] and (self.best is None or figures[name] > self.best)
            if better:
                self.best = figures[name]
                self._keep(step, figures)
        if metrics is not None:
            epoch = step // self.steps_per_epoch - (step % self.steps_per_epoch == 0)
            metrics.write([{"step": step, "epoch": epoch} | {VALIDATION + key: v for key, v in figures.items()}])
            shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            best = (
                f"the best {name}"
                if better
                else f"best {name} {'none yet' if self.best is None else format(self.best, '.4g')}"
            )
            log.info("validation at step %d%s: %s (%s)", step, " (averaged)" if self.average else "", shown, best)
        return figures

    def _keep(self, step: int, figures: dict[str, float]) -> None:
        told = {"step": step, "epoch": step / self.steps_per_epoch, "figures": dict(figures)}
        rest = self.records | {"validation": told | {"averaged": self.average is not None}}
        state = self.objective.trainable.state_dict()
        if self.run.checkpoint == "sharded":
            tensors = {f"model.{name}": value for name, value in state.items()}
            sharded_checkpoint.write(self.folder / "checkpoint-best.sharded", tensors, rest, first=self.first)
            return
        content = {"model": sharding.gathered(state, keep=self.first)} | rest
        if self.first:
            checkpoint.write(self.folder / "checkpoint-best.pt", content)
        gather(None)
