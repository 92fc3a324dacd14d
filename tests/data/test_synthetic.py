"""The synthetic set keeps its promises: exact, varied, crowded, and the same for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from perpixel.data.synthetic import CLASSES, LARGEST, SHAPES, SMALLEST, Scene, draw_scene, write_synthetic
from perpixel.errors import DataError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng([7, i]), 384) for i in range(50)]


def test_every_picture_has_5_to_15_objects_of_at_least_4_classes(scenes: list[Scene]) -> None:
    counts = [len(scene.labels) for scene in scenes]
    assert 5 <= min(counts) <= max(counts) <= 15
    assert len({label for scene in scenes for label in scene.labels}) == len(CLASSES) >= 4


def test_more_than_a_fifth_of_the_objects_overlap(scenes: list[Scene]) -> None:
    assert np.mean([t for scene in scenes for t in scene.touching]) > 0.2


def test_nothing_is_hidden_by_more_than_three_fifths(scenes: list[Scene]) -> None:
    for scene in scenes:
        visible = scene.masks.sum((1, 2)) / np.array(scene.full_areas)
        assert visible.min() >= 0.4
        assert visible.max() <= 1
    hidden = np.concatenate([s.masks.sum((1, 2)) < np.array(s.full_areas) for s in scenes])
    assert hidden.mean() > 0.1  # some are hidden in part


def test_masks_never_share_a_pixel(scenes: list[Scene]) -> None:
    assert max(scene.masks.sum(0).max() for scene in scenes) == 1


def test_colors_change_at_the_edge_of_the_mask_and_not_beside_it(scenes: list[Scene]) -> None:
    def step(image: np.ndarray, mask: np.ndarray) -> float:
        """Mean change of color between horizontal neighbors of which the mask holds one."""
        edge = mask[:, 1:] != mask[:, :-1]
        change = np.abs(np.diff(image.astype(int), axis=1)).mean(-1)
        return float(change[edge].mean())

    pairs = [(step(s.image, mask), step(s.image, np.roll(mask, 3, axis=1))) for s in scenes[:12] for mask in s.masks]
    at_edge, beside = np.array(pairs).T
    assert np.median(at_edge) > 2 * np.median(beside)
    assert (at_edge > beside).mean() > 0.9


@pytest.mark.parametrize("label", range(len(CLASSES)))
@pytest.mark.parametrize("side", [16, 41, 256])
def test_shapes_are_tight_and_of_the_size_asked_for(label: int, side: int) -> None:
    for seed in range(5):
        mask = SHAPES[label](side, np.random.default_rng(seed))
        assert mask.any(1)[[0, -1]].all()
        assert mask.any(0)[[0, -1]].all()
        assert 0.7 * side <= max(mask.shape) <= side  # a crescent may be smaller than its disc


def test_star_and_crescent_are_concave_and_square_is_not() -> None:
    def filled(name: str) -> float:
        """Part of the convex hull (over rows and columns) that the shape fills."""
        mask = SHAPES[CLASSES.index(name)](200, np.random.default_rng(3))
        hull = mask.copy()
        for axis in (0, 1):
            for line in np.moveaxis(hull, axis, 0):
                used = np.flatnonzero(line)
                if used.size:
                    line[used[0] : used[-1] + 1] = True
        return float(mask.sum() / hull.sum())

    assert filled("square") > 0.97
    assert filled("disc") > 0.99
    assert filled("star") < 0.9
    assert filled("crescent") < 0.8


def test_written_boxes_and_masks_are_exact(tmp_path: Path) -> None:
    root = write_synthetic(tmp_path / "set", train=3, val=2, seed=5, size=256)
    for split, number, count in (("train", 0, 3), ("val", 1, 2)):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        assert len(content["images"]) == count == len(list((root / split).iterdir()))
        assert [c["name"] for c in content["categories"]] == list(CLASSES)
        assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
        for index, image in enumerate(content["images"]):
            scene = draw_scene(np.random.default_rng([5, number, index]), 256)
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [a["category_id"] - 1 for a in mine] == scene.labels
            for annotation, mask in zip(mine, scene.masks, strict=True):
                assert np.array_equal(reference.decode(annotation["segmentation"]), mask)
                rows, columns = np.nonzero(mask)
                x, y, w, h = annotation["bbox"]
                assert (x, y) == (columns.min(), rows.min())
                assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
                assert annotation["area"] == mask.sum()
            stored = Image.open(root / split / image["file_name"])
            assert stored.size == (image["width"], image["height"])


def test_sizes_span_16_to_256_px() -> None:
    longer = []
    for i in range(60):
        scene = draw_scene(np.random.default_rng([1, i]), 512)
        for mask, area in zip(scene.masks, scene.full_areas, strict=True):
            if mask.sum() == area:  # seen in whole
                rows, columns = np.nonzero(mask)
                longer.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(longer) >= 0.7 * SMALLEST
    assert min(longer) < 24
    assert 180 < max(longer) <= LARGEST


def test_same_seed_same_set_and_a_longer_set_begins_with_the_shorter(tmp_path: Path) -> None:
    a = write_synthetic(tmp_path / "a", train=2, val=1, seed=1, size=192)
    b = write_synthetic(tmp_path / "b", train=3, val=1, seed=1, size=192)
    c = write_synthetic(tmp_path / "c", train=2, val=1, seed=2, size=192)
    for name in ("000000.jpg", "000001.jpg"):
        assert (a / "train" / name).read_bytes() == (b / "train" / name).read_bytes()
        assert (a / "train" / name).read_bytes() != (c / "train" / name).read_bytes()
    assert (a / "train/000000.jpg").read_bytes() != (a / "val/000000.jpg").read_bytes()


def test_what_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 128 px, got 64"):
        write_synthetic(tmp_path, size=64)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the synthetic data"):
        write_synthetic(tmp_path / "file", train=1, val=1)
