"""Times of several pieces of work, taken in turn, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every piece of work, one entry a kept round.

    Args:
        seconds: by name; round i of all names ran one after the other.
        other_cpus: how many CPUs other processes kept busy in each kept round; None where the system does not tell.
        dropped: rounds that were left out because the machine was too busy.
    """

    seconds: dict[str, list[float]]
    other_cpus: list[float] | None
    dropped: int

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of the time of `name` divided by the time of `base` in the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def spread(self, name: str, base: str) -> tuple[float, float]:
        """Lowest and highest of those ratios."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return min(ratios), max(ratios)


def take_turns(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    max_other_cpus: float = 0.15,
    patience: float = 4.0,
) -> Times:
    """Times all pieces of work once a round, in turn, every other round backwards.

    Args:
        work: by name.
        rounds: to keep.
        warmup: rounds at the start that do not count.
        max_other_cpus: a round in which other processes kept more CPUs than this busy is repeated,
        patience: but no more than this many times `rounds` in all; then the quietest rounds are kept.
    """
    for _ in range(warmup):
        for task in work.values():
            task()
    taken: list[tuple[float, dict[str, float]]] = []
    known = STAT.is_file()
    while len(taken) < patience * rounds:
        taken.append(_round(work, backwards=len(taken) % 2 == 1))
        if not known and len(taken) == rounds:
            break
        if sum(busy <= max_other_cpus for busy, _ in taken) >= rounds:
            break
    kept = sorted(taken, key=lambda one: one[0])[:rounds] if known else taken
    seconds = {name: [times[name] for _, times in kept] for name in work}
    return Times(seconds, [busy for busy, _ in kept] if known else None, len(taken) - len(kept))


def _round(work: Mapping[str, Callable[[], object]], *, backwards: bool) -> tuple[float, dict[str, float]]:
    """CPUs that others kept busy, and seconds by name."""
    times = {}
    start, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
    for name in list(work)[:: -1 if backwards else 1]:
        began = time.perf_counter()
        work[name]()
        times[name] = time.perf_counter() - began
    elapsed, own, busy = time.perf_counter() - start, time.process_time() - own, busy_seconds() - busy
    return max(0.0, busy - own) / elapsed, times


def busy_seconds() -> float:
    """Seconds that all CPUs together have been busy since the machine started; 0 where the system does not tell."""
    if not STAT.is_file():
        return 0.0
    fields = [float(x) for x in STAT.read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle, iowait
    return (sum(fields) - idle) / float(os.sysconf("SC_CLK_TCK"))
