"""The grid: which place in the network's input every location of the pyramid stands for.

Cell (x, y) of a level with stride s is the point (s//2 + x s, s//2 + y s) in pixels (section 3.2.1). Flat order
everywhere: level (P3 first), row, column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perpixel.structures import Size


class Grid(NamedTuple):
    """All locations of one padded input size.

    Args:
        points: float32 [L, 2] xy, px.
        level: int64 [L], 0 for the finest level.
    """

    points: Tensor
    level: Tensor


def make_grid(shapes: Sequence[Size], strides: Sequence[int], device: torch.device | str = "cpu") -> Grid:
    """Points and levels of pyramid maps of the given (H, W), one shape and one stride in px a level."""
    points, levels = [], []
    for index, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        xs = torch.arange(width, device=device, dtype=torch.float32) * stride + stride // 2
        ys = torch.arange(height, device=device, dtype=torch.float32) * stride + stride // 2
        points.append(torch.stack([xs.repeat(height), ys.repeat_interleave(width)], dim=1))
        levels.append(torch.full((height * width,), index, dtype=torch.int64, device=device))
    return Grid(torch.cat(points), torch.cat(levels))


def flatten(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, D, H_l, W_l] of all levels as one tensor [B, L, D]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
