"""Masks as COCO's compressed run-length encoding, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hotcoco.mask
import numpy as np
import torch
from torch import Tensor

from perpixel.errors import ShapeError


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Compressed run lengths of every mask.

    Args:
        masks: bool [N, H, W].

    Returns:
        N dicts {"size": [H, W], "counts": str}, as COCO's result files have them.

    Raises:
        ShapeError: `masks` has another shape or dtype.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ShapeError(f"rle.encode: expected a torch.bool tensor [N, H, W], got {masks.dtype} {list(masks.shape)}")
    if not len(masks):
        return []
    # Runs go down the columns, and the encoder reads [H, W, N] in that order: N contiguous [W, H] pictures.
    columns = masks.detach().cpu().transpose(1, 2).contiguous().numpy()
    rles: Any = hotcoco.mask.encode(columns.view(np.uint8).transpose(2, 1, 0))
    return [{"size": [int(v) for v in rle["size"]], "counts": _text(rle["counts"])} for rle in rles]


def encode_window(mask: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Compressed run lengths of a mask that is empty outside of a window, without drawing the whole of it.

    Args:
        mask: bool [h, w], the window.
        corner: row and column of its first pixel.
        size: (H, W) px of the whole.
    """
    columns = mask.detach().T.cpu().numpy()
    # One zero after each column: no run goes on into the next one, and starts and ends alternate.
    padded = np.zeros((columns.shape[0], columns.shape[1] + 1), dtype=np.int8)
    padded[:, :-1] = columns
    column, row = np.divmod(np.flatnonzero(np.diff(padded.ravel(), prepend=0)), padded.shape[1])
    places = (corner[1] + column) * size[0] + corner[0] + row
    apart = places[1:-1:2] != places[2::2]  # a run that goes on at the top of the next column is one run
    keep = np.ones(len(places), dtype=bool)
    keep[1:-1:2], keep[2::2] = apart, apart
    places = np.unique(np.append(places[keep], size[0] * size[1]))  # a run to the very end is followed by none
    counts = np.diff(places, prepend=0)
    rle: Any = hotcoco.mask.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": _text(rle["counts"])}


def decode(rles: Sequence[dict[str, Any]], size: tuple[int, int] | None = None) -> Tensor:
    """Masks bool [N, H, W] of N run-length dicts, compressed or not.

    Args:
        rles: dicts of one size.
        size: (H, W) px; needed where `rles` is empty.

    Raises:
        ShapeError: sizes differ, or `rles` is empty and no size is given.
    """
    sizes = {tuple(rle["size"]) for rle in rles} | ({size} if size is not None else set())
    if len(sizes) != 1:
        raise ShapeError(f"rle.decode: expected masks of one size, got {sorted(sizes)}; decode them one by one")
    if not rles:
        return torch.zeros((0, *next(iter(sizes))), dtype=torch.bool)
    stack = hotcoco.mask.decode(list(rles))  # [H, W, N], column by column
    return torch.from_numpy(np.ascontiguousarray(stack.transpose(2, 0, 1))).bool()


def boxes_of(rles: Sequence[dict[str, Any]]) -> Tensor:
    """Boxes float32 [N, 4] xyxy px around the pixels of N compressed run-length dicts."""
    if not rles:
        return torch.zeros(0, 4)
    boxes = torch.from_numpy(np.asarray(hotcoco.mask.toBbox(list(rles)), dtype=np.float32)).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
