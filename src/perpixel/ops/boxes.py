"""Boxes (xyxy) and distances from a point to their left, top, right and bottom sides (ltrb)."""

from __future__ import annotations

import torch
from torch import Tensor

from perpixel.structures import Size


def boxes_from_ltrb(points: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes [..., 4] from points [..., 2] and distances [..., 4] in the same unit."""
    return torch.cat([points - ltrb[..., :2], points + ltrb[..., 2:]], dim=-1)


def ltrb_from_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances [..., 4] from points [..., 2] to the sides of boxes [..., 4]; positive inside (eq. 3.1 without 1/s)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def box_areas(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def rescale_boxes(boxes: Tensor, size: Size, output_size: Size) -> Tensor:
    """Boxes [N, 4] of a frame `size` moved to the frame `output_size` and clipped to it."""
    (height, width), (out_height, out_width) = size, output_size
    scale = boxes.new_tensor([out_width / width, out_height / height]).repeat(2)
    limit = boxes.new_tensor([out_width, out_height]).repeat(2)
    return torch.minimum((boxes * scale).clamp(min=0), limit)


def centerness_of(ltrb: Tensor) -> Tensor:
    """Center-ness [...] of distances [..., 4], in any unit (eq. 3.3); 0 outside of the box and on its border."""
    left, top, right, bottom = ltrb.clamp(min=0).unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-9)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-9)
    return (horizontal * vertical).sqrt()
