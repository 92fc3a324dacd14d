"""How far a run is, and the learning rate that belongs there: pure functions of the step and of the time used."""

from __future__ import annotations

import math
from collections.abc import Callable

from perpixel.engine.settings import DEFAULT_EPOCHS, TrainConfig

WARMUP_SHARE = 0.1  # longest warm-up, as a share of the run: a warm-up sized for days must not eat a run of minutes

DECAYS: dict[str, Callable[[TrainConfig, float], float]] = {
    "step": lambda config, fraction: config.gamma ** sum(fraction >= m for m in config.milestones),
    "linear": lambda config, fraction: 1.0 - fraction,
    "cosine": lambda config, fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
}


class Schedule:
    """The run's length and rate.

    Args:
        config: length, warm-up and decay.
        steps_per_epoch: optimizer steps in one pass over the data.

    Attributes:
        steps: length in steps; None where it is given in minutes.
        seconds: length in seconds of training; None where it is given in steps.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int) -> None:
        self.config = config
        self.seconds = None if config.minutes is None else 60.0 * config.minutes
        self.steps: int | None = None
        if self.seconds is None:
            epochs = DEFAULT_EPOCHS if config.epochs is None else config.epochs
            self.steps = config.steps or max(1, round(epochs * steps_per_epoch))

    def fraction(self, step: int, elapsed: float) -> float:
        """Share of the run, 0..1, that lies behind after `step` steps and `elapsed` seconds of training."""
        done = step / self.steps if self.steps is not None else elapsed / (self.seconds or 1.0)
        return min(done, 1.0)

    def rate(self, step: int, fraction: float) -> float:
        """Multiple of `lr` for step number `step` (from 0)."""
        config = self.config
        risen = max(step / config.warmup_steps if config.warmup_steps else 1.0, fraction / WARMUP_SHARE)
        warm = config.warmup_factor + (1.0 - config.warmup_factor) * min(risen, 1.0)
        return warm * DECAYS[config.schedule](config, fraction)

    def seconds_left(self, step: int, elapsed: float, done: tuple[int, float]) -> float | None:
        """Estimate of the training time left, s; None while nothing is known.

        Args:
            step, elapsed: now.
            done: step and elapsed at the start of this process, which the pace is measured from.
        """
        if self.seconds is not None:
            return max(self.seconds - elapsed, 0.0)
        assert self.steps is not None
        here = step - done[0]
        return (elapsed - done[1]) / here * (self.steps - step) if here else None

    def validation_due(self, step: int, before: float, after: float) -> bool:
        """Whether the step that took the run from fraction `before` to `after` is followed by a validation."""
        every = self.config.evaluate_every
        if every is None:
            return math.floor(5 * after) > math.floor(5 * before)
        return every > 0 and step % every == 0
