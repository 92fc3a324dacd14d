"""How sure is a difference? Standard errors of paired scores."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perpixel.metrics import CocoResults, coco_scores
from perpixel.structures import Categories


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not known (nan)."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def bootstrap_error(truth: Path, first: Path, second: Path, *, rounds: int = 200) -> float:
    """Standard error of the difference of two box APs on one set of pictures: its standard deviation over sets of
    the same number of pictures, drawn with replacement. Both are scored on the same draws.

    Args:
        truth: COCO annotations.
        first, second: COCO results of the two.
        rounds: draws.
    """
    content = json.loads(truth.read_text(encoding="utf-8"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (first, second)]
    rng = random.Random(0)
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        for _ in range(rounds):
            drawn = rng.choices([image["id"] for image in content["images"]], k=len(content["images"]))
            images = [{**image, "id": new} for new, image in enumerate(_rows(content["images"], drawn, "id"), 1)]
            owned = _redraw(content["annotations"], drawn)
            annotations = [{**a, "id": number} for number, a in enumerate(owned, 1)]
            file.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
            a, b = (_box_ap(file, content["categories"], _redraw(rows, drawn)) for rows in results)
            differences.append(a - b)
    return statistics.stdev(differences)


def _rows(images: list[dict[str, Any]], drawn: Sequence[int], key: str) -> list[dict[str, Any]]:
    by_id = {image[key]: image for image in images}
    return [by_id[identity] for identity in drawn]


def _redraw(rows: list[dict[str, Any]], drawn: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the drawn pictures, each draw with an image id of its own: 1, 2, …"""
    by_image = defaultdict(list)
    for row in rows:
        by_image[row["image_id"]].append(row)
    return [{**row, "image_id": new} for new, old in enumerate(drawn, 1) for row in by_image[old]]


def _box_ap(truth: Path, categories: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    found = CocoResults(
        image_ids=np.array([row["image_id"] for row in rows], np.int64),
        category_ids=np.array([row["category_id"] for row in rows], np.int64),
        boxes=np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row["score"] for row in rows], np.float64),
    )
    names = Categories(tuple(c["name"] for c in categories), tuple(c["id"] for c in categories))
    return coco_scores(truth, found, "bbox", names)["AP"] or 0.0
