"""Masks of a view: pycocotools draws the truth at full size, ours are its samples."""

import numpy as np
import pytest
from pycocotools import mask as reference

from perpixel.data.masks import Segmentations
from perpixel.data.transforms import View

SIZE = (60, 80)
STAR = [
    40.3,
    3.1,
    48.2,
    25.7,
    75.9,
    25.2,
    52.6,
    38.4,
    61.0,
    58.9,
    40.1,
    45.5,
    18.8,
    58.2,
    28.1,
    37.6,
    4.4,
    24.9,
    32.0,
    25.3,
]
VIEWS = [
    View.whole(SIZE),
    View.whole(SIZE, (150, 200)),
    View(SIZE, (0, 0, 60, 80), (90, 120), mirrored=True),
    View(SIZE, (10, 20, 40, 51), (80, 102), mirrored=True),
]


def drawn(polygons: list[list[float]], view: View) -> np.ndarray:
    """The polygons moved by the view and drawn by the reference on the whole frame."""
    moved = [view.points(np.array(p).reshape(-1, 2)).ravel().tolist() for p in polygons]
    codes = reference.frPyObjects(moved, *view.size)
    return reference.decode(reference.merge(codes)).astype(bool)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_polygons_are_samples_of_the_full_size_drawing(view: View, stride: int) -> None:
    second = [2.0, 2.0, 9.5, 2.0, 9.5, 30.0, 2.0, 30.0]
    beyond = [60.0, 40.0, 120.0, 40.0, 120.0, 90.0, 60.0, 90.0]
    outlines = Segmentations([[STAR], [STAR, second], None, [beyond]], [SIZE] * 4)
    assert [outlines.known(i) for i in range(4)] == [True, True, False, True]
    for row, polygons in ((0, [STAR]), (1, [STAR, second]), (3, [beyond])):
        mask, center = outlines.draw(row, view, stride)
        full = drawn(polygons, view)
        assert np.array_equal(mask, full[stride // 2 :: stride, stride // 2 :: stride])
        rows, columns = np.nonzero(full)
        assert center is not None
        assert center.tolist() == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=1e-3)


def test_a_polygon_outside_the_view_draws_nothing() -> None:
    outlines = Segmentations([[[0.0, 0.0, 8.0, 0.0, 8.0, 8.0]]], [SIZE])
    mask, center = outlines.draw(0, View(SIZE, (30, 40, 20, 20), (40, 40)), 4)
    assert mask.shape == (10, 10)
    assert not mask.any()
    assert center is None


def forms(mask: np.ndarray) -> list[dict[str, object]]:
    """A mask as compressed and as uncompressed run lengths."""
    code = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [
        {"size": list(mask.shape), "counts": code["counts"].decode()},
        {"size": list(mask.shape), "counts": counts},
    ]


@pytest.mark.parametrize("form", [0, 1])
def test_run_lengths_survive_resizing_crops_and_mirrors(form: int) -> None:
    mask = drawn([STAR], View.whole(SIZE))
    outlines = Segmentations([forms(mask)[form]], [SIZE])
    whole, center = outlines.draw(0, View.whole(SIZE), 1)
    assert np.array_equal(whole, mask)
    rows, columns = np.nonzero(mask)
    assert center is not None
    assert center.tolist() == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=1e-4)
    mirrored, _ = outlines.draw(0, View(SIZE, (0, 0, *SIZE), SIZE, mirrored=True), 1)
    assert np.array_equal(mirrored, mask[:, ::-1])
    doubled, _ = outlines.draw(0, View(SIZE, (10, 20, 40, 50), (80, 100)), 1)
    assert np.array_equal(doubled, mask[10:50, 20:70].repeat(2, 0).repeat(2, 1))
    sampled, _ = outlines.draw(0, View.whole(SIZE, (120, 160)), 4)
    assert np.array_equal(sampled, mask.repeat(2, 0).repeat(2, 1)[2::4, 2::4])
    nothing, absent = outlines.draw(0, View(SIZE, (0, 0, 4, 4), (40, 40)), 4)
    assert not nothing.any()
    assert absent is None
