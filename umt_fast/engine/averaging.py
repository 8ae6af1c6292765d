"""The running average of trained weights (optim.ema_decay), as timm's ModelEma keeps it: one decay, from the first step on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.engine import sharding

log = logging.getLogger("umt_fast")


class AveragedWeights:
    """average = decay * average + (1 - decay) * weights, of every trained parameter and every floating buffer of a module.

    The average starts as the weights are at construction. Frozen parameters are not kept twice: their average is themselves.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        self.values = {
            name: value.detach().clone()
            for name, value in module.state_dict().items()
            if name not in frozen and value.is_floating_point()
        }

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        own = self.module.state_dict()
        return list(self.values.values()), [own[name] for name in self.values]

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each optimizer step. Nothing waits for the device."""
        averages, weights = self._pairs()
        torch._foreach_mul_(averages, self.decay)
        torch._foreach_add_(averages, weights, alpha=1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's whole state with the averages in it, under the same names."""
        return {name: self.values.get(name, value) for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def resume(self, content: dict[str, Any], source: object) -> None:
        """Takes the average from a checkpoint's content; from the weights as they are now where it has none, with a warning.

        Raises ValueError: an average of another model.
        """
        if "model_ema" in content:
            sharding.load_average(self.values, content["model_ema"])
            return
        log.warning("WARNING: %s was made without optim.ema_decay; the average starts with its weights", source)
        for average, weight in zip(*self._pairs(), strict=True):
            average.copy_(weight)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The module has the averages during the block, and afterwards its weights again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
