"""The training loop. It knows the protocol of a detector and `Batch`, and no concrete method.

One optimizer step is: the rate that belongs to this point of the run, `accumulate` times (next batch, forward in the
recipe's precision, losses in float32, backward), clip, update, running mean. Everything random in step s is seeded by
(seed, s, rank), and the loader's batch is a function of the same, so no generator's state has to be saved: a run that
is resumed from any saved step repeats the rest exactly.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from perpixel import distributed
from perpixel.allocator import keep_freed_memory
from perpixel.engine.checkpoint import RunFolder, load_into, load_state, save_state, save_weights, write_text
from perpixel.engine.curves import draw_curves
from perpixel.engine.evaluate import DTYPES
from perpixel.engine.interrupt import StopSignals
from perpixel.engine.optim import Ema, make_optimizer, set_rate
from perpixel.engine.processes import choose_device
from perpixel.engine.record import Live, Metrics, clock, event_writer
from perpixel.engine.schedule import Schedule
from perpixel.engine.settings import TrainConfig
from perpixel.engine.watch import LossWindow, StepTimer, require_finite
from perpixel.errors import CheckpointError, ConfigError
from perpixel.nn.sync_norm import synchronize_norms
from perpixel.structures import Batch, Progress

Scores = dict[str, dict[str, Any]]
MakeBatches = Callable[[int], Iterator[Batch]]
Validate = Callable[[nn.Module], Scores]

SAVE_SECONDS = 300.0
GPU_MEETING_STEPS = 10  # processes on GPUs agree on time and signals this often: each meeting waits for the device


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        reason: "finished", "early_stop" or "interrupted".
        step: optimizer steps in all.
        seconds: of training in all, over every resume.
        best: best validation score; None without validation.
        scores: of the last validation of this process's lifetime; None without.
        run: the folder.
    """

    reason: str
    step: int
    seconds: float
    best: float | None
    scores: Scores | None
    run: RunFolder


def train(
    net: nn.Module,
    config: TrainConfig,
    *,
    make_batches: MakeBatches,
    steps_per_epoch: int,
    run: RunFolder,
    validate: Validate | None = None,
    metric: str = "bbox.AP",
    resume: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Trains a detector.

    Args:
        net: a detector; trained in place.
        config: how.
        make_batches: endless batches of this process from micro-batch number n on, each a function of n.
        steps_per_epoch: optimizer steps in one pass over the data.
        run: an existing folder.
        validate: scores of a network by kind and name, equal in all processes.
        metric: "kind.name" of the score that decides what is best; larger is better.
        resume: go on from the folder's state; where there is none yet, start.
        console: progress goes here; None: silent.

    Raises:
        NonFiniteLossError: a loss or weight is not finite. Saved files are as they were.
        CheckpointError: a file cannot be written, or the state does not fit.
    """
    if choose_device(config.device).type == "cpu":
        keep_freed_memory()
    trainer = Trainer(net, config, Schedule(config, steps_per_epoch), run, metric, console)
    if resume and run.state.is_file():
        trainer.restore(load_state(run.state))
    with StopSignals() as signals:
        return trainer.run_through(make_batches, validate, signals)


class Trainer:
    """A run at one moment: network, optimizer, running mean, counters; `step` and `seconds` tell where it is."""

    def __init__(
        self,
        net: nn.Module,
        config: TrainConfig,
        schedule: Schedule,
        run: RunFolder,
        metric: str,
        console: Console | None,
    ) -> None:
        self.config, self.schedule, self.run, self.metric = config, schedule, run, metric
        self.device = choose_device(config.device)
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.layout: torch.memory_format = layout
        self.net: Any = net.to(self.device).to(memory_format=layout)  # Any: a Detector by protocol, nn.Module by nature
        self.forward: Callable[..., Any] = self.net
        if distributed.is_distributed():
            synchronize_norms(net)
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(net, device_ids=ids)
        self.optimizer = make_optimizer(net, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.ema = Ema(net, config.ema) if config.ema is not None else None
        self.step, self.seconds, self.started = 0, 0.0, (0, 0.0)
        self.best: float | None = None
        self.stale = 0  # validations since the best one
        self.validated_at = -1
        self.scores: Scores | None = None
        self.writes = distributed.rank() == 0
        self.meeting_steps = GPU_MEETING_STEPS if self.device.type == "cuda" else 1
        self.window = LossWindow(self.device)
        self.timer = StepTimer(config.profile, self.device)
        self.console = console if self.writes else None
        self.live = Live(self.console)
        self.saved_at = 0.0

    # State

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "stale": self.stale,
            "validated_at": self.validated_at,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes a state that `state` gave."""
        load_into(self.net, state["net"], self.run.state)
        if (self.ema is None) != (state["ema"] is None):
            raise CheckpointError(
                f"{self.run.state}: train.ema was switched on or off since; resume with the same recipe"
            )
        if self.ema is not None:
            load_into(self.ema.net, state["ema"], self.run.state)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"{self.run.state}: the optimizer's state does not fit ({error}); resume with the same recipe"
            ) from error
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.started, self.saved_at = (self.step, self.seconds), self.seconds
        self.best, self.stale, self.validated_at = state["best"], state["stale"], state["validated_at"]

    @property
    def product(self) -> nn.Module:
        """The network that is validated and kept: the running mean where there is one."""
        return self.ema.net if self.ema is not None else self.net

    def save(self) -> None:
        """Writes weights and state, after a look at whether they are worth keeping."""
        if self.writes:
            require_finite(self.net, self.step)
            save_weights(self.run.last, self.product)
            save_state(self.run.state, self.state())
        self.saved_at = self.seconds

    # The run

    def run_through(self, make_batches: MakeBatches, validate: Validate | None, signals: StopSignals) -> TrainResult:
        """Steps, rows, saves and validations from here to the end."""
        metrics = Metrics(self.run.metrics, self.step if self.step else None) if self.writes else None
        events = event_writer(self.run.path, self.step) if self.config.tensorboard and self.writes else None
        self.net.train()
        with self.live, ExitStack() as loader:
            reason = self._steps(make_batches, validate, signals, metrics, events, loader)
            loader.close()
            if reason != "interrupted" and validate is not None and self.validated_at != self.step:
                self._validate(validate, metrics, events)
            self.save()
            if metrics is not None:
                draw_curves(metrics.rows, self.run.curves)
            if self.config.profile:
                self.live.say(self.timer.table(self.step - self.started[0]))
            self.live.say(f"{reason} after {self.step} steps, {clock(self.seconds)} of training")
        if events is not None:
            events.close()
        return TrainResult(reason, self.step, self.seconds, self.best, self.scores, self.run)

    def _steps(
        self,
        make_batches: MakeBatches,
        validate: Validate | None,
        signals: StopSignals,
        metrics: Metrics | None,
        events: Any,
        loader: ExitStack,
    ) -> str:
        """Steps until the run is over; returns why. What `loader` closes ends the loader's processes."""
        fraction, batches = self._meet(signals)[0], None
        since = (self.step, self.seconds)
        while fraction < 1.0:
            if self._is_stale():
                return "early_stop"
            if batches is None:
                batches = make_batches(self.step * self.config.accumulate)
                loader.callback(getattr(batches, "close", lambda: None))
            began = time.perf_counter()
            self._update(batches, fraction)
            self.step += 1
            self.seconds += time.perf_counter() - began
            before, (fraction, stop) = fraction, self._meet(signals, fraction)
            validation = validate is not None and self.schedule.validation_due(self.step, before, fraction)
            save = validation or stop or self._save_due()
            if save or fraction >= 1.0 or self.step % self.config.log_every == 0:
                self._log(since, fraction, metrics, events)  # and look at the losses before anything is written
                since = (self.step, self.seconds)
            if stop:
                return "interrupted"
            if validate is not None and validation:
                self._validate(validate, metrics, events)
            if save:
                self.save()
        return "finished"

    def _update(self, batches: Iterator[Batch], fraction: float) -> None:
        """One optimizer step."""
        set_rate(self.optimizer, self.schedule.rate(self.step, fraction))
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 4099 + distributed.rank())
        parts = self.config.accumulate
        self.timer.start()
        for part in range(parts):
            batch = next(batches)
            self.timer.lap("loader wait")
            with self._silent(part < parts - 1):
                total = self._losses(batch, Progress(self.step, fraction))
                self.scaler.scale(total / parts).backward()
            self.timer.lap("backward")
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.net, self.step)
        self.timer.lap("optimizer")

    def _silent(self, silent: bool) -> AbstractContextManager[Any]:
        """Where gradients of several micro-batches add up, processes exchange them once."""
        if silent and isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def _losses(self, batch: Batch, progress: Progress) -> Tensor:
        """The objective on one micro-batch, in float32."""
        batch = batch.to(self.device)
        images = batch.images.contiguous(memory_format=self.layout) if self.config.channels_last else batch.images
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            outputs = self.forward(images, batch.sizes, auxiliary=True)
        self.timer.lap("forward")
        logs: dict[str, Tensor] = {}
        losses = self.net.loss(outputs, batch, progress, logs)
        self.window.add(self.step, batch.image_ids, losses, logs)
        self.timer.lap("loss")
        return torch.stack(list(losses.values())).sum()

    def _meet(self, signals: StopSignals, fraction: float | None = None) -> tuple[float, bool]:
        """Fraction of the run that is done, and whether a signal asks to stop: the same in all processes."""
        if not distributed.is_distributed():
            return self.schedule.fraction(self.step, self.seconds), signals.requested
        if fraction is None or self.step % self.meeting_steps == 0:
            told = torch.tensor([self.seconds, signals.requested], dtype=torch.float64, device=self.device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            self.seconds, stop = float(told[0]), bool(told[1])
            return self.schedule.fraction(self.step, self.seconds), stop
        if self.schedule.seconds is not None:
            return fraction, False  # clocks of processes differ between meetings
        return self.schedule.fraction(self.step, self.seconds), False

    # Housekeeping

    def _is_stale(self) -> bool:
        return self.config.early_stop is not None and self.stale >= self.config.early_stop

    def _save_due(self) -> bool:
        if self.config.save_every is not None:
            return self.step % self.config.save_every == 0
        # A save is a meeting, because the losses are looked at; clocks agree only where processes have just met.
        met = not distributed.is_distributed() or self.step % self.meeting_steps == 0
        return met and self.seconds - self.saved_at > SAVE_SECONDS

    def _log(self, since: tuple[int, float], fraction: float, metrics: Metrics | None, events: Any) -> None:
        """A row of metrics.csv from the steps since `since`."""
        means = self.window.drain()
        if not means or metrics is None:
            return
        pace = (self.step - since[0]) * self.config.batch_size / max(self.seconds - since[1], 1e-9)
        row = {"step": float(self.step), "seconds": self.seconds, "fraction": fraction}
        row |= {"lr": max(group["lr"] for group in self.optimizer.param_groups), "images/s": pace, **means}
        metrics.add(row)
        if events is not None:
            for name, value in list(row.items())[2:]:
                events.add_scalar(f"train/{name}", value, self.step)
        left = self.schedule.seconds_left(self.step, self.seconds, self.started)
        self.live.show(self.step, fraction, {"loss": means["loss"], **means, "images/s": pace}, left)

    def _validate(self, validate: Validate, metrics: Metrics | None, events: Any) -> None:
        """Scores of the product; the best weights are kept."""
        require_finite(self.net, self.step)
        self.scores = validate(self.product)
        self.net.train()
        self.validated_at = self.step
        kind, _, name = self.metric.partition(".")
        if name not in self.scores.get(kind, {}):
            raise ConfigError(f"metric {self.metric!r}: validation gave {sorted(self.scores)}; name one of its scores")
        score = self.scores[kind][name]
        better = score is not None and (self.best is None or score > self.best)
        self.best, self.stale = (score, 0) if better else (self.best, self.stale + 1)
        flat = {f"{k}/{n}": v for k, part in self.scores.items() for n, v in part.items() if isinstance(v, float)}
        if metrics is None:
            return
        if better:
            save_weights(self.run.best, self.product)
        write_text(self.run.scores, json.dumps({"step": self.step, **self.scores}, indent=1))
        metrics.add({"step": float(self.step), "seconds": self.seconds, **flat})
        draw_curves(metrics.rows, self.run.curves)
        for name, value in flat.items() if events is not None else ():
            events.add_scalar(f"val/{name}", value, self.step)
        mark = "  (best)" if better else ""
        self.live.say(f"step {self.step}: " + "  ".join(f"{n} {v:.3f}" for n, v in flat.items()) + mark)
