"""Training runs of several entrants under equal conditions, in turn, recorded as they finish.

A finished part is a line of `parts.jsonl` and is not run again. A part that was interrupted goes on where it was saved.
A part is known by what it computes: entrant, effective recipe, split, seed and threads; the code version is noted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folds import Split
from part import INTERRUPTED
from perpixel.config import dump
from perpixel.recipe import load_recipe
from provenance import code_version


@dataclass(frozen=True, slots=True)
class Entrant:
    """Args:
    name: in tables.
    network: a key of `part.NETWORKS`.
    overrides: of the recipe, for this entrant alone.
    """

    name: str
    network: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One training run.

    Args:
        split: what it learns from and is scored on.
        lr: learning rate.
        minutes: of training; validation and saving do not count.
        seed: of weights, order and augmentation.
    """

    entrant: Entrant
    split: Split
    lr: float
    minutes: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.entrant.name}, {self.split.name}, lr {self.lr:g}, {self.minutes:g} min, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished part left.

    Args:
        ap, ap50: of boxes, 0..1.
        steps, seconds: of training.
        other_cpus: CPUs that other processes kept busy meanwhile, on average.
        code: version that it was made with.
        detections: COCO results on the held-out pictures.
    """

    ap: float
    ap50: float
    steps: int
    seconds: float
    other_cpus: float
    code: str
    detections: Path


@dataclass(slots=True)
class Contest:
    """Where and how parts are run.

    Args:
        out: record, work folders and annotation files.
        recipe: of all entrants.
        overrides: of the recipe, for all entrants.
        threads: of every part.
    """

    out: Path
    recipe: str
    overrides: list[str]
    threads: int
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.record.is_file():
            lines = self.record.read_text(encoding="utf-8").splitlines()
            self.outcomes = {row["key"]: row for row in map(json.loads, lines)}

    @property
    def record(self) -> Path:
        return self.out / "parts.jsonl"

    def settings(self, part: Part) -> list[str]:
        """All overrides of a part but where its data lies."""
        own = [f"train.lr={part.lr}", f"train.minutes={part.minutes}", f"train.seed={part.seed}"]
        return [*self.overrides, *part.entrant.overrides, *own, "train.evaluate_every=0"]

    def key(self, part: Part) -> str:
        """Names what a part computes."""
        effective = dump(load_recipe(self.recipe, self.settings(part)))
        text = json.dumps([part.entrant.network, effective, part.split.digest, self.threads])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(self, part: Part) -> Outcome:
        """The outcome of a part, from the record or from a training run that is then recorded."""
        key = self.key(part)
        if key in self.outcomes:
            print(f"recorded   {part}: AP {_ap(self.outcomes[key]):.3f}", flush=True)
        else:
            print(f"running    {part}", flush=True)
            began = time.perf_counter()
            row = {"key": key, "part": str(part), "code": code_version(), **self._train(part, key)}
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.outcomes[key] = row
            took = time.perf_counter() - began
            print(f"finished   {part}: AP {_ap(row):.3f}, {row['steps']} steps, {took:.0f} s in all", flush=True)
        row = self.outcomes[key]
        scores = row["scores"]
        return Outcome(
            _ap(row), scores["AP50"] or 0.0, row["steps"], row["seconds"], row["other_cpus"], row["code"],
            self._work(key) / "detections.json",
        )  # fmt: skip

    def in_turn(self, parts: Sequence[Sequence[Part]]) -> list[list[Outcome]]:
        """Outcomes of groups of parts, one group after the other; who begins alternates."""
        outcomes = []
        for number, group in enumerate(parts):
            order = list(range(len(group)))
            found = {i: self.run(group[i]) for i in (order[::-1] if number % 2 else order)}
            outcomes.append([found[i] for i in order])
        return outcomes

    def _work(self, key: str) -> Path:
        return self.out / "work" / key

    def _train(self, part: Part, key: str) -> dict[str, Any]:
        """Runs `part.py`; what it wrote."""
        work = self._work(key)
        work.mkdir(parents=True, exist_ok=True)
        specification, result = work / "specification.json", work / "result.json"
        split = part.split
        files = [f"data.train_images={split.images}", f"data.train_annotations={split.train}"]
        files += [f"data.val_images={split.images}", f"data.val_annotations={split.val}"]
        given = {
            "recipe": self.recipe,
            "overrides": [*self.settings(part), *files],
            "network": part.entrant.network,
            "threads": self.threads,
            "work": str(work),
        }
        specification.write_text(json.dumps(given, indent=1), encoding="utf-8")
        script = Path(__file__).with_name("part.py")
        command = [sys.executable, str(script), str(specification), str(result)]
        _run_to_end(command, {**os.environ, "OMP_NUM_THREADS": str(self.threads)}, str(part))
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _ap(row: dict[str, Any]) -> float:
    return float(row["scores"]["AP"] or 0.0)


def _run_to_end(command: list[str], environment: dict[str, str], what: str) -> None:
    """Runs a part. A wish to stop is passed on, and the part saves before it ends.

    Raises:
        SystemExit: it was interrupted, or it failed.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped or status == INTERRUPTED:
        raise SystemExit(f"interrupted in: {what}; the same command goes on from here")
    if status:
        raise SystemExit(f"failed with status {status}: {what}; see above; finished parts are recorded")


def best_rates(
    contest: Contest, entrants: Sequence[Entrant], split: Split, rates: Sequence[float], minutes: float
) -> tuple[list[float], list[list[float]]]:
    """The rate with the highest AP on one split for every entrant, and all APs [rates][entrants]."""
    groups = [[Part(entrant, split, rate, minutes) for entrant in entrants] for rate in rates]
    found = [[outcome.ap for outcome in group] for group in contest.in_turn(groups)]
    chosen = [rates[max(range(len(rates)), key=lambda i: found[i][e])] for e in range(len(entrants))]
    return chosen, found


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all contests have."""
    parser.add_argument("--data", type=Path, required=True, help="COCO folder")
    parser.add_argument("--out", type=Path, required=True, help="record, work folders and report")
    parser.add_argument("--minutes", type=float, required=True, help="of training, every part")
    parser.add_argument("--folds", type=int, default=0, help="cross-validation over all pictures; 0: the own split")
    parser.add_argument("--categories", nargs="*", default=[], help="names to keep; none: all")
    parser.add_argument("--seeds", type=int, default=1, help="repeats of every split with seeds 0, 1, …")
    parser.add_argument("--recipe", default="fcos/lite0")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: the recipe's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="changes to the recipe, for all entrants")


def contest_from(arguments: argparse.Namespace) -> Contest:
    """A contest as the common options describe it."""
    overrides = list(arguments.set)
    if arguments.precision:
        overrides.append(f"train.precision={arguments.precision}")
    return Contest(arguments.out, arguments.recipe, overrides, arguments.threads)
