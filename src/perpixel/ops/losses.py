"""Losses of dense prediction, as pure functions. All of them compute in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss_sum(logits: Tensor, valid: Tensor, positives: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss summed over all valid locations and all classes (eq. 3.2, first term, without 1/N).

    Every entry is first counted as background; the few positive entries are then corrected, so that no one-hot
    target of the size of the logits is ever made.

    Args:
        logits: [B, L, C].
        valid: bool [B, L]; False takes a location out of the sum (ignore regions).
        positives: int64 [P] flat indices into the logits where the target is 1, each at a valid location.
        alpha, gamma: balance and focusing parameters.

    Returns:
        a scalar.
    """
    logits = logits.float()
    background = _focal_term(logits, gamma) * (1 - alpha)
    chosen = logits.flatten()[positives]
    correction = alpha * _focal_term(-chosen, gamma) - (1 - alpha) * _focal_term(chosen, gamma)
    return (background.sum(-1) * valid).sum() + correction.sum()


def _focal_term(logits: Tensor, gamma: float) -> Tensor:
    """p^gamma (-log(1 - p)) with p = sigmoid(logits): the price of a target 0."""
    return logits.sigmoid() ** gamma * F.softplus(logits)


class Overlap(NamedTuple):
    """IoU and GIoU [...] of pairs of boxes that share a location."""

    iou: Tensor
    giou: Tensor


def ltrb_overlap(predicted: Tensor, target: Tensor, smooth: float = 1.0) -> Overlap:
    """IoU and GIoU of pairs of boxes given as distances from one location, [..., 4] in strides.

    Args:
        smooth: added to intersection and union, in squared strides. The authors' release has 1, which gives an empty
            prediction a gradient; the text has 0. The enclosing term of the GIoU is not smoothed, as in the release.
    """
    small = torch.minimum(predicted, target)
    large = torch.maximum(predicted, target)
    intersection = (small[..., 0] + small[..., 2]) * (small[..., 1] + small[..., 3])
    union = _area(predicted) + _area(target) - intersection
    enclosing = (large[..., 0] + large[..., 2]) * (large[..., 1] + large[..., 3])
    iou = (intersection + smooth) / (union + smooth).clamp(min=1e-9)
    return Overlap(iou, iou - (enclosing - union) / enclosing.clamp(min=1e-9))


def _area(ltrb: Tensor) -> Tensor:
    return (ltrb[..., 0] + ltrb[..., 2]) * (ltrb[..., 1] + ltrb[..., 3])


def dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Dice loss [N] of N pictures, or lines, of probabilities [N, ...] against targets 0 or 1 [N, ...]."""
    p, t = probabilities.flatten(1), target.flatten(1).float()
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.sum(1) + 1e-5)


BOX_LOSSES: dict[str, Callable[[Overlap], Tensor]] = {
    "iou": lambda overlap: -overlap.iou.clamp(min=1e-6).log(),
    "linear_iou": lambda overlap: 1 - overlap.iou,
    "giou": lambda overlap: 1 - overlap.giou,
}

QUALITY_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": lambda logits, target: F.binary_cross_entropy_with_logits(logits, target, reduction="sum"),
    "l1": lambda logits, target: (logits.sigmoid() - target).abs().sum(),
}
