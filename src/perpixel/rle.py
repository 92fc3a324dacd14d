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
    rles = hotcoco.mask.encode(columns.view(np.uint8).transpose(2, 1, 0))
    return [{"size": [int(v) for v in rle["size"]], "counts": _text(rle["counts"])} for rle in rles]


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


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
