"""Non-maximum suppression over a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Greedy NMS within each group (an image and a class).

    Groups are moved apart and suppressed in one call. Offsets are added in float64, where they cost no precision
    (float32 would round a box of the 80th class by up to 1/128 px).

    Args:
        boxes: [N, 4] xyxy, px.
        scores: [N].
        groups: int64 [N]; only boxes of one group suppress each other.
        threshold: IoU above which the lower score of two boxes is dropped.

    Returns:
        int64 indices of the kept rows, best score first.
    """
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    boxes = boxes.double()
    extent = boxes.max() - boxes.min() + 1
    return nms(boxes + (groups * extent)[:, None], scores.double(), threshold)


def mask_nms(masks: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Greedy NMS by the IoU of masks within each group.

    Args:
        masks: bool [N, H, W].
        scores: [N].
        groups: int64 [N]; only masks of one group suppress each other.
        threshold: IoU above which the lower score of two masks is dropped.

    Returns:
        int64 indices of the kept rows, best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    flat, groups = masks[order].flatten(1).float(), groups[order]
    shared = flat @ flat.T  # [N, N] px; whole numbers, exact in float32 up to 16 million
    area = flat.sum(1)
    union = (area[:, None] + area - shared).clamp(min=1)
    rivals = ((shared / union > threshold) & (groups[:, None] == groups)).triu(1).cpu()
    keep = torch.ones(len(order), dtype=torch.bool)
    for row in range(len(order)):
        if keep[row]:
            keep &= ~rivals[row]
    return order[keep.to(order.device)]


def top_per_group(scores: Tensor, groups: Tensor, limit: int) -> Tensor:
    """Indices of the best `limit` rows of every group, groups in ascending order, best first within each."""
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    return order[rank_in_group(groups[order]) < limit]


def rank_in_group(groups: Tensor) -> Tensor:
    """Position 0, 1, … of every row within its run of equal values; `groups` [N] is sorted."""
    position = torch.arange(len(groups), device=groups.device)
    starts = torch.ones_like(groups, dtype=torch.bool)
    starts[1:] = groups[1:] != groups[:-1]
    return position - torch.where(starts, position, 0).cummax(0).values if len(groups) else position
