"""Classes of a COCO file with their keypoints: names, mirror pairs, limbs and sigmas."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perpixel.data.defects import Entry, category_problems
from perpixel.errors import DataError
from perpixel.structures import Categories, Skeleton

# Of the 17 points of a person in COCO, nose to ankles. Other skeletons may bring "sigmas"; without, 1 / K for each.
COCO_SIGMAS = tuple(s / 1000 for s in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89))


def read_categories(entries: list[Entry], file: Path) -> Categories:
    """The classes of a COCO file, ordered by id; skeletons where it names keypoints.

    Raises:
        DataError: ids repeat, or entries have no id or name.
    """
    for problem in category_problems(entries):
        raise DataError(f"{file}: {problem}; fix the list of categories")
    ordered = sorted(entries, key=lambda entry: entry["id"])
    skeletons = tuple(_skeleton(entry) for entry in ordered)
    return Categories(
        tuple(entry["name"] for entry in ordered),
        tuple(entry["id"] for entry in ordered),
        skeletons if any(skeletons) else None,
    )


def keypoint_counts(entries: list[Entry]) -> dict[Any, int]:
    """Number of keypoints of every category, by id."""
    return {entry["id"]: len(entry.get("keypoints") or []) for entry in entries}


def _skeleton(category: Entry) -> Skeleton | None:
    names = tuple(str(name) for name in category.get("keypoints") or [])
    if not names:
        return None
    usual = COCO_SIGMAS if len(names) == len(COCO_SIGMAS) else [1 / len(names)] * len(names)
    return Skeleton(
        names=names,
        pairs=mirror_pairs(names),
        limbs=tuple((int(a) - 1, int(b) - 1) for a, b in category.get("skeleton") or []),  # COCO counts from 1
        sigmas=tuple(float(s) for s in category.get("sigmas") or usual),
    )


def mirror_pairs(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Index pairs of keypoints whose names differ in left and right alone: "left_eye" and "right_eye", "l-ear" and
    "r-ear"."""
    position = {name.lower(): i for i, name in enumerate(names)}
    pairs = []
    for name, i in position.items():
        words = name.replace("-", "_").replace(" ", "_").split("_")
        for left, right in (("left", "right"), ("l", "r")):
            if left in words:
                separator = next((s for s in "_- " if s in name), "_")
                partner = separator.join(right if word == left else word for word in words)
                if partner in position:
                    pairs.append((i, position[partner]))
    return tuple(pairs)


def mirror_partners(categories: Categories, count: int) -> npt.NDArray[np.int64]:
    """[C, K]: which keypoint of a class takes the place of keypoint k in a mirror image."""
    partners = np.tile(np.arange(count), (len(categories), 1))
    for row, skeleton in zip(partners, categories.skeletons or (), strict=False):
        for left, right in skeleton.pairs if skeleton is not None else ():
            row[left], row[right] = right, left
    return partners
