"""One trunk and a tuple of branches: the network that every method of the thesis is an instance of.

The trunk (backbone, pyramid, towers, classification, center-ness) predicts at every location what is there and how
much its prediction can be trusted. Branches predict the rest: boxes, keypoints, masks. A branch adds fields to
`Outputs`, terms to the loss and fields to `Detections`, and knows nothing of the other branches.

Frame and units: images are raw RGB 0..255, padded at right and bottom; all coordinates are pixels of that frame,
`ltrb` is in strides of the level. Everything measured in pixels is float32 in every precision.

Where the text and the authors' release differ, the default is the release (its weights are what people load):
center-ness hangs on the box tower; the score threshold acts on the class alone (FCOS) or on the product (CondInst);
boxes are clipped after suppression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perpixel.assign import AssignConfig, Assignment, assign
from perpixel.config import Config
from perpixel.distributed import mean_over_ranks
from perpixel.errors import ShapeError
from perpixel.locations import flatten, make_grid
from perpixel.nn.backbones import Backbone, BackboneConfig
from perpixel.nn.heads import Head, HeadConfig
from perpixel.nn.pyramids import FPN, PyramidConfig
from perpixel.ops.boxes import centerness_of, ltrb_from_boxes, rescale_boxes
from perpixel.ops.losses import QUALITY_LOSSES, focal_loss_sum, ltrb_overlap
from perpixel.ops.nms import batched_nms, top_per_group
from perpixel.structures import Batch, Detections, Outputs, Progress, Size


class ClsConfig(Config):
    """Args:
    alpha, gamma: of the focal loss.
    normalizer: what its sum is divided by: "fg" positives (text), "moving_fg" their running mean, "all" locations.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    normalizer: Literal["fg", "moving_fg", "all"] = "fg"


class DecodeConfig(Config):
    """Args:
    score_threshold: lowest class score (or product) of a candidate.
    threshold_on: "class" score alone, or "product" of class score and quality.
    quality: multiplied with the class score: "predicted" by the branch, "from_box" computed from the predicted
        box (Table 3.4), or "none".
    pre_nms_top: candidates of an image and level that reach suppression.
    nms_threshold: IoU.
    max_detections: of an image.
    """

    score_threshold: float = 0.05
    threshold_on: Literal["class", "product"] = "class"
    quality: Literal["predicted", "from_box", "none"] = "predicted"
    pre_nms_top: int = 1000
    nms_threshold: float = 0.6
    max_detections: int = 100


class Features(NamedTuple):
    """What branches read: maps [B, D, H_l, W_l] of every level."""

    pyramid: list[Tensor]
    cls_tower: list[Tensor]
    box_tower: list[Tensor]


class Targets(NamedTuple):
    """What the positive locations of a batch should predict.

    Args:
        assignment: the object of every location; its `image`, `location`, `object` are [P].
        host: the same where the truth is, for those who plan their work by it without waiting for the device.
        labels: int64 [P].
        ltrb: float32 [P, 4], strides of the level (eq. 3.1).
        centerness: float32 [P] (eq. 3.3).
        positives: scalar, their number (mean over ranks), at least 1.
    """

    assignment: Assignment
    host: Assignment
    labels: Tensor
    ltrb: Tensor
    centerness: Tensor
    positives: Tensor


class Candidates(NamedTuple):
    """(location, class) pairs of a batch, [M] each, that suppression chooses from.

    Args:
        image, location, labels: int64.
        scores: float32.
    """

    image: Tensor
    location: Tensor
    labels: Tensor
    scores: Tensor

    def select(self, keep: Tensor) -> Candidates:
        return Candidates(*(field[keep] for field in self))


class Survivors(NamedTuple):
    """Candidates of one image that are left after suppression, best first.

    Args:
        image: index into the batch.
        location: int64 [S].
        labels: int64 [S].
        scores: float32 [S].
        boxes: float32 [S, 4] xyxy, px of the network's input, not clipped.
    """

    image: int
    location: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor

    def select(self, keep: Tensor) -> Survivors:
        return Survivors(self.image, *(field[keep] for field in self[1:]))


class Frame(NamedTuple):
    """How results of an image are wanted.

    Args:
        size: (H, W) of the image inside the network's input, px.
        output_size: (H, W) of the frame of the results, px.
        compact: fields that have a compressed form are wanted in it (masks as run lengths).
    """

    size: Size
    output_size: Size
    compact: bool = False


Logs = dict[str, Tensor]


class Branch(Protocol):
    """A task at every location."""

    def __call__(self, features: Features, *, auxiliary: bool) -> dict[str, Any]:
        """Dense fields of `Outputs`; the entries of `auxiliary` are added to those of the other branches."""

    def loss(
        self, outputs: Outputs, targets: Targets, batch: Batch, progress: Progress, logs: Logs
    ) -> dict[str, Tensor]:
        """Weighted terms of the objective."""

    def decode(self, outputs: Outputs, survivors: Survivors, frame: Frame) -> dict[str, Any]:
        """Fields of `Detections` in `frame.output_size`, one row a survivor."""


class BoxSource(Branch, Protocol):
    """A branch whose predictions give every location a box."""

    def boxes(self, outputs: Outputs, image: Tensor, location: Tensor) -> Tensor:
        """Boxes [S, 4] xyxy in px of the network's input at chosen (image, location) pairs."""


class Suppressor(Branch, Protocol):
    """A branch that tells duplicates apart without boxes."""

    def suppress(self, outputs: Outputs, candidates: Candidates, config: DecodeConfig) -> tuple[Tensor, Tensor]:
        """Indices of the candidates to keep, best first, and boxes [M, 4] of all of them in px of the input."""


CLS_NORMALIZERS: dict[str, Callable[[Detector, Targets, Outputs], Tensor]] = {
    "fg": lambda net, targets, outputs: targets.positives,
    "moving_fg": lambda net, targets, outputs: net.running_foreground(targets.positives),
    "all": lambda net, targets, outputs: targets.positives.new_tensor(outputs.logits[..., 0].numel()),
}


class Detector(nn.Module):
    """Trunk and branches (see the module's docstring). Its protocol is `forward`, `loss`, `decode`.

    Args:
        branches: by name; suppression works on the boxes of the first one that can tell boxes, or else is the business
            of the first one that can do without.

    Attributes:
        num_classes: C.
        strides: px, one a level.
        divisor: heights and widths are padded to multiples of this, px.
    """

    mean: Tensor
    std: Tensor
    foreground: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneConfig,
        pyramid: PyramidConfig,
        head: HeadConfig,
        assign: AssignConfig,
        cls: ClsConfig,
        decode: DecodeConfig,
        make_branches: Callable[[int, Sequence[int]], dict[str, nn.Module]],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head_config, self.assign_config, self.cls_config, self.decode_config = head, assign, cls, decode
        self.backbone = Backbone(backbone)
        self.divisor = self.backbone.strides[-1]
        self.pyramid = FPN(self.backbone.channels, self.backbone.strides, pyramid)
        self.strides = self.pyramid.strides
        self.head = Head(self.pyramid.channels, num_classes, len(self.strides), head)
        self.branches = nn.ModuleDict(make_branches(self.pyramid.channels, self.strides))
        self.flip_colors = backbone.order == "bgr"
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        if cls.normalizer == "moving_fg":
            self.register_buffer("foreground", torch.tensor(100.0))

    def forward(
        self, images: Tensor, sizes: Sequence[Size] | Tensor | None = None, *, auxiliary: bool = False
    ) -> Outputs:
        """Dense predictions.

        Args:
            images: uint8 or float [B, 3, H, W], RGB, 0..255; any height and width.
            sizes: (H, W) of the valid part of each image; None: all of it.
            auxiliary: also run what only training uses.

        Raises:
            ShapeError: `images` or `sizes` have another shape.
        """
        pyramid = self.pyramid(self.backbone(self.normalize(images, sizes)))
        features = Features(pyramid, *self.head.towers(pyramid))
        shapes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in pyramid)
        points, level = make_grid(shapes, self.strides, images.device)
        fields: dict[str, Any] = {"centerness": None, "ltrb": None}
        extra: dict[str, Tensor] = {}
        if self.head.centerness is not None:
            fields["centerness"] = flatten([self.head.centerness(x) for x in features.box_tower])[..., 0].float()
        for branch in self.tasks:
            fields.update(branch(features, auxiliary=auxiliary))
            extra.update(fields.pop("auxiliary", {}))
        logits = flatten([self.head.logits(x) for x in features.cls_tower]).float()
        return Outputs(logits=logits, points=points, level=level, shapes=shapes, auxiliary=extra, **fields)

    def normalize(self, images: Tensor, sizes: Sequence[Size] | Tensor | None) -> Tensor:
        """What the backbone sees: colors in its order, mean and std removed, then zero beyond `sizes` (so that padding
        has the mean color), padded to a multiple of the divisor."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images: expected [B, 3, H, W] RGB 0..255, got {list(images.shape)}")
        height, width = images.shape[-2:]
        x = images.flip(1) if self.flip_colors else images
        x = (x - self.mean) / self.std
        if sizes is not None:
            limits = torch.as_tensor(sizes, device=x.device)
            if limits.shape != (len(x), 2):
                raise ShapeError(f"sizes: expected {len(x)} pairs (H, W), got shape {list(limits.shape)}")
            rows = torch.arange(height, device=x.device) < limits[:, :1]  # [B, H]
            columns = torch.arange(width, device=x.device) < limits[:, 1:]  # [B, W]
            x = x * (rows[:, None, :, None] & columns[:, None, None, :])
        x = F.pad(x, (0, -width % self.divisor, 0, -height % self.divisor))
        return x.to(self.head.logits.weight.dtype)

    # Training

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress, logs: Logs | None = None) -> dict[str, Tensor]:
        """Weighted terms whose sum is the objective.

        Args:
            outputs: of `forward(..., auxiliary=True)` on `batch.images`.
            batch: truth in the frame of its images, on any device.
            progress: step, and fraction of the schedule.
            logs: filled with scalars that are worth seeing but are no part of the objective.
        """
        logs = {} if logs is None else logs
        targets = self.targets(outputs, batch)
        losses = {"cls": self._cls_loss(outputs, targets), **self._quality_loss(outputs, targets)}
        for branch in self.tasks:
            losses.update(branch.loss(outputs, targets, batch, progress, logs))
        logs["positives"] = targets.positives
        return losses

    def targets(self, outputs: Outputs, batch: Batch) -> Targets:
        """Assignment and what follows from it, computed where the truth is and moved to the outputs' device."""
        assignment = assign(outputs.shapes, self.strides, batch.targets, self.assign_config)
        host = assignment.object.device
        points, level = make_grid(outputs.shapes, self.strides, host)
        boxes = torch.cat([t.boxes for t in batch.targets])[assignment.object]
        labels = torch.cat([t.labels for t in batch.targets])[assignment.object]
        stride = torch.tensor(self.strides, dtype=torch.float32, device=host)[level[assignment.location]]
        ltrb = ltrb_from_boxes(points[assignment.location], boxes) / stride[:, None]  # [P, 4]
        device = outputs.logits.device
        count = mean_over_ranks(torch.tensor(float(len(labels)), device=device)).clamp(min=1)
        labels, ltrb = labels.to(device, non_blocking=True), ltrb.to(device, non_blocking=True)
        return Targets(assignment.to(device), assignment, labels, ltrb, centerness_of(ltrb), count)

    def _cls_loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        a, config = targets.assignment, self.cls_config
        locations, classes = outputs.logits.shape[1:]
        positives = (a.image * locations + a.location) * classes + targets.labels
        total = focal_loss_sum(outputs.logits, a.valid, positives, config.alpha, config.gamma)
        return total / CLS_NORMALIZERS[config.normalizer](self, targets, outputs)

    def running_foreground(self, count: Tensor) -> Tensor:
        """Running mean of the number of positives, updated before it is used while training."""
        if torch.is_grad_enabled():
            self.foreground.mul_(0.9).add_(0.1 * count)
        return self.foreground.clone()

    def _quality_loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        if outputs.centerness is None:
            return {}
        a = targets.assignment
        wanted = QUALITY_TARGETS[self.head_config.quality](outputs, targets)
        predicted = outputs.centerness[a.image, a.location]
        name = self.head_config.quality
        return {name: QUALITY_LOSSES[self.head_config.quality_loss](predicted, wanted) / targets.positives}

    # Inference

    def decode(
        self,
        outputs: Outputs,
        sizes: Sequence[Size] | Tensor,
        output_sizes: Sequence[Size] | Tensor | None = None,
        *,
        compact: bool = False,
    ) -> list[Detections]:
        """Detections of every image.

        Args:
            outputs: of `forward`.
            sizes: (H, W) of the valid part of each image in the network's input, px.
            output_sizes: (H, W) of the frames that results are wanted in; None: `sizes`.
            compact: masks as run lengths, for those who would only encode them.
        """
        inner = _as_sizes(sizes)
        outer = inner if output_sizes is None else _as_sizes(output_sizes)
        results = []
        for survivors, size, output_size in zip(self.survivors(outputs), inner, outer, strict=True):
            boxes = rescale_boxes(survivors.boxes, size, output_size)
            keep = _has_area(boxes)
            left = survivors.select(keep)
            fields: dict[str, Any] = {"boxes": boxes[keep]}
            for branch in self.tasks:
                fields.update(branch.decode(outputs, left, Frame(size, output_size, compact)))
            found = Detections(size=output_size, scores=left.scores, labels=left.labels, **fields)
            # Boxes that only decoding tells (of masks, say) may turn out empty now.
            results.append(found if self.box_source is not None else found[_has_area(found.boxes)])
        return results

    def survivors(self, outputs: Outputs) -> list[Survivors]:
        """Candidates above the threshold, the best of every level, after suppression, the best of every image."""
        config = self.decode_config
        found = self._candidates(outputs)
        level = outputs.level[found.location]
        found = found.select(top_per_group(found.scores, found.image * len(self.strides) + level, config.pre_nms_top))
        kept, boxes = self.suppress(outputs, found, config)
        kept = kept[top_per_group(found.scores[kept], found.image[kept], config.max_detections)]
        image, *fields = (field[kept] for field in (*found, boxes))
        counts = torch.bincount(image, minlength=len(outputs.logits)).tolist()
        rows = zip(*(field.split(counts) for field in fields), strict=True)
        return [Survivors(index, *row) for index, row in enumerate(rows)]

    def suppress(self, outputs: Outputs, candidates: Candidates, config: DecodeConfig) -> tuple[Tensor, Tensor]:
        """See `Suppressor.suppress`; by non-maximum suppression of boxes where a branch tells boxes."""
        if self.box_source is None:
            return self.suppressor.suppress(outputs, candidates, config)
        boxes = self.box_source.boxes(outputs, candidates.image, candidates.location)
        groups = candidates.image * self.num_classes + candidates.labels
        return batched_nms(boxes, candidates.scores, groups, config.nms_threshold), boxes

    @property
    def tasks(self) -> list[Branch]:
        """The branches, as what they can do."""
        return list(self.branches.values())  # type: ignore[arg-type]

    @property
    def box_source(self) -> BoxSource | None:
        """The first branch whose predictions give every location a box; None: no branch does."""
        return next((branch for branch in self.tasks if hasattr(branch, "boxes")), None)  # type: ignore[return-value]

    @property
    def suppressor(self) -> Suppressor:
        """The first branch that tells duplicates apart without boxes."""
        return next(branch for branch in self.tasks if hasattr(branch, "suppress"))  # type: ignore[return-value]

    def _candidates(self, outputs: Outputs) -> Candidates:
        """All (location, class) pairs above the threshold, with their scores (eq. 3.4).

        The sigmoid is taken of those alone: comparing logits with the threshold's logit is the same test.
        """
        config = self.decode_config
        threshold = math.log(config.score_threshold / (1 - config.score_threshold))
        image, location, labels = (outputs.logits > threshold).nonzero(as_tuple=True)
        product = outputs.logits[image, location, labels].sigmoid()
        quality = SCORE_QUALITY[config.quality](outputs, image, location)
        if quality is None:
            return Candidates(image, location, labels, product)
        product = product * quality
        found = Candidates(image, location, labels, product.sqrt())
        return found.select(product > config.score_threshold) if config.threshold_on == "product" else found


def _iou_target(outputs: Outputs, targets: Targets) -> Tensor:
    """IoU [P] of the predicted with the true box, detached."""
    assert outputs.ltrb is not None
    predicted = outputs.ltrb[targets.assignment.image, targets.assignment.location].detach()
    return ltrb_overlap(predicted, targets.ltrb).iou


QUALITY_TARGETS: dict[str, Callable[[Outputs, Targets], Tensor]] = {
    "centerness": lambda outputs, targets: targets.centerness,
    "iou": _iou_target,
}

SCORE_QUALITY: dict[str, Callable[[Outputs, Tensor, Tensor], Tensor | None]] = {
    "predicted": lambda outputs, image, location: outputs.centerness[image, location].sigmoid(),  # type: ignore[index]
    "from_box": lambda outputs, image, location: centerness_of(outputs.ltrb[image, location]),  # type: ignore[index]
    "none": lambda outputs, image, location: None,
}


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _as_sizes(sizes: Sequence[Size] | Tensor) -> list[Size]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]
