"""Which object does each location answer for: inside test, level rule, tie-break (sections 3.2.1, 3.2.2, 3.3.1).

Only the cells inside an object's center region are ever looked at: with center sampling that is at most nine cells
an object and level, so the cost does not grow with objects times locations. Runs on the device of the truth; the
engine keeps truth on the host, where assignment overlaps with the device's forward pass and needs no synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from perpixel.config import Config
from perpixel.errors import ConfigError
from perpixel.locations import make_grid
from perpixel.ops.boxes import box_areas, ltrb_from_boxes
from perpixel.ops.nms import rank_in_group
from perpixel.structures import Instances, Size

BACKGROUND, IGNORED = -1, -2


class AssignConfig(Config):
    """How locations get their objects.

    Args:
        center_radius: half side of the center region in strides (r of section 3.2.1); None: the whole box.
        center_shape: "square", or "box" for a region of equal area with the box's aspect ratio (section 3.3.1).
        center: "box" centers, or "mass" centers of the masks where the truth has them (the release's CondInst).
        level_rule: a key of LEVEL_RULES.
        ranges: upper end of each level's range, px, the last one open; None: 8 times the stride of each level (64,
            128, 256, 512 for P3 to P6), the top level without limit.
        closed_ranges: a distance that equals an end belongs to both levels (release) or to none (text).
        tie_rule: a key of TIE_RULES.
    """

    center_radius: float | None = 1.5
    center_shape: Literal["square", "box"] = "square"
    center: Literal["box", "mass"] = "box"
    level_rule: Literal["max_distance", "sqrt_area", "max_side", "fpn", "all"] = "max_distance"
    ranges: tuple[float, ...] | None = None
    closed_ranges: bool = True
    tie_rule: Literal["smallest", "nearest_center"] = "smallest"


class Candidates(NamedTuple):
    """(object, location) pairs whose location lies inside the object's center region.

    Args:
        object: int64 [M], row in the truth of all images, one after the other.
        level: int64 [M].
        location: int64 [M], flat index into the grid.
        point: float32 [M, 2] xy, px.
        ltrb: float32 [M, 4], distances to the sides of the box, px.
        box: float32 [M, 4] xyxy, px.
        center: float32 [M, 2], center of the region, px.
    """

    object: Tensor
    level: Tensor
    location: Tensor
    point: Tensor
    ltrb: Tensor
    box: Tensor
    center: Tensor


def _max_distance(pairs: Candidates) -> Tensor:
    return pairs.ltrb.amax(dim=1)


def _sqrt_area(pairs: Candidates) -> Tensor:
    return box_areas(pairs.box).sqrt() / 2


def _max_side(pairs: Candidates) -> Tensor:
    return (pairs.box[:, 2:] - pairs.box[:, :2]).amax(dim=1) / 2


def _fpn_level(pairs: Candidates) -> Tensor:
    """Level of P3.. that FPN gives to a box: floor(5 + log2(sqrt(wh) / 224)), as an offset from P3."""
    return (5 + torch.log2(box_areas(pairs.box).sqrt() / 224)).floor() - 3


Measure = Callable[[Candidates], Tensor]
# A rule measures every pair [M]; a level takes the pairs whose measure lies in its range.
LEVEL_RULES: dict[str, Measure] = {
    "max_distance": _max_distance,
    "sqrt_area": _sqrt_area,
    "max_side": _max_side,
    "fpn": _fpn_level,
    "all": lambda pairs: torch.zeros_like(pairs.ltrb[:, 0]),
}

# Of several objects at a location the one with the lowest key wins, then the one that comes first.
TIE_RULES: dict[str, Measure] = {
    "smallest": lambda pairs: box_areas(pairs.box),
    "nearest_center": lambda pairs: (pairs.point - (pairs.box[:, :2] + pairs.box[:, 2:]) / 2).square().sum(1),
}


class Assignment(NamedTuple):
    """The object of every location, and the positive locations as rows.

    Args:
        gt_index: int64 [B, L, k]: row in the image's truth, -1 background, -2 ignored.
        candidates: int64 [B, L]: how many objects wanted the location (Table 3.2).
        image, location, slot: int64 [P] each, place of every positive in `gt_index`.
        object: int64 [P], its row in the truth of all images, one after the other.
    """

    gt_index: Tensor
    candidates: Tensor
    image: Tensor
    location: Tensor
    slot: Tensor
    object: Tensor

    def to(self, device: torch.device | str) -> Assignment:
        return Assignment(*(value.to(device, non_blocking=True) for value in self))

    @property
    def valid(self) -> Tensor:
        """bool [B, L]: locations that take part in learning."""
        return self.gt_index[..., 0] != IGNORED


def assign(
    shapes: Sequence[Size], strides: Sequence[int], targets: Sequence[Instances], rules: AssignConfig, k: int = 1
) -> Assignment:
    """Gives every location of a batch its k objects.

    Args:
        shapes: (H, W) of every level's map.
        strides: px, one a level.
        targets: truth of each image, on one device, in the frame of the network's input.
        rules: see `AssignConfig`.
        k: objects a location (1 but for multiple instance prediction); slot j gets the j-th in the tie rule's order.

    Returns:
        the assignment, on the device of the truth.
    """
    pairs = candidate_pairs(shapes, strides, targets, rules)
    measure = LEVEL_RULES[rules.level_rule](pairs)
    low, high = _level_ranges(rules, strides, measure.device)
    low, high = low[pairs.level], high[pairs.level]
    closed = rules.closed_ranges or rules.level_rule not in ("max_distance", "sqrt_area", "max_side")
    taken = ((measure >= low) & (measure <= high)) if closed else ((measure > low) & (measure < high))
    return _resolve(Candidates(*(field[taken] for field in pairs)), shapes, strides, targets, rules, k)


def candidate_pairs(
    shapes: Sequence[Size], strides: Sequence[int], targets: Sequence[Instances], rules: AssignConfig
) -> Candidates:
    """All (object, location) pairs with the location strictly inside the object's center region and box."""
    boxes = torch.cat([t.boxes for t in targets])  # [N, 4]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    if rules.center == "mass":
        own = [t.boxes[:, :2] / 2 + t.boxes[:, 2:] / 2 if t.centers is None else t.centers for t in targets]
        centers = torch.cat(own)
    real = ~torch.cat([t.ignore for t in targets])
    parts, first = [], 0
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        region = _center_region(boxes, centers, stride, rules)  # [N, 4]
        objects, columns, rows = _cells(region, real, height, width, stride)
        point = torch.stack([columns, rows], dim=1).float() * stride + stride // 2
        inside = (ltrb_from_boxes(point, region[objects]) > 0).all(dim=1)
        ltrb = ltrb_from_boxes(point, boxes[objects])
        keep = inside & (ltrb > 0).all(dim=1)
        objects, point = objects[keep], point[keep]
        location = first + rows[keep] * width + columns[keep]
        parts.append(
            Candidates(
                objects, torch.full_like(objects, level), location, point, ltrb[keep], boxes[objects], centers[objects]
            )
        )
        first += height * width
    return Candidates(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _center_region(boxes: Tensor, centers: Tensor, stride: int, rules: AssignConfig) -> Tensor:
    """The center regions [N, 4] on a level, clipped to the boxes."""
    if rules.center_radius is None:
        return boxes
    half = torch.full_like(centers, rules.center_radius * stride)  # [N, 2]
    if rules.center_shape == "box":
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
        half = half * sides / sides.prod(dim=1, keepdim=True).sqrt()
    return torch.cat([torch.maximum(centers - half, boxes[:, :2]), torch.minimum(centers + half, boxes[:, 2:])], dim=1)


def _cells(region: Tensor, real: Tensor, height: int, width: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of a map that may lie in each object's region: object, column and row [M] of every (object, cell)."""
    limit = torch.tensor([width, height], device=region.device) - 1
    first = ((region[:, :2] - stride // 2) / stride).floor().long().clamp(min=0)  # [N, 2] column, row
    last = torch.minimum(((region[:, 2:] - stride // 2) / stride).ceil().long(), limit)
    extent = (last - first + 1).clamp(min=0) * real[:, None]
    count = extent[:, 0] * extent[:, 1]
    objects = torch.repeat_interleave(torch.arange(len(region), device=region.device), count)
    within = torch.arange(len(objects), device=region.device) - (count.cumsum(0) - count)[objects]
    wide = extent[objects, 0]
    return objects, first[objects, 0] + within % wide, first[objects, 1] + within // wide


def _level_ranges(rules: AssignConfig, strides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower and upper ends [levels] of what each level takes, in the unit of the level rule."""
    levels = len(strides)
    if rules.level_rule == "fpn":
        low = torch.arange(levels, dtype=torch.float32, device=device)
        high = low.clone()
        low[0], high[-1] = -math.inf, math.inf
        return low, high
    upper = rules.ranges if rules.ranges is not None else tuple(8.0 * s for s in strides[:-1])
    if len(upper) != levels - 1:
        raise ConfigError(f"assign.ranges: expected {levels - 1} upper ends for {levels} levels, got {list(upper)}")
    if rules.level_rule == "all":
        return torch.full((levels,), -math.inf, device=device), torch.full((levels,), math.inf, device=device)
    return torch.tensor([-1.0, *upper], device=device), torch.tensor([*upper, math.inf], device=device)


def _resolve(
    pairs: Candidates,
    shapes: Sequence[Size],
    strides: Sequence[int],
    targets: Sequence[Instances],
    rules: AssignConfig,
    k: int,
) -> Assignment:
    """One row a location from the pairs that its level takes."""
    device = pairs.object.device
    images, locations = len(targets), sum(height * width for height, width in shapes)
    counts = torch.tensor([len(t) for t in targets], device=device)
    offsets = counts.cumsum(0) - counts
    owner = torch.repeat_interleave(torch.arange(images, device=device), counts)  # image of every object
    place = owner[pairs.object] * locations + pairs.location

    by_object = pairs.object.argsort(stable=True)
    order = by_object[TIE_RULES[rules.tie_rule](pairs)[by_object].argsort(stable=True)]
    order = order[place[order].argsort(stable=True)]
    slot = rank_in_group(place[order])
    order, slot = order[slot < k], slot[slot < k]
    objects, place_of = pairs.object[order], place[order]

    gt_index = torch.full((images * locations, k), BACKGROUND, dtype=torch.int64, device=device)
    gt_index[place_of, slot] = objects - offsets[owner[objects]]
    candidates = torch.bincount(place, minlength=images * locations)
    gt_index = gt_index.view(images, locations, k)
    _mark_ignored(gt_index, shapes, strides, targets)
    return Assignment(
        gt_index,
        candidates.view(images, locations),
        place_of // locations,
        place_of % locations,
        slot,
        objects,
    )


def _mark_ignored(
    gt_index: Tensor, shapes: Sequence[Size], strides: Sequence[int], targets: Sequence[Instances]
) -> None:
    """Background locations inside an ignore region become neither positive nor negative."""
    if not any(bool(t.ignore.any()) for t in targets):
        return
    points = make_grid(shapes, strides, gt_index.device).points
    for row, target in zip(gt_index, targets, strict=True):
        regions = target.boxes[target.ignore]  # [R, 4]
        inside = (ltrb_from_boxes(points[:, None], regions[None]) > 0).all(-1).any(-1)  # [L]
        row[inside[:, None] & (row == BACKGROUND)] = IGNORED
