"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from umt_fast.config import OptimConfig


def scaled(rate: float, optim: OptimConfig, global_batch: int) -> float:
    """A configured rate scaled linearly from optim.lr_batch clips to the true number of clips per optimizer step."""
    return rate * global_batch / optim.lr_batch if optim.lr_batch else rate


def warmup_cosine(
    optim: OptimConfig,
    *,
    global_batch: int,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float,
    warmup_steps: int = 0,
) -> Callable[[int], float]:
    """The official schedules, as a function of the step counted from 0.

    linear_cosine: linear from warmup_lr to lr over the warm-up steps, both ends included; then half a cosine,
    min + (lr - min) / 2 * (1 + cos(pi * i / n)), i from 0 over the remaining n steps.

    scaled_cosine: lr * max(min_factor, f) with f = step / warm-up steps, which may be a fraction; then
    (1 + cos(pi * i / n)) / 2.

    warmup_steps: length of linear_cosine's warm-up in steps, in place of warmup_epochs; 0: as warmup_epochs says.
    """
    peak, low, start = (scaled(rate, optim, global_batch) for rate in (optim.lr, optim.min_lr, optim.warmup_lr))
    if optim.schedule == "scaled_cosine":
        return lambda step: (
            peak * max(optim.min_factor, _factor(step, epochs * steps_per_epoch, warmup_epochs * steps_per_epoch))
        )
    warmup = warmup_steps or int(warmup_epochs * steps_per_epoch)
    rest = max(1, epochs * steps_per_epoch - warmup)

    def rate(step: int) -> float:
        if step < warmup:
            return start + (peak - start) * step / max(1, warmup - 1)
        return low + (peak - low) / 2 * (1 + math.cos(math.pi * min(step - warmup, rest) / rest))

    return rate


def weight_decay_cosine(first: float, last: float, total_steps: int) -> Callable[[int], float]:
    """The official schedule of the weight decay, as a function of the step counted from 0: half a cosine, without warm-up.

    It is for parameter groups that are decayed at all. `last` is where it leads to; the last step is just before.
    """

    def decay(step: int) -> float:
        return last + (first - last) / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))

    return decay


def _factor(step: int, total: int, warmup: float) -> float:
    """Rising line, then half a cosine from 1 to 0; 0 from the last step on."""
    if step < warmup:
        return step / max(1.0, warmup)
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup)))) / 2
