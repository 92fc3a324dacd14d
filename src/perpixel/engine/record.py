"""What a run measures: metrics.csv, optional TensorBoard events, and the progress that a person sees."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from perpixel.engine.checkpoint import replacing
from perpixel.errors import CheckpointError, ConfigError

PLAIN_SECONDS = 10.0  # shortest time between two lines where the output is no terminal


class Metrics:
    """Rows of numbers by step, kept in a CSV file that grows by a line a row.

    Args:
        path: of metrics.csv.
        keep_until: rows of later steps are dropped (a resumed run makes them again); None: all rows are.

    Attributes:
        rows: one dict of numbers a row; "step" is in all of them.
    """

    def __init__(self, path: Path, keep_until: int | None) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        if keep_until is not None and path.is_file():
            self.rows = [row for row in read_metrics(path) if row["step"] <= keep_until]
        self._columns: list[str] = []
        self._rewrite()

    def add(self, row: dict[str, float]) -> None:
        """Appends a row; a column that is new moves the file's rows to a wider header."""
        self.rows.append(row)
        if set(row) <= set(self._columns):
            try:
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns, lineterminator="\n").writerow(_printable(row))
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be written ({error.strerror}); free space") from error
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_printable(row) for row in self.rows)
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())


def _printable(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.8g}" for name, value in row.items()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv, without their empty cells; a line cut short by a crash is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if k is not None and v} for row in csv.DictReader(file)]
    result = []
    for row in rows:
        try:
            numbers = {name: float(value) for name, value in row.items()}
        except (TypeError, ValueError):
            continue
        if "step" in numbers:
            result.append(numbers)
    return result


def event_writer(folder: Path, step: int) -> Any:
    """A TensorBoard writer; events after `step`, of a run that was stopped, no longer count.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard=true: TensorBoard is not installed; pip install 'perpixel[tensorboard]', or leave it out"
        ) from error
    return SummaryWriter(str(folder), purge_step=step or None)


class Live:
    """Progress of a run: a bar with losses, speed and time left on a terminal, now and then a line elsewhere.

    Args:
        console: None in processes that should be silent.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = -PLAIN_SECONDS

    def __enter__(self) -> Self:
        if self.console is not None and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), _Status())
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task("train", total=1.0, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, fraction: float, values: dict[str, float], seconds_left: float | None) -> None:
        """Where the run is.

        Args:
            step, fraction: steps done, and share of the run.
            values: what to print, by name.
            seconds_left: of training; None: unknown.
        """
        if self.console is None:
            return
        parts = [f"{name} {value:.4g}" for name, value in values.items()]
        left = "" if seconds_left is None else f"  {clock(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, description=f"step {step}", status="  ".join(parts) + left)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS or fraction >= 1.0:
            self._last_line = time.monotonic()
            self.console.print(
                f"step {step} ({fraction:.0%})  {'  '.join(parts)}{left}", highlight=False, soft_wrap=True
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Status(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("status", "")))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
