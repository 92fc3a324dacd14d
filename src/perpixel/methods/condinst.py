"""CondInst (chapter 5): a mask for every location, by a tiny network whose filters are predicted there.

The mask branch gives features at stride 8 that all objects of an image share; the controller predicts, at every
location, the parameters θ of a mask head; the head runs on the shared features and on coordinates relative to the
location (`ops.dynamic`). It runs where it is needed: on positives in training, on survivors in inference.

Letters: B images, N objects, P positive locations, h w cells of the stride-8 map, f output factor. Coordinates are px
of the network's input; the head computes in float32 in every precision.

Where the text and the release differ, the default is the release: features from P3 to P5 (text: P3), a controller that
is one convolution on the box tower (text: a tower of its own), masks learned at stride 4 (text: 2). Masks are compared
on the padded canvas, at points, as in both. Where this differs from the release: logits, upsampling and criterion are
computed for a few instances at a time, and once more in the backward pass where keeping them would cost much memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perpixel.config import Config
from perpixel.distributed import mean_over_ranks
from perpixel.locations import flatten, make_grid
from perpixel.methods.detector import Candidates, DecodeConfig, Features, Frame, Logs, Survivors, Targets
from perpixel.methods.semantic import class_logits, semantic_loss
from perpixel.nn.heads import Tower, prediction
from perpixel.nn.layers import NORMS
from perpixel.ops.boxes import rescale_boxes
from perpixel.ops.dynamic import MaskHead
from perpixel.ops.losses import dice_loss
from perpixel.ops.masks import (
    CELL,
    aligned_upsample,
    known_masks,
    masks_in_frame,
    padded_masks,
    rles_in_frame,
    tight_boxes,
)
from perpixel.ops.nms import mask_nms, rank_in_group
from perpixel.rle import boxes_of
from perpixel.structures import Batch, Outputs, Progress, Size

KEPT = 2**26  # values of activations that training keeps for the backward pass; beyond, it computes them once more


class MaskConfig(Config):
    """Args:
    levels: pyramid levels that the mask branch adds up: 1 for P3 alone (text), 3 for P3 to P5 (release).
    branch_channels, branch_convs: width and depth of the mask branch.
    norm: of the mask branch, "bn" or "gn".
    channels: C_mask, of the features that the mask head reads (Table 5.3).
    controller_convs: layers of the controller's own tower on the pyramid; 0: it reads the box tower.
    width, depth: of the mask head (Tables 5.1 and 5.2).
    coordinates: that the mask head reads: "relative" to the location, "absolute", "none", or "only" the relative ones
        and no features (Table 5.4).
    factor: by which logits are upsampled from stride 8 (Table 5.5).
    cap: positive locations that learn masks, at most; null: all.
    cap_by: "chance": so many of a process's batch, drawn at random; "score": so many of an image, shared out evenly
        among its objects, the best locations of each.
    weight: of the mask losses (lambda of eq. 5.1).
    semantic: weight of the auxiliary semantic task (section 5.2.3), which only runs in training; 0: none.
    crop: cut masks to their boxes.
    candidates: masks of an image, best first, that suppression compares in a network without a box branch.
    """

    levels: Literal[1, 3] = 3
    branch_channels: int = 128
    branch_convs: int = 4
    norm: Literal["bn", "gn"] = "bn"
    channels: int = 8
    controller_convs: int = 0
    width: int = 8
    depth: int = 3
    coordinates: Literal["relative", "absolute", "none", "only"] = "relative"
    factor: Literal[1, 2, 4] = 2
    cap: int | None = 500
    cap_by: Literal["chance", "score"] = "chance"
    weight: float = 1.0
    semantic: float = 0.0
    crop: bool = False
    candidates: int = 500


def _conv(channels: int, out_channels: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, NORMS[norm](out_channels), nn.ReLU())


class MaskFeatures(nn.Module):
    """The mask branch (section 5.2.1): pyramid to features [B, C, h, w] at stride 8."""

    def __init__(self, channels: int, config: MaskConfig) -> None:
        super().__init__()
        width = config.branch_channels
        self.refine = nn.ModuleList(_conv(channels, width, config.norm) for _ in range(config.levels))
        convs = [_conv(width, width, config.norm) for _ in range(config.branch_convs)]
        self.tower = nn.Sequential(*convs, nn.Conv2d(width, config.channels, 1))

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        x = self.refine[0](pyramid[0])
        for level in range(1, len(self.refine)):
            x = x + aligned_upsample(self.refine[level](pyramid[level]), 2**level)
        return self.tower(x)


# Origin and scale of the coordinates, in (origin - p) / scale: from the locations [P, 2] and their strides [P] px, and
# the padded input's (W, H) px.
COORDINATES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "relative": lambda place, stride, extent: (place, (8 * stride)[:, None].expand_as(place)),
    "absolute": lambda place, stride, extent: ((extent / 2).expand_as(place), (-extent / 2).expand_as(place)),
}
COORDINATES["only"] = COORDINATES["none"] = COORDINATES["relative"]


class Criterion(Protocol):
    """What masks should be like, as sums over instances, so that few of them need to exist at a time."""

    needs: frozenset[Literal["masks"]]  # labels that it reads, beside boxes

    def supervised(self, batch: Batch) -> Tensor:
        """bool [N]: objects of all images, one after the other, that masks are learned from."""

    def targets(self, outputs: Outputs, batch: Batch, stride: int) -> list[Any]:
        """What `sums` needs of each image, once a batch, on the device of the outputs, for masks of a stride."""

    def sums(self, logits: Tensor, factor: int, objects: list[int], target: Any) -> Tensor:
        """Sums [T] of terms over instances of an image.

        Args:
            logits: float32 [n, h, w], of stride 8.
            factor: by which they are upsampled.
            objects: n rows of the image's truth, equal ones side by side.
            target: of the image.
        """

    def losses(self, sums: Tensor, count: Tensor, progress: Progress, logs: Logs) -> dict[str, Tensor]:
        """Terms of the objective from the sums [T] of all `count` instances (mean over ranks, at least 1)."""


class DiceCriterion:
    """True masks by the dice loss (eq. 5.2)."""

    needs: frozenset[Literal["masks"]] = frozenset(("masks",))

    def supervised(self, batch: Batch) -> Tensor:
        return torch.cat([known_masks(t) for t in batch.targets])

    def targets(self, outputs: Outputs, batch: Batch, stride: int) -> list[Tensor]:
        height, width = (side * CELL // stride for side in outputs.shapes[0])
        return [padded_masks(t, stride, (height, width)).to(outputs.logits.device) for t in batch.targets]

    def sums(self, logits: Tensor, factor: int, objects: list[int], target: Tensor) -> Tensor:
        return dice_loss(aligned_upsample(logits, factor).sigmoid(), target[objects]).sum()[None]

    def losses(self, sums: Tensor, count: Tensor, progress: Progress, logs: Logs) -> dict[str, Tensor]:
        return {"mask": sums[0] / count}


class Learners(NamedTuple):
    """Positive locations of a batch that learn masks, those of an object side by side, objects in order.

    Args:
        location: int64 [P], on the outputs' device.
        objects: row of each in its image's truth, one list an image.
    """

    location: Tensor
    objects: list[list[int]]


Chosen = tuple[Tensor, Tensor]  # locations [P] on the device, and rows [P] of the truth of all images on the host


def _cap_by_chance(outputs: Outputs, targets: Targets, keep: Tensor, images: Tensor, cap: int) -> Chosen:
    rows = keep.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows))[:cap]]
    rows = rows[targets.host.object[rows].argsort(stable=True)]
    return targets.host.location[rows].to(outputs.logits.device, non_blocking=True), targets.host.object[rows]


def _cap_by_score(outputs: Outputs, targets: Targets, keep: Tensor, images: Tensor, cap: int) -> Chosen:
    rows = keep.nonzero()[:, 0]
    rows = rows[targets.host.object[rows].argsort(stable=True)]
    objects = targets.host.object[rows]
    # How many of which object are kept is known without the scores, so the host plans on while the device computes.
    present = torch.bincount(images[objects.unique()], minlength=len(outputs.logits))  # objects of every image
    share = (cap // present.clamp(min=1)).clamp(min=1)
    kept = rank_in_group(objects) < share[images[objects]]

    device = outputs.logits.device
    rows, order = rows.to(device, non_blocking=True), objects.to(device, non_blocking=True)
    image, location = targets.assignment.image[rows], targets.assignment.location[rows]
    score = outputs.logits[image, location].detach().amax(dim=1).sigmoid()
    if outputs.centerness is not None:
        score = score * outputs.centerness[image, location].detach().sigmoid()
    best = score.argsort(descending=True, stable=True)
    best = best[order[best].argsort(stable=True)]
    return location[best][kept.to(device)], objects[kept]


CAPS: dict[str, Callable[[Outputs, Targets, Tensor, Tensor, int], Chosen]] = {
    "chance": _cap_by_chance,
    "score": _cap_by_score,
}


class MaskBranch(nn.Module):
    """Masks at every location.

    Args:
        channels: width of the pyramid and of the box tower.
        strides: px, one a level.
        num_classes: of the auxiliary task.
        criterion: how masks are learned.
        alone: no other branch tells boxes, so this one does, by its masks (section 5.3.5).
    """

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        config: MaskConfig,
        criterion: Criterion,
        *,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.criterion, self.alone = config, criterion, alone
        reads_features = config.coordinates != "only"
        self.shape = MaskHead(
            config.channels if reads_features else 0, config.coordinates != "none", config.width, config.depth
        )
        self.features = MaskFeatures(channels, config) if reads_features else None
        self.tower = Tower(channels, config.controller_convs, "gn", len(strides))
        self.reads = "pyramid" if config.controller_convs else "box_tower"
        self.controller = prediction(channels, self.shape.size)
        width = config.branch_channels
        blocks = [_conv(channels, width, config.norm), _conv(width, width, config.norm)]
        self.semantic = nn.Sequential(*blocks, class_logits(width, num_classes)) if config.semantic else None
        self.register_buffer("strides", torch.tensor(strides, dtype=torch.float32), persistent=False)

    def forward(self, features: Features, *, auxiliary: bool) -> dict[str, Any]:
        maps = [self.controller(self.tower(x, level)) for level, x in enumerate(getattr(features, self.reads))]
        fields: dict[str, Any] = {"controller": flatten(maps).float()}  # [B, L, size of θ]
        if self.features is not None:
            fields["mask_features"] = self.features(features.pyramid).float()
        if self.semantic is not None and auxiliary:
            fields["auxiliary"] = {"semantic": self.semantic(features.pyramid[0]).float()}
        return fields

    # Training

    def loss(
        self, outputs: Outputs, targets: Targets, batch: Batch, progress: Progress, logs: Logs
    ) -> dict[str, Tensor]:
        """The criterion's terms over the positive locations, and `semantic`."""
        learners = self._learners(outputs, targets, batch)
        device = outputs.logits.device
        count = mean_over_ranks(torch.tensor(float(len(learners.location)), device=device)).clamp(min=1)
        counts = [len(objects) for objects in learners.objects]
        image = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(counts)).to(device)
        cells = outputs.shapes[0][0] * outputs.shapes[0][1]
        # Activations of the head, and about four of the upsampled masks.
        kept = len(image) * cells * (2 * self.config.width + 4 * self.config.factor**2) <= KEPT
        parts = zip(
            outputs.controller[image, learners.location].split(counts),  # type: ignore[index]
            self._images(outputs),
            learners.location.split(counts),
            learners.objects,
            self.criterion.targets(outputs, batch, CELL // self.config.factor),
            strict=True,
        )
        sums = [self._sums(outputs, *part, kept) for part in parts]
        losses = self.criterion.losses(torch.stack(sums).sum(0), count, progress, logs)
        losses = {name: self.config.weight * value for name, value in losses.items()}
        if self.semantic is not None:
            losses["semantic"] = self.config.semantic * semantic_loss(outputs.auxiliary["semantic"], batch.targets)
        return losses

    def _learners(self, outputs: Outputs, targets: Targets, batch: Batch) -> Learners:
        counts = torch.tensor([len(t) for t in batch.targets])
        images = torch.repeat_interleave(torch.arange(len(batch)), counts)  # of every object
        keep = self.criterion.supervised(batch).cpu()[targets.host.object.cpu()]
        cap = self.config.cap if self.config.cap is not None else len(keep)
        location, objects = CAPS[self.config.cap_by](outputs, targets, keep, images, cap)
        rows = (objects - (counts.cumsum(0) - counts)[images[objects]]).split(
            torch.bincount(images[objects], minlength=len(batch)).tolist()
        )
        return Learners(location, [part.tolist() for part in rows])

    def _sums(
        self,
        outputs: Outputs,
        theta: Tensor,
        features: Tensor | None,
        location: Tensor,
        objects: list[int],
        target: Any,
        kept: bool,
    ) -> Tensor:
        """The criterion's sums over the learners of one image, some of them at a time."""
        planes, origin, scale = self._inputs(outputs, features, location)
        step: Callable[..., Tensor] = partial(self._step, outputs.shapes[0])
        if not kept:
            step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
        size = self.shape.chunk(planes.shape[1], planes.device)
        total = []
        for start in range(0, max(len(objects), 1), size):  # an image without learners still reaches all parameters
            part = slice(start, start + size)
            total.append(step(theta[part], planes, origin[part], scale[part], objects[part], target))
        return torch.stack(total).sum(0)

    def _step(
        self, shape: Size, theta: Tensor, planes: Tensor, origin: Tensor, scale: Tensor, objects: list[int], target: Any
    ) -> Tensor:
        logits = self.shape.logits(theta, planes, origin, scale).view(-1, *shape)
        return self.criterion.sums(logits, self.config.factor, objects, target)

    def _images(self, outputs: Outputs) -> Sequence[Tensor | None]:
        """Features [C, h, w] of every image; None where the mask head reads none."""
        return [None] * len(outputs.logits) if outputs.mask_features is None else outputs.mask_features.unbind()

    def _inputs(self, outputs: Outputs, features: Tensor | None, location: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the mask head reads of an image, and origin and scale of the coordinates of each location, px."""
        height, width = outputs.shapes[0]
        device = outputs.logits.device
        planes = self.shape.planes(features, make_grid([(height, width)], [CELL], device).points)
        extent = torch.tensor([width * CELL, height * CELL], dtype=torch.float32, device=device)
        strides = self.strides[outputs.level[location]]  # type: ignore[index]
        origin, scale = COORDINATES[self.config.coordinates](outputs.points[location], strides, extent)
        return planes, origin, scale

    # Inference

    def logits_at(self, outputs: Outputs, image: int, location: Tensor) -> Tensor:
        """Mask logits float32 [S, h, w] at stride 8 of chosen locations int64 [S] of an image."""
        theta = outputs.controller[image, location]  # type: ignore[index]
        planes, origin, scale = self._inputs(outputs, self._images(outputs)[image], location)
        return self.shape.many_logits(theta, planes, origin, scale).view(-1, *outputs.shapes[0])

    def masks_at(
        self, outputs: Outputs, image: int, location: Tensor, size: Size, output_size: Size | None = None
    ) -> Tensor:
        """Masks bool [S, H, W] of chosen locations int64 [S] of an image.

        Args:
            outputs: of the network.
            image: index into the batch.
            location: indices into the grid.
            size: (H, W) of the valid part of the image in the network's input, px.
            output_size: (H, W) of the frame of the masks; None: `size`.
        """
        logits = self.logits_at(outputs, image, location)
        return masks_in_frame(logits, self.config.factor, size, output_size or size)

    def decode(self, outputs: Outputs, survivors: Survivors, frame: Frame) -> dict[str, Any]:
        """`masks` of the survivors; and their `boxes`, where no other branch tells them."""
        logits = self.logits_at(outputs, survivors.image, survivors.location)
        boxes = rescale_boxes(survivors.boxes, *frame[:2]) if self.config.crop else None
        if frame.compact:
            masks: Any = rles_in_frame(logits, self.config.factor, *frame[:2], boxes)
        else:
            masks = masks_in_frame(logits, self.config.factor, *frame[:2], boxes)
        if not self.alone:
            return {"masks": masks}
        return {"masks": masks, "boxes": boxes_of(masks).to(logits.device) if frame.compact else tight_boxes(masks)}

    def suppress(self, outputs: Outputs, candidates: Candidates, config: DecodeConfig) -> tuple[Tensor, Tensor]:
        """Duplicates told apart by their masks alone (section 5.3.5, Table 5.6); empty masks are dropped."""
        boxes = candidates.scores.new_zeros(len(candidates.scores), 4)
        kept = []
        for image in range(len(outputs.logits)):
            rows = (candidates.image == image).nonzero()[:, 0]
            rows = rows[candidates.scores[rows].argsort(descending=True, stable=True)[: self.config.candidates]]
            masks = self.logits_at(outputs, image, candidates.location[rows]) > 0
            boxes[rows] = tight_boxes(masks) * CELL
            some = masks.flatten(1).any(dim=1)
            rows, masks = rows[some], masks[some]
            kept.append(rows[mask_nms(masks, candidates.scores[rows], candidates.labels[rows], config.nms_threshold)])
        order = torch.cat(kept)
        return order[candidates.scores[order].argsort(descending=True, stable=True)], boxes
