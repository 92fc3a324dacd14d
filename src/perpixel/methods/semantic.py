"""The auxiliary semantic task of CondInst (section 5.2.3): which class is in each cell of the stride-8 map.

It shapes the features in training and is not run in inference. Letters: N objects, C classes, h w cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perpixel.distributed import mean_over_ranks
from perpixel.locations import make_grid
from perpixel.ops.losses import focal_loss_sum
from perpixel.ops.masks import CELL, known_masks, padded_masks
from perpixel.structures import Instances, Size

PRIOR = 0.01  # probability that it starts with everywhere


def class_logits(channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer: features to logits of every class."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.constant_(conv.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
    return conv


def semantic_loss(logits: Tensor, targets: Sequence[Instances]) -> Tensor:
    """Focal loss over all known cells and classes of a batch, over the number of cells that an object is in.

    Args:
        logits: float32 [B, C, h, w].
        targets: truth of each image.
    """
    shape = (int(logits.shape[2]), int(logits.shape[3]))
    pairs = [semantic_target(t, shape) for t in targets]
    labels, valid = (torch.stack(maps).flatten(1).to(logits.device) for maps in zip(*pairs, strict=True))
    image, cell = (labels >= 0).nonzero(as_tuple=True)
    flat = logits.flatten(2).transpose(1, 2)  # [B, h w, C]
    positives = (image * flat.shape[1] + cell) * flat.shape[2] + labels[image, cell]
    count = mean_over_ranks((labels >= 0).sum().float()).clamp(min=1)
    return focal_loss_sum(flat, valid, positives) / count


def semantic_target(instances: Instances, shape: Size) -> tuple[Tensor, Tensor]:
    """The class of every cell, int64 [h, w], -1 for none, and which cells are known, bool [h, w].

    Of several objects the one with the smallest mask wins. Where an ignored object or one without a mask may lie,
    nothing is known unless a mask says so.
    """
    known = known_masks(instances) & ~instances.ignore
    masks = padded_masks(instances, CELL, shape) & known[:, None, None]
    nothing = shape[0] * shape[1] + 1  # more than any area
    area = torch.where(masks, masks.sum(dim=(1, 2), keepdim=True), nothing + 1)
    price = torch.cat([area, torch.full((1, *shape), nothing, device=area.device)])
    labels = torch.cat([instances.labels, instances.labels.new_full((1,), -1)])[price.argmin(dim=0)]
    boxes = instances.boxes[~known]
    points = make_grid([shape], [CELL], boxes.device).points.view(*shape, 1, 2)
    hidden = ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(-1).any(-1)
    return labels, (labels >= 0) | ~hidden
