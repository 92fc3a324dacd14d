"""Small COCO folders, written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_entries import Entry
from PIL import Image

Write = Callable[..., Path]


@pytest.fixture
def write_split(tmp_path: Path) -> Write:
    """Writes pictures of given sizes {id: (H, W)} and an annotation file; returns the folder of the data set."""

    def write(
        sizes: dict[int, tuple[int, int]],
        annotations: list[Entry],
        categories: list[Entry] | None = None,
        *,
        split: str = "train",
        kind: str = "instances",
        root: Path = tmp_path / "data",
    ) -> Path:
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = []
        for identity, (height, width) in sizes.items():
            pixels = np.random.default_rng(identity).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{identity}.png")
            images.append({"id": identity, "file_name": f"{identity}.png", "height": height, "width": width})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": categories or [{"id": 3, "name": "cat"}, {"id": 0, "name": "dog"}],
        }
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
        return root

    return write


@pytest.fixture
def change() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Edits a JSON file in place."""

    def edit(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(file.read_text())
        how(content)
        file.write_text(json.dumps(content))

    return edit
