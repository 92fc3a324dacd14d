"""FCOS (chapter 3): the distances from a location to the four sides of its object's box.

Letters: B images, L locations, P positives. `ltrb` is in strides of the location's level (eq. 3.1) and float32 in
every precision. The layer's output is scaled by a learnt number per level and passed through a ReLU; the release does
the same.

Where this differs from the release: training starts from boxes of a sensible size. With weights near zero and bias
0, as in the release, all boxes start empty and half of the units dead, and a run of minutes never recovers;
`start=0` is the release's way. The bias is part of the weights, so converted weights are not touched.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from perpixel.config import Config
from perpixel.distributed import mean_over_ranks
from perpixel.locations import flatten
from perpixel.methods.detector import Features, Frame, Logs, Survivors, Targets
from perpixel.nn.heads import prediction
from perpixel.ops.boxes import boxes_from_ltrb
from perpixel.ops.losses import BOX_LOSSES, ltrb_overlap
from perpixel.structures import Batch, Outputs, Progress


class BoxConfig(Config):
    """Args:
    loss: a key of BOX_LOSSES.
    smooth: added to intersection and union, in squared strides: 1 in the release, 0 in the text.
    weighting: positives count by their "centerness" (release and text's code), or all the same ("none").
    weight: of the term (lambda of eq. 3.2).
    start: distances that an untrained network predicts, in strides; about the middle of a level's range.
    """

    loss: Literal["iou", "linear_iou", "giou"] = "giou"
    smooth: float = 1.0
    weighting: Literal["centerness", "none"] = "centerness"
    weight: float = 1.0
    start: float = 4.0


class BoxBranch(nn.Module):
    """Boxes at every location.

    Args:
        channels: width of the box tower.
        strides: px, one a level.
    """

    strides: Tensor

    def __init__(self, channels: int, strides: tuple[int, ...], config: BoxConfig) -> None:
        super().__init__()
        self.config = config
        self.ltrb = prediction(channels, 4, bias=config.start)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        self.register_buffer("strides", torch.tensor(strides, dtype=torch.float32), persistent=False)

    def forward(self, features: Features, *, auxiliary: bool) -> dict[str, Any]:
        with torch.autocast(features.box_tower[0].device.type, enabled=False):
            raw = [self.ltrb(x.float()) * self.scales[level] for level, x in enumerate(features.box_tower)]
        return {"ltrb": flatten(raw).relu()}  # [B, L, 4]

    def boxes(self, outputs: Outputs, image: Tensor, location: Tensor) -> Tensor:
        """Boxes [S, 4] xyxy, px of the network's input, at chosen locations; not clipped."""
        assert outputs.ltrb is not None
        ltrb = outputs.ltrb[image, location] * self.strides[outputs.level[location], None]
        return boxes_from_ltrb(outputs.points[location], ltrb)

    def loss(
        self, outputs: Outputs, targets: Targets, batch: Batch, progress: Progress, logs: Logs
    ) -> dict[str, Tensor]:
        """`box`: the regression term of eq. 3.2 over the positive locations."""
        assert outputs.ltrb is not None
        a, config = targets.assignment, self.config
        overlap = ltrb_overlap(outputs.ltrb[a.image, a.location], targets.ltrb, config.smooth)
        price = BOX_LOSSES[config.loss](overlap)  # [P]
        logs["iou"] = overlap.iou.detach().sum() / targets.positives
        if config.weighting == "centerness":
            total = mean_over_ranks(targets.centerness.sum()).clamp(min=1e-6)
            return {"box": config.weight * (price * targets.centerness).sum() / total}
        return {"box": config.weight * price.sum() / targets.positives}

    def decode(self, outputs: Outputs, survivors: Survivors, frame: Frame) -> dict[str, Any]:
        """Nothing to add: the survivors' boxes are this branch's."""
        return {}
