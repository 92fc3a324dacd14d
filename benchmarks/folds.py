"""Splits of a small COCO folder: its own, or cross-validation over all its pictures; all categories or some."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perpixel.data.coco import find_in_folder

Coco = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Split:
    """Annotation files of one split; file names in them are relative to `images`.

    Args:
        name: "fold 0", …
        images: folder.
        train, val: COCO files.
        pictures, objects: in `val`, crowds not counted.
        digest: of the contents of both files.
    """

    name: str
    images: Path
    train: Path
    val: Path
    pictures: int
    objects: int
    digest: str


def own_split(data: Path, out: Path, categories: Sequence[str]) -> Split:
    """The folder's own train and val pictures."""
    return _write("own split", data, out, read(data, ["train"], categories), read(data, ["val"], categories))


def cross_validation(
    data: Path, out: Path, count: int, categories: Sequence[str], *, parts: Sequence[str] = ("train", "val")
) -> list[Split]:
    """`count` folds over all pictures of the named parts, dealt out at random with a fixed seed.

    Args:
        data: COCO folder.
        out: annotation files of the folds are written here.
        count: of folds.
        categories: names to keep; empty: all. Pictures without them stay, as negatives.
        parts: "train", "val" or both.
    """
    everything = read(data, parts, categories)
    if not 2 <= count <= len(everything["images"]):
        raise SystemExit(f"--folds: expected 2 to {len(everything['images'])} folds, got {count}")
    pictures = sorted(everything["images"], key=lambda image: image["file_name"])
    random.Random(0).shuffle(pictures)
    splits = []
    for fold in range(count):
        held_out = {image["id"] for image in pictures[fold::count]}
        rest = {image["id"] for image in pictures} - held_out
        splits.append(_write(f"fold {fold}", data, out, _only(everything, rest), _only(everything, held_out)))
    return splits


def read(data: Path, parts: Sequence[str], categories: Sequence[str]) -> Coco:
    """Pictures and annotations of the named parts with the named categories, numbered anew; file names are relative
    to `data`."""
    found: Coco = {"images": [], "annotations": [], "categories": []}
    for part in parts:
        folder, file = find_in_folder(data, part)
        content = json.loads(file.read_text(encoding="utf-8"))
        kept = [c for c in content["categories"] if not categories or c["name"] in categories]
        if lacking := set(categories) - {c["name"] for c in kept}:
            raise SystemExit(f"{file}: has no categories {sorted(lacking)}")
        found["categories"] = kept
        ids = {category["id"] for category in kept}
        numbers = {image["id"]: len(found["images"]) + i for i, image in enumerate(content["images"], 1)}
        for image in content["images"]:
            name = os.path.relpath(folder / image["file_name"], data)
            found["images"].append({**image, "id": numbers[image["id"]], "file_name": name})
        for annotation in content["annotations"]:
            if annotation["category_id"] in ids:
                number, owner = len(found["annotations"]) + 1, numbers[annotation["image_id"]]
                found["annotations"].append({**annotation, "id": number, "image_id": owner})
    return found


def _only(content: Coco, ids: set[int]) -> Coco:
    return {
        "images": [image for image in content["images"] if image["id"] in ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] in ids],
        "categories": content["categories"],
    }


def _write(name: str, data: Path, out: Path, train: Coco, val: Coco) -> Split:
    texts = {kind: json.dumps(content) for kind, content in (("train", train), ("val", val))}
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:12]
    folder = out / digest
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in texts.items():
        (folder / f"{kind}.json").write_text(text, encoding="utf-8")
    objects = sum(not a.get("iscrowd") for a in val["annotations"])
    return Split(name, data, folder / "train.json", folder / "val.json", len(val["images"]), objects, digest)
