"""What is asked of one way of computing a training step: does it agree with the eager one, and how long does it take.

Both questions go through Trainer's own step: objective, accumulation, clipping and optimizer are those of the run.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn

from umt_fast.config import OptimConfig, RunConfig
from umt_fast.engine.optim import LayerOf
from umt_fast.engine.precision import peak_memory_bytes
from umt_fast.engine.repeated import Repeated
from umt_fast.engine.trainer import Trainer

ROUNDS = 3
# A round lasts about so long, within the most steps; a slow step makes a round by itself.
ROUND_SECONDS, MAX_STEPS = 1.0, 20


class Tolerance(NamedTuple):
    """loss, norm: largest relative difference. whole, each: least cosine of all gradients, and of a parameter's, to eager's.

    Bounds for what is wrong, not for rounding: in bf16 a rounded score may also draw another token or negative.
    """

    loss: float
    norm: float
    whole: float
    each: float


TOLERANCES = {"fp32": Tolerance(1e-4, 1e-3, 0.999, 0.99), "bf16": Tolerance(2e-2, 5e-2, 0.99, 0.9)}
# Parameters with less than this share of the gradient's norm have no direction but rounding (keys' biases); only their size
# is looked at.
SMALL = 1e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step to measure: batches on the host, one of each kind, and the rest as Trainer takes it."""

    run: RunConfig
    optim: OptimConfig
    objective: nn.Module
    batches: list[dict[str, Tensor]]
    num_sample: int = 1
    layer_of: LayerOf | None = None
    num_layers: int = 0


class Seen(NamedTuple):
    """Of one step: loss, gradient norm, and gradients on the host in fp32 by name (None: no gradient)."""

    loss: float
    norm: float
    gradients: dict[str, Tensor | None]


def _stepper(case: Case) -> tuple[Trainer, Callable[[], None]]:
    """A trainer of the case, and what makes its next optimizer step."""
    trainer = Trainer(
        case.run,
        case.optim,
        case.objective,
        Repeated(case.batches),
        num_sample=case.num_sample,
        layer_of=case.layer_of,
        num_layers=case.num_layers,
    )
    return trainer, trainer.stepper()


def observe(case: Case) -> list[Seen]:
    """Loss and gradients of a step for each batch, from the same weights and seeds whichever way they are computed."""
    trainer, step = _stepper(case)
    trainer.rate = lambda number: 0.0  # the weights stay
    found: list[dict[str, Tensor | None]] = []
    names = {parameter: name for name, parameter in case.objective.trainable.named_parameters()}

    def note(*_: Any) -> None:
        gradients = ((names[p], p.grad) for p in trainer.parameters)
        found.append({name: None if g is None else g.detach().float().cpu().clone() for name, g in gradients})

    trainer.optimizer.register_step_pre_hook(note)
    for _ in case.batches:
        step()
    pairs = zip(trainer.pending, found, strict=True)
    return [Seen(float(entry["values"]["loss"]), float(entry["norm"]), gradients) for entry, gradients in pairs]


def not_finite(seen: list[Seen]) -> str:
    """What of these steps is not finite, or an empty text."""
    for step in seen:
        for name, value in (("loss", step.loss), ("gradient norm", step.norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
    return ""


def difference(reference: list[Seen], found: list[Seen], dtype: str) -> str:
    """The first thing in which steps leave the eager reference by more than TOLERANCES[dtype], or an empty text."""
    limit = TOLERANCES[dtype]
    for expected, step in zip(reference, found, strict=True):
        for name, bound in (("loss", limit.loss), ("norm", limit.norm)):
            was, now = getattr(expected, name), getattr(step, name)
            if abs(now - was) > bound * max(abs(was), 1e-12):
                what = "gradient norm" if name == "norm" else name
                return f"{what} is {now:.6g}, eager {was:.6g}; they may differ by {bound:g} of it"
        worst = _directions(expected, step, limit)
        if worst:
            return worst
    return ""


def _directions(expected: Seen, step: Seen, limit: Tolerance) -> str:
    """The first parameter whose gradient points elsewhere than eager's, or all of them, or an empty text."""
    was = {name: 0.0 if g is None else float(g.norm()) for name, g in expected.gradients.items()}
    now = {name: 0.0 if g is None else float(g.norm()) for name, g in step.gradients.items()}
    floor, products = SMALL * math.hypot(*was.values()), 0.0
    for name, gradient in expected.gradients.items():
        product = float((gradient * step.gradients[name]).sum()) if was[name] and now[name] else 0.0
        products += product
        if was[name] <= floor:
            if now[name] > 2 * floor:
                return f"the gradient of {name} has the norm {now[name]:.3g}, eager's {was[name]:.3g}"
        elif product < limit.each * was[name] * now[name] or not now[name]:
            cosine = product / (was[name] * now[name]) if now[name] else 0.0
            return f"the gradient of {name} has the cosine {cosine:.4f} to eager's; {limit.each:g} is the least"
    sizes = math.hypot(*was.values()) * math.hypot(*now.values())
    if products < limit.whole * sizes:
        return f"the whole gradient has the cosine {products / sizes:.4f} to eager's; {limit.whole:g} is the least"
    return ""


def forget(device: torch.device) -> None:
    """Frees what the steps before left: graphs, compiled code, cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def time_steps(case: Case) -> dict[str, float]:
    """ms: a step's, the median of ROUNDS rounds. peak_gib: memory held at most. warm_up_s: the first steps, compiling in them.

    Raises ValueError where the last loss is not finite.
    """
    trainer, step = _stepper(case)
    device, kinds = trainer.device, len(case.batches)

    def waited() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = waited()
    for _ in range(2 * kinds):
        step()
    warm = waited()
    for _ in range(kinds):
        step()
    one = (waited() - warm) / kinds
    turns = max(1, min(MAX_STEPS, round(ROUND_SECONDS / max(one, 1e-6))) // kinds)
    rounds = []
    for _ in range(ROUNDS):
        trainer.pending.clear()
        rounds.append(_round(step, turns * kinds, device))
    loss = float(trainer.pending[-1]["values"]["loss"])
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} after {trainer.step} steps")
    # Reserved, not allocated: a recorded graph's memory between its tensors is nobody else's either.
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes(device)
    return {"ms": statistics.median(rounds), "peak_gib": peak / 2**30, "warm_up_s": warm - start}


def _round(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Milliseconds of one of `count` steps."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return 1e3 * (time.perf_counter() - start) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count
