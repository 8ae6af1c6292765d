"""The one training loop. It knows no model and no data set: an objective turns a batch into a loss, a loader gives batches.

An objective is a module: forward(batch, seed) -> scalars by name, `loss` among them; `trainable`, the module to save, with
`shard_units` for run.parallel fsdp (see sharding.py); `flops_per_clip()`; `pieces()`, what run.compile compiles with several
ranks (see compiling.py); optionally `has_unused_parameters`, true where some get no gradient, the same in every step, and
`views_per_clip`, how often a step trains on each clip. A
loader is iterable and sized, with set_epoch, state_dict (as of the last batch it gave) and load_state_dict; optionally with
`identity`, a text that differs where its clips do: a checkpoint is continued with the same alone.

Randomness: before each micro-step the generators are seeded from (run.seed, rank, step, micro-step), and the objective
gets the same number as a device tensor. A run continued from a checkpoint therefore needs no generator state to draw what
the uninterrupted run would have drawn. On a CPU, and on a GPU with run.deterministic, it repeats that run bit for bit; on
a GPU without, up to the order in which sums are added (see numerics.py).

The host waits for the device on log steps only: until then losses, gradient norms and metrics stay there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from umt_fast.config import ConfigError, OptimConfig, RunConfig
from umt_fast.engine import checkpoint, sharded_checkpoint, sharding
from umt_fast.engine.averaging import AveragedWeights
from umt_fast.engine.compiling import compiled, compiled_for_ddp, compiled_graphs
from umt_fast.engine.continued import check_settings, check_vocabulary
from umt_fast.engine.distributed import current_ranks, gather, mean_over_ranks
from umt_fast.engine.feeding import CudaLane, Feed, PinnedRing
from umt_fast.engine.graphed import GraphedStep, require_graphs
from umt_fast.engine.logging import MetricsLog, progress_line
from umt_fast.engine.optim import LayerOf, build_optimizer, upgraded_state
from umt_fast.engine.precision import measure_matmul_rate, peak_memory_bytes
from umt_fast.engine.saving import Saver
from umt_fast.engine.schedule import warmup_cosine
from umt_fast.engine.validation import Validator

log = logging.getLogger("umt_fast")


class Stopped(Exception):
    """The run was told to stop by a signal, `number`, and has saved; running it again continues."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} at step {step}; run again to continue")
        self.number = number


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; the message names the step and the files of its batch."""


def step_seed(*numbers: int) -> int:
    """A 63-bit seed from small numbers (splitmix64 over each in turn); neighbors give unrelated seeds."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Trainer:
    """Trains an objective as a RunConfig says; see the module's head for what it expects."""

    def __init__(
        self,
        run: RunConfig,
        optim: OptimConfig,
        objective: nn.Module,
        loader: Any,
        *,
        num_sample: int = 1,
        layer_of: LayerOf | None = None,
        num_layers: int = 0,
        records: dict[str, Any] | None = None,
        validation: Any = None,
    ) -> None:
        """records go into checkpoints as they are: `config`, the run's settings; `model_config`, what rebuilds the model;
        `vocabulary`, the tokenizer of one that reads texts (config.Vocabulary).

        validation: judges the model every run.validate_epochs epochs; see validation.py. None: nothing does.
        """
        self.run, self.loader = run, loader
        self.records = {"config": {}, "model_config": {}} | (records or {})
        self.ranks = current_ranks(run)
        self.device = self.ranks.device
        if run.cuda_graph:
            require_graphs(self.device, self.ranks.world_size)
        self.folder, self.identity = Path(run.out), getattr(loader, "identity", None)
        # One rank has nothing to share out.
        self.sharded = run.parallel == "fsdp" and self.ranks.world_size > 1
        if self.sharded:
            if optim.fused == "apex":
                raise ConfigError(
                    "optim.fused apex takes no sharded parameters (run.parallel fsdp); use --optim.fused torch"
                )
            sharding.shard(objective, run, self.device)
        self.objective = objective.to(self.device).train()
        self.steps_per_epoch = len(loader) // run.accumulate
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"an epoch has {len(loader)} batches per rank, fewer than run.accumulate {run.accumulate}: "
                "not one optimizer step; lower one of run.accumulate and run.batch_size"
            )
        self.total_steps = self.steps_per_epoch * run.epochs
        self.last_step = min(self.total_steps, run.max_steps or self.total_steps)
        self.views = getattr(objective, "views_per_clip", 1)
        self.clips_per_step = run.batch_size * num_sample * run.accumulate * self.ranks.world_size
        self.rate = warmup_cosine(
            optim,
            global_batch=self.clips_per_step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=run.epochs,
            warmup_epochs=run.warmup_epochs,
        )
        self.clip_grad = optim.clip_grad
        self.parameters = [p for p in objective.trainable.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            objective.trainable, optim, lr=self.rate(0), layer_of=layer_of, num_layers=num_layers
        )
        self.average = AveragedWeights(objective.trainable, optim.ema_decay) if optim.ema_decay else None
        judged = validation is not None and run.validate_epochs > 0
        self.validator = Validator(validation, self, self.records) if judged else None
        self.saver = Saver(run, self.folder, self.ranks, self.steps_per_epoch)
        self.step = 0
        self.pending: list[dict[str, Any]] = []
        self.stop_signal = self.stop_agreed = 0
        self.graphs = 0
        self.loader_state = loader.state_dict()
        on_gpu = self.device.type == "cuda"
        self.lane, self.ring = (CudaLane(self.device), PinnedRing()) if on_gpu else (None, None)
        self.window_start, self.window_wait = time.perf_counter(), 0.0

    def train(self) -> None:
        """Runs to the last step.

        Raises Stopped after a SIGTERM or SIGINT, once a checkpoint is saved; NonFiniteError before anything of the bad
        step is written; CheckpointError when saving fails.
        """
        if self.ranks.first:
            checkpoint.prepare_folder(self.folder)
        self._resume()
        run_step = self._wrapped()
        self._announce()
        if self.step >= self.last_step:
            log.info("%s is complete: step %d of %d; nothing is left to do", self.folder, self.step, self.last_step)
        metrics = MetricsLog(self.folder, self.step, self.run.tensorboard) if self.ranks.first else None
        self.window_start, self.window_wait = time.perf_counter(), 0.0
        try:
            with self._signals():
                # A checkpoint that was saved just before the run ended may not have been judged.
                if self.validator and not self.validator.resume(self.step, metrics):
                    self._validate(metrics)
                while self.step < self.last_step and not self.stop_agreed:
                    self._epoch(run_step, metrics)
            self.saver.wait()
            if self.stop_agreed:
                raise Stopped(self.stop_agreed, self.step)
        except Exception:
            self.saver.settle()
            raise
        finally:
            if metrics is not None:
                metrics.close()

    def _epoch(self, run_step: nn.Module | GraphedStep, metrics: MetricsLog | None) -> None:
        epoch = self.step // self.steps_per_epoch
        self.loader.set_epoch(epoch)
        # A GPU's batches are copied one ahead; one ring serves all epochs.
        batches = Feed(self.loader, self.lane, self.ring)
        while self.step < self.last_step:
            self._train_step(run_step, batches, epoch)
            end_of_epoch = self.step % self.steps_per_epoch == 0
            done = end_of_epoch or self.step == self.last_step
            save = done or (self.run.save_every and self.step % self.run.save_every == 0)
            alone_and_told = self.stop_signal and self.ranks.world_size == 1
            if save or alone_and_told or self.step % self.run.log_every == 0:
                self._flush(metrics)
                # Ranks agree here, where they wait for each other anyway: a rank that stopped alone would hang the rest.
                # The agreed value is kept apart: a signal that arrives later must wait for the next agreement.
                self.stop_agreed = max(gather(self.stop_signal))
                if save or self.stop_agreed:
                    self._save()
                if done and not self.stop_agreed:
                    self._validate(metrics)
            if end_of_epoch or self.stop_agreed:
                break
        batches.close()

    def _validate(self, metrics: MetricsLog | None) -> None:
        """Judges the weights if that is due; its time is not the steps'."""
        if self.validator and self.validator.due(self.step):
            self.validator.judge(self.step, metrics)
            self.window_start = time.perf_counter()

    def _train_step(self, run_step: nn.Module | GraphedStep, batches: Feed, epoch: int) -> None:
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        indices, sums = [], {}
        for micro in range(self.run.accumulate):
            fed = batches.take()
            self.loader_state, batch = batches.state, fed.batch
            indices.append(fed.index)
            number = step_seed(self.run.seed, self.ranks.rank, self.step, micro)
            torch.manual_seed(number)
            seed = torch.full((1,), number, dtype=torch.int64, device=self.device)
            if isinstance(run_step, GraphedStep):
                values = run_step(batch, seed)
            else:
                with sharding.micro_step(run_step, last=micro == self.run.accumulate - 1):
                    values = run_step(batch, seed)
                    (values["loss"] / self.run.accumulate).backward()
            for key, value in values.items():
                sums[key] = sums.get(key, 0) + value.detach() / self.run.accumulate
            if micro < self.run.accumulate - 1:
                batches.stage()
        sharding.average_whole(self.parameters)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = sharding.total_norm(gradients)
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        # The fused optimizer leaves everything as it is where this is 1; the host learns of it at the next log step.
        self.optimizer.found_inf = torch.isfinite(norm).logical_not().float()
        self.optimizer.step()
        if self.average:
            self.average.update()
        self.optimizer.zero_grad(set_to_none=not (isinstance(run_step, GraphedStep) and run_step.adds_up))
        self.step += 1
        if self.step < self.last_step and self.step % self.steps_per_epoch:
            batches.stage()  # while the device computes what was launched
        self.window_wait, batches.waited = self.window_wait + batches.waited, 0.0
        self.pending.append(
            {"step": self.step, "epoch": epoch, "lr": rate, "values": sums, "norm": norm, "at": indices}
        )

    def _flush(self, metrics: MetricsLog | None) -> None:
        """Brings the window's numbers to the host, checks them, and writes a row per step."""
        if not self.pending:
            return
        names = list(self.pending[0]["values"])
        table = torch.stack(
            [
                torch.stack([entry["norm"].float(), *(entry["values"][name].float() for name in names)])
                for entry in self.pending
            ]
        )
        own = table
        table = mean_over_ranks(table.clone()).tolist()
        bad = next((n for n, row in enumerate(table) if not all(map(math.isfinite, row))), None)
        elapsed = time.perf_counter() - self.window_start
        clips_per_s = self.clips_per_step * len(self.pending) / elapsed
        shared = {
            "clips_per_s": round(clips_per_s, 4),
            **({"views_per_s": round(clips_per_s * self.views, 4)} if self.views > 1 else {}),
            "data_wait": round(self.window_wait / elapsed, 4),
            "mfu": round(clips_per_s / self.ranks.world_size * self.objective.flops_per_clip() / self.matmul_rate, 4),
            "memory_gib": round(peak_memory_bytes(self.device) / 2**30, 4),
            "bad_files": len(getattr(self.loader, "bad_files", ())),
        }
        rows = []
        for entry, (norm, *values) in zip(self.pending[:bad], table[:bad], strict=True):
            row = {"step": entry["step"], "epoch": entry["epoch"], "lr": entry["lr"], "grad_norm": norm}
            rows.append(row | dict(zip(names, values, strict=True)) | shared)
        if metrics is not None:
            metrics.write(rows)
        if bad is not None:
            values = dict(zip(["gradient norm", *names], table[bad], strict=True))
            self._stop_non_finite(self.pending[bad], values, own[bad].tolist())
        if metrics is not None:
            left = (self.last_step - self.step) * elapsed / len(self.pending)
            log.info(progress_line(rows[-1], self.last_step, left))
            if self.run.compile and compiled_graphs() != self.graphs:
                self.graphs = compiled_graphs()
                log.info("run.compile: %d graph(s), each with its backward", self.graphs)
        self.pending.clear()
        self.window_start, self.window_wait = time.perf_counter(), 0.0

    def _stop_non_finite(self, entry: dict[str, Any], values: dict[str, float], mine: list[float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        numbers = sorted(set(torch.cat(entry["at"]).tolist()))
        name_of = getattr(self.loader, "name_of", str)
        newest = checkpoint.checkpoints(self.folder)
        saved = f"{newest[-1][1]} is sound" if newest else "no checkpoint was due yet"
        # The gradient norm is everybody's: only a loss tells whose batch it was.
        others = not all(map(math.isfinite, list(values.values())[1:])) and all(map(math.isfinite, mine[1:]))
        where = "on another rank; this rank's were" if others else "on this rank"
        raise NonFiniteError(
            f"{', '.join(bad)} is not finite at step {entry['step']}; nothing of it was saved ({saved}). "
            f"Files of the batch {where}: {', '.join(name_of(n) for n in numbers)}"
        )

    def _save(self) -> None:
        rest = {
            "trainer": {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "steps_per_epoch": self.steps_per_epoch,
                "clips_per_step": self.clips_per_step,
                "world_size": self.ranks.world_size,
                "clips": self.identity,
                "seed": self.run.seed,
                "batch_size": self.run.batch_size,
                "accumulate": self.run.accumulate,
            },
            "loader": gather(self.loader_state),
            **self.records,
        }
        self.saver.save(self.step, self.objective.trainable, self.optimizer, self.average, rest)
        # Time spent saving is not the step's.
        self.window_start = time.perf_counter()

    def _resume(self) -> None:
        def read(path: Path) -> dict[str, Any]:
            if path.is_dir():
                return sharded_checkpoint.read(path, self.objective.trainable, self.optimizer)
            return checkpoint.read_file(path)

        newest = checkpoint.load_newest(self.folder, read) if self.run.resume else None
        steps = gather(0 if newest is None else newest[1].get("trainer", {}).get("step"))
        if len(set(steps)) > 1:
            raise checkpoint.CheckpointError(
                f"the ranks found checkpoints of different steps in {self.folder}: {steps}; "
                "run.out must be a folder that all nodes share"
            )
        if newest is None:
            if not self.run.resume and checkpoint.checkpoints(self.folder):
                raise checkpoint.CheckpointError(
                    f"run.resume is false, but {self.folder} holds checkpoints; give another run.out or move them away"
                )
            return
        path, content = newest
        if "trainer" not in content:
            raise checkpoint.CheckpointError(f"{path} holds weights alone; start a new run.out from them (--init)")
        saved = content["trainer"]
        for key, name, now in (  # what a user sets before what follows from it
            ("seed", "run.seed", self.run.seed),
            ("batch_size", "run.batch_size", self.run.batch_size),
            ("accumulate", "run.accumulate", self.run.accumulate),
            ("world_size", "ranks:", self.ranks.world_size),
            ("clips_per_step", "clips per step (with data.num_sample):", self.clips_per_step),
            ("steps_per_epoch", "steps per epoch of its list:", self.steps_per_epoch),
        ):
            if saved.get(key, now) != now:  # older checkpoints do not say all
                raise checkpoint.CheckpointError(
                    f"{path} was made with {name} {saved[key]}, this run has {now}: the order of clips would change. "
                    "Continue with the same list, seed, batch size, accumulation and number of ranks, or start a new run.out "
                    "from these weights (--init)"
                )
        if saved.get("clips", self.identity) != self.identity:  # older checkpoints do not say
            raise checkpoint.CheckpointError(
                f"{path} was made with another list of clips (identity {saved['clips']}, now {self.identity}): its place in "
                "the epoch would mean other clips. Continue with the same files in the same order (they may have moved, in a "
                "folder of the same name), or start a new run.out from these weights (--init)"
            )
        check_vocabulary(content.get("vocabulary"), self.records.get("vocabulary"), path)
        self.records["config"] = check_settings(
            content.get("config"), self.records["config"], path, say=self.ranks.first
        )
        try:
            state = upgraded_state(content["optimizer"], self.optimizer)
            sharding.load_states(self.objective.trainable, self.optimizer, content["model"], state)
            if self.average:
                self.average.resume(content, path)
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} does not fit the configured model: {' '.join(str(error).split())[:1000]}"
            ) from error
        self.loader.load_state_dict(content["loader"][self.ranks.rank])
        self.step = saved["step"]
        log.info("continuing from %s", path)

    def _wrapped(self) -> nn.Module | GraphedStep:
        module = self.objective
        if self.sharded:
            return module
        if self.run.compile:
            # Batches of images and of clips get a graph each.
            module = compiled(module) if self.ranks.world_size == 1 else compiled_for_ddp(module)
        if self.run.cuda_graph:
            return GraphedStep(module, self.parameters, self.run.accumulate)
        if self.ranks.world_size > 1:
            unused = getattr(self.objective, "has_unused_parameters", False)
            module = sharding.replicate(module, self.run, unused=unused)
        return module

    def stepper(self) -> Callable[[], None]:
        """What makes the next optimizer step and nothing else, for those who measure it; the loader must not end."""
        run_step, batches = self._wrapped(), Feed(self.loader, self.lane, self.ring)
        return lambda: self._train_step(run_step, batches, 0)

    def _announce(self) -> None:
        half = self.run.dtype == "bf16"
        self.matmul_rate = measure_matmul_rate(self.device, torch.bfloat16 if half else torch.float32)
        trained = sum(parameter.numel() for parameter in self.parameters)
        log.info(
            "%s, %s, %d rank(s) x %d clips x %d micro-step(s); %.1f M parameters trained; matmul rate %.2f TFLOP/s; "
            "steps %d to %d of %d per epoch",
            self.device,
            self.run.dtype,
            self.ranks.world_size,
            self.run.batch_size,
            self.run.accumulate,
            trained / 1e6,
            self.matmul_rate / 1e12,
            self.step,
            self.last_step,
            self.steps_per_epoch,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Notes SIGTERM and SIGINT during the block; the loop saves and ends at its next safe point, or at a second SIGINT."""

        def note(number: int, frame: object) -> None:
            if number == self.stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number
            if self.ranks.first:
                # Not logged: the signal may have come while a line was being written.
                os.write(2, f"signal {number}: saving and stopping at the next safe point\n".encode())

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: signals are the caller's business
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
