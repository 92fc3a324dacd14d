"""curves.png: losses, validation scores and learning rate over the steps, drawn with Pillow alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from perpixel.engine.checkpoint import replacing

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 900, 300  # px of one panel
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 34, 34  # px around its axes
INK, GRID = (60, 60, 60), (225, 225, 225)
COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (0, 0, 0))
NOT_DRAWN = {"step", "seconds", "fraction", "images/s", "positives"}
SCORES = ("/AP", "/AP50", "/AP75")  # last part of the names of validation scores that are drawn


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram: a title, and a line of (step, value) points for every name."""

    title: str
    lines: dict[str, Points]


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Writes the picture of a run's metrics; nothing where there is nothing to draw.

    Args:
        rows: of metrics.csv; names with a slash ("bbox/AP") are validation scores.
    """
    panels = [panel for panel in _panels(rows) if panel.lines]
    if not panels:
        return
    picture = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    pen = ImageDraw.Draw(picture)
    last = max(row["step"] for row in rows)
    for index, panel in enumerate(panels):
        _draw_panel(pen, panel, index * HEIGHT, last)
    with replacing(path) as file:
        picture.save(file, format="PNG")


def _panels(rows: list[dict[str, float]]) -> list[Panel]:
    lines: dict[str, Points] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_DRAWN:
                lines.setdefault(name, []).append((row["step"], value))
    scores = {name: points for name, points in lines.items() if name.endswith(SCORES)}
    rate = {"lr": lines["lr"]} if "lr" in lines else {}
    losses = {name: points for name, points in lines.items() if "/" not in name and name != "lr"}
    return [Panel("losses (training)", losses), Panel("scores (validation)", scores), Panel("learning rate", rate)]


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, y: int, last: float) -> None:
    """One chart below the height `y`, px; all charts run from step 0 to `last`, so that they can be compared."""
    values = [value for points in panel.lines.values() for _, value in points]
    ticks = nice_ticks(min(0.0, *values), max(values))
    low, high, first = ticks[0], ticks[-1], 0.0
    x0, x1, y0, y1 = LEFT, WIDTH - RIGHT, y + TOP, y + HEIGHT - BOTTOM
    font = ImageFont.load_default(13)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / ((last - first) or 1.0)
        return x0 + across * (x1 - x0), y1 - (value - low) / ((high - low) or 1.0) * (y1 - y0)

    pen.text((x0, y + 10), panel.title, INK, font)
    for tick in ticks:
        height = place(first, tick)[1]
        pen.line([(x0, height), (x1, height)], GRID)
        pen.text((x0 - 6, height), f"{tick:g}", INK, font, anchor="rm")
    for step in nice_ticks(first, last):
        if first <= step <= last:
            pen.text((place(step, low)[0], y1 + 6), f"{step:g}", INK, font, anchor="mt")
    for index, (name, points) in enumerate(panel.lines.items()):
        color = COLORS[index % len(COLORS)]
        places = [place(*point) for point in points]
        if len(places) > 1:
            pen.line(places, color, width=2, joint="curve")
        for a, b in places[-1:] if len(places) > 20 else places:
            pen.ellipse([(a - 3, b - 3), (a + 3, b + 3)], color)
        pen.text((x1 + 12, y0 + 16 * index), f"{name} {points[-1][1]:.4g}", color, font)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** _exponent(span / about)
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power * about >= span * 0.999)
    start, end = int(low // step), int(-(-high // step))
    return [round(i * step, 12) for i in range(start, max(end, start + 1) + 1)]


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])
