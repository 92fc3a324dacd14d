"""Polygons and run-length codes: kept in a few flat arrays, drawn at the size and stride that training asks for."""

from collections.abc import Sequence
from typing import Any

import hotcoco.mask
import numpy as np
import numpy.typing as npt

from perpixel.data.transforms import View
from perpixel.structures import Size

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]


class Segmentations:
    """Outlines of N objects in the frame of their pictures.

    Polygon coordinates lie in one array, so a data set of millions of points costs 8 bytes a number and forked
    loader processes share it; run-length codes are compressed text.

    Args:
        segmentations: a list of polygons, a run-length dict (compressed or not), or None; one per object. They have
            passed `defects.mask_problem`.
        sizes: (H, W) in px of the picture of each object.
    """

    def __init__(self, segmentations: Sequence[Any], sizes: Sequence[Size]) -> None:
        polygons: list[list[float]] = []
        self._first_polygon = np.zeros(len(segmentations) + 1, np.int64)
        self._codes: dict[int, dict[str, Any]] = {}
        for row, (outline, size) in enumerate(zip(segmentations, sizes, strict=True)):
            if isinstance(outline, dict):
                self._codes[row] = hotcoco.mask.frPyObjects(outline, *size)
            elif outline:
                polygons += outline
            self._first_polygon[row + 1] = len(polygons)
        lengths = [len(p) // 2 for p in polygons]
        self._first_point = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._points = np.fromiter((v for p in polygons for v in p), np.float64, 2 * sum(lengths)).reshape(-1, 2)

    def known(self, row: int) -> bool:
        """Whether the object has an outline at all."""
        return row in self._codes or bool(self._first_polygon[row + 1] > self._first_polygon[row])

    def draw(self, row: int, view: View, stride: int) -> tuple[Bools, Floats | None]:
        """One object as bool [ceil((H - s // 2) / s), ...], the pixels [s // 2 :: s] of its full-size drawing.

        Also its center of mass xy in px of the view, from the full-size drawing; None where nothing is visible.
        """
        if row in self._codes:
            return _draw_code(self._codes[row], view, stride)
        bounds = range(self._first_polygon[row], self._first_polygon[row + 1])
        parts = [self._points[self._first_point[i] : self._first_point[i + 1]] for i in bounds]
        return _draw_polygons([view.points(part) for part in parts], view.size, stride)


def _sampled_shape(size: Size, stride: int) -> tuple[int, int]:
    return len(range(stride // 2, size[0], stride)), len(range(stride // 2, size[1], stride))


def _draw_polygons(parts: list[Floats], size: Size, stride: int) -> tuple[Bools, Floats | None]:
    """Drawn in the window that the polygons touch; its corner is a multiple of the stride, so samples stay aligned."""
    sampled = np.zeros(_sampled_shape(size, stride), dtype=bool)
    corners = np.concatenate(parts)
    limits = np.array([size[1], size[0]])
    low = np.clip(np.floor(corners.min(0)), 0, limits).astype(int) // stride * stride
    high = np.clip(np.ceil(corners.max(0)) + 1, 0, limits).astype(int)
    width, height = (high - low).tolist()
    if width <= 0 or height <= 0:
        return sampled, None
    # COCO's drawing rounds coordinates to fifths of a pixel; rounded before they move, they give the same pixels.
    moved = [np.where(low > 0, np.floor(part * 5 + 0.5) / 5 - low, part) for part in parts]
    codes = hotcoco.mask.frPyObjects([part.ravel().tolist() for part in moved], height, width)
    window = hotcoco.mask.decode(hotcoco.mask.merge(codes))
    small = window[stride // 2 :: stride, stride // 2 :: stride]
    top, left = low[1] // stride, low[0] // stride
    sampled[top : top + small.shape[0], left : left + small.shape[1]] = small
    center = _mass_center(window)
    return sampled, None if center is None else (center + low).astype(np.float32)


def _draw_code(code: dict[str, Any], view: View, stride: int) -> tuple[Bools, Floats | None]:
    stored = hotcoco.mask.decode(code)
    rows, columns = view.stored_indices(stride)
    sampled = stored[rows][:, columns].astype(bool)
    top, left, height, width = view.crop
    center = _mass_center(stored[top : top + height, left : left + width])
    return sampled, None if center is None else view.points(center + np.array([left, top])).astype(np.float32)


def _mass_center(raster: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64] | None:
    """Mean xy of the pixel centers that are set, px; None where none is."""
    columns, rows = raster.sum(0, dtype=np.int64), raster.sum(1, dtype=np.int64)
    total = int(rows.sum())
    if not total:
        return None
    x = columns @ np.arange(len(columns)) / total
    y = rows @ np.arange(len(rows)) / total
    return np.array([x + 0.5, y + 0.5])
