"""BoxInst (chapter 6): masks learned from boxes alone. The network is CondInst's; only the criterion is another.

Two terms tell what a mask must be like where only its box is known. *Projection* (eq. 6.3): the mask's maxima along
rows and along columns are those of the box. *Pairwise affinity* (eq. 6.8): neighboring pixels of similar color have the
same label, either both in the mask or both not.

Letters: n instances of one image, h w cells of the stride-8 map, H W samples of the upsampled masks, E edges to half
of a pixel's neighbors (every edge once; the release counts each from both ends).

How it is computed. A maximum along a row of a linearly upsampled map is one along the row of cells, so the projection
never upsamples along the axis that it takes the maximum of, and needs the sigmoid of the maxima alone. With logits a
and b, -log P(y = 1) = log(1+e^a) + log(1+e^b) - log(1+e^(a+b)); only the window of an object's box is upsampled for it.

Where the text and the release differ, the default is the release: edges whose first end (each end in turn) is in the
box, threshold 0.3, divided by the supervised edges. The text: edges with either end in the box, 0.1, divided by all of
them. Both take colors from the mean of the raw pixels under a sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perpixel.config import Config
from perpixel.distributed import mean_over_ranks
from perpixel.methods.detector import Logs
from perpixel.ops.color import coarse_lab, ends, half_neighborhood, similar_edges
from perpixel.ops.losses import dice_loss
from perpixel.ops.masks import CELL, aligned_upsample, aligned_weights, known_masks, padded_masks
from perpixel.structures import Batch, Instances, Outputs, Progress, Size

FILLED = 0.97  # part of its box that a mask covers if it has learned nothing but the box
JUDGED_AT = 0.9  # fraction of the schedule


class BoxInstConfig(Config):
    """Args:
    masks: "none": all objects learn from their boxes; "known": those whose mask the labels hold learn from it by the
        dice loss (section 6.3.6). The rest learn from boxes, or not at all where both weights below are 0.
    projection: "dice", or "bce" (footnote 2).
    projection_weight, pairwise_weight: of the two terms.
    size, dilation: of the neighborhood, in samples (Table 6.3).
    threshold: color similarity from which on an edge is supervised (tau of eq. 6.8; Table 6.2).
    theta: of eq. 6.7.
    edges: whose labels are "similar" by color, or all edges with the labels of the true "mask" (eq. 6.5, Table 6.1).
    inside: edges that count for a box: those whose "first" end is in it, each edge taken in both directions
        (release), or those with "either" end in it (text).
    normalizer: the pairwise term is divided by the "supervised" edges (release) or by "all" that count (text).
    warmup: fraction of the schedule in which the pairwise term's weight rises linearly.
    bottom_rows: of the stored picture, px, that are left out of the pairwise term (COCO has pictures with a black rim).
    """

    masks: Literal["none", "known"] = "none"
    projection: Literal["dice", "bce"] = "dice"
    projection_weight: float = 1.0
    pairwise_weight: float = 1.0
    size: Literal[3, 5] = 3
    dilation: Literal[1, 2] = 2
    threshold: float = 0.3
    theta: float = 2.0
    edges: Literal["similar", "mask"] = "similar"
    inside: Literal["first", "either"] = "first"
    normalizer: Literal["supervised", "all"] = "supervised"
    warmup: float = 1 / 9
    bottom_rows: int = 10


class Window(NamedTuple):
    """The surroundings of one object's box on the map of samples.

    Args:
        rows, columns: part of the map, the box and the reach of its edges.
        inside: bool [H', W'], samples in the box.
        weight: float32 [E, H', W'] of the edges from each sample.
        degree: float32 [H', W'], the sum of the weights of all edges at a sample.
        edges: scalar, how many the normalizer counts.
        mask: bool [H', W'], the true mask that tells which edges have ends of the same label; None: all have.
    """

    rows: slice
    columns: slice
    inside: Tensor
    weight: Tensor
    degree: Tensor
    edges: Tensor
    mask: Tensor | None


class Target(NamedTuple):
    """Truth of one image, on the outputs' device.

    Args:
        rows: bool [N, H], columns: bool [N, W], those that a box covers.
        window: of an object, made when it is first asked for.
        masks: bool [N, H, W], true masks on the padded canvas; None: not used.
        known: objects that learn from their mask.
    """

    rows: Tensor
    columns: Tensor
    window: Callable[[int], Window]
    masks: Tensor | None
    known: list[bool]


# Weight of the edges whose ends are in the box or not: from `in_first`, `in_second`, and whether the color of the first
# and of the second end is known.
INSIDE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "first": lambda in_first, in_second, first, second: (in_first & second).float() + (in_second & first),
    "either": lambda in_first, in_second, first, second: ((in_first | in_second) & first & second).float(),
}

PROJECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dice": lambda logits, line: dice_loss(logits.sigmoid(), line),
    "bce": lambda logits, line: F.binary_cross_entropy_with_logits(logits, line.float(), reduction="none").mean(1),
}


class BoxCriterion:
    """Boxes, colors and, where they are known and wanted, masks; see `BoxInstConfig` and `condinst.Criterion`."""

    def __init__(self, config: BoxInstConfig) -> None:
        self.config = config
        self.offsets = half_neighborhood(config.size, config.dilation)
        reads_masks = config.masks == "known" or config.edges == "mask"
        self.needs: frozenset[Literal["masks"]] = frozenset(("masks",) if reads_masks else ())
        self.filled: Tensor | None = None  # running mean, for one warning near the end of a run
        self.judged = False

    def supervised(self, batch: Batch) -> Tensor:
        config = self.config
        by_box = config.edges == "similar" and (config.projection_weight > 0 or config.pairwise_weight > 0)
        return torch.cat([torch.ones_like(t.ignore) if by_box else known_masks(t) for t in batch.targets])

    @torch.no_grad()
    def targets(self, outputs: Outputs, batch: Batch, stride: int) -> list[Target]:
        height, width = (side * CELL // stride for side in outputs.shapes[0])
        similar, valid = self._edges(batch, stride, (height, width))
        return [self._target(*of_image, stride) for of_image in zip(batch.targets, similar, valid, strict=True)]

    def _edges(self, batch: Batch, stride: int, shape: Size) -> tuple[Tensor, Tensor]:
        """Similar edges bool [B, E, H, W], and samples whose color is known, bool [B, H, W]."""
        height, width = (side * stride for side in shape)
        images = F.pad(batch.images, (0, width - batch.images.shape[3], 0, height - batch.images.shape[2]))
        threshold = self.config.threshold if self.config.edges == "similar" else 0.0
        similar = similar_edges(coarse_lab(images, stride), self.offsets, threshold, self.config.theta)
        stored = [height for height, _ in batch.original_sizes or batch.sizes]
        shown = [
            (height - int(self.config.bottom_rows * height / full), width)
            for (height, width), full in zip(batch.sizes, stored, strict=True)
        ]
        limit = torch.tensor(shown, device=images.device)[:, :, None]  # [B, 2, 1]
        y, x = (torch.arange(n, device=images.device) * stride + stride // 2 for n in shape)
        return similar, (y < limit[:, 0])[:, :, None] & (x < limit[:, 1])[:, None, :]

    def _target(self, truth: Instances, similar: Tensor, valid: Tensor, stride: int) -> Target:
        device, (height, width) = valid.device, (int(n) for n in valid.shape)
        # A box covers the pixels int(x0) to int(x1), both included, as the release draws it.
        low, high = truth.boxes[:, :2].int(), truth.boxes[:, 2:].int()
        x, y = (torch.arange(n, device=low.device) * stride + stride // 2 for n in (width, height))
        columns, rows = ((place >= low[:, i, None]) & (place <= high[:, i, None]) for i, place in enumerate((x, y)))
        masks = padded_masks(truth, stride, (height, width)).to(device) if self.needs else None
        labels = masks if self.config.edges == "mask" else None
        known = known_masks(truth).tolist() if self.config.masks == "known" else [False] * len(truth)

        @cache
        def window(row: int) -> Window:
            return self._window(rows[row], columns[row], similar, valid, None if labels is None else labels[row])

        return Target(rows.to(device), columns.to(device), window, masks, known)

    @torch.no_grad()
    def _window(self, rows: Tensor, columns: Tensor, similar: Tensor, valid: Tensor, mask: Tensor | None) -> Window:
        reach = self.config.dilation * (self.config.size // 2)
        y, x = _around(rows, reach), _around(columns, reach)
        inside = (rows[y, None] & columns[x]).to(valid.device)
        valid, similar = valid[y, x], similar[:, y, x]
        weight = torch.zeros(similar.shape, device=valid.device)
        degree, edges = torch.zeros_like(weight[0]), weight.new_zeros(())
        for e, offset in enumerate(self.offsets):
            i, j = ends(inside.shape[0], inside.shape[1], offset)
            counted = INSIDE[self.config.inside](inside[i], inside[j], valid[i], valid[j])
            weight[e][i] = counted * similar[e][i]
            degree[i] += weight[e][i]
            degree[j] += weight[e][i]
            edges = edges + (weight[e] if self.config.normalizer == "supervised" else counted).sum()
        return Window(y, x, inside, weight, degree, edges, None if mask is None else mask[y, x])

    def sums(self, logits: Tensor, factor: int, objects: list[int], target: Target) -> Tensor:
        """Sums [5] over instances: dice, projection, pairwise, the edges of the normalizer, filled part of the box."""
        from_mask = [i for i, o in enumerate(objects) if target.known[o]]
        from_box = [i for i, o in enumerate(objects) if not target.known[o]]
        dice = logits.new_zeros(0)
        if target.masks is not None:
            upsampled = aligned_upsample(logits[from_mask], factor)
            dice = dice_loss(upsampled.sigmoid(), target.masks[[objects[i] for i in from_mask]])
        logits, objects = logits[from_box], [objects[i] for i in from_box]
        vertical, horizontal = (aligned_weights(n, factor, logits.device) for n in logits.shape[1:])
        line_loss = PROJECTIONS[self.config.projection]
        projection = line_loss((vertical @ logits).amax(dim=2), target.rows[objects]) + line_loss(
            (logits @ horizontal.T).amax(dim=1), target.columns[objects]
        )
        pairwise, start = logits.new_zeros(3), 0
        for row, group in groupby(objects):
            stop = start + len(list(group))
            pairwise = pairwise + self._pairwise(logits[start:stop], vertical, horizontal, target.window(row))
            start = stop
        return torch.cat([torch.stack([dice.sum(), projection.sum()]), pairwise])

    def _pairwise(self, logits: Tensor, vertical: Tensor, horizontal: Tensor, window: Window) -> Tensor:
        """Sums [3] over the instances [m, h, w] of one object: price of its edges, their number, filled part."""
        maps = vertical[window.rows] @ logits @ horizontal[window.columns].T  # [m, H', W']
        price = (F.softplus(maps) * window.degree).sum()
        for offset, weight in zip(self.offsets, window.weight, strict=True):
            i, j = ends(maps.shape[1], maps.shape[2], offset)
            a, b = maps[:, *i], maps[:, *j]
            same = F.softplus(a + b)
            if window.mask is not None:  # the ends differ where the truth does: 1 - P(y = 1) is P(y = 1) of a and -b
                same = torch.where(window.mask[i] == window.mask[j], same, F.softplus(a - b) + b)
            price = price - (same * weight[i]).sum()
        covered = ((maps.detach() > 0) & window.inside).sum()
        return torch.stack([price, len(maps) * window.edges, covered / window.inside.sum().clamp(min=1)])

    def losses(self, sums: Tensor, count: Tensor, progress: Progress, logs: Logs) -> dict[str, Tensor]:
        config = self.config
        dice, projection, pairwise, edges, filled = sums.unbind()
        projection = projection / count
        pairwise = pairwise / mean_over_ranks(edges).clamp(min=1)
        warmth = min(progress.fraction / config.warmup, 1.0) if config.warmup > 0 else 1.0
        logs |= {"projection_unweighted": projection.detach(), "pairwise_unweighted": pairwise.detach()}
        logs["box_filled"] = filled.detach() / count
        self._judge(logs["box_filled"], progress)
        losses = {
            "projection": config.projection_weight * projection,
            "pairwise": warmth * config.pairwise_weight * pairwise,
        }
        return {"mask": dice / count, **losses} if config.masks == "known" else losses

    def _judge(self, filled: Tensor, progress: Progress) -> None:
        """Says once, near the end of a run, that the masks have stayed boxes."""
        if not torch.is_grad_enabled():
            return
        self.filled = filled if self.filled is None else torch.lerp(self.filled, filled, 0.05)
        if progress.fraction < JUDGED_AT or self.judged:
            return
        self.judged = True
        if float(self.filled) > FILLED:
            warnings.warn(
                f"boxinst: masks cover {float(self.filled):.0%} of their boxes, so nothing but the boxes was learned; "
                f"train longer, or raise boxinst.threshold (now {self.config.threshold}) or boxinst.pairwise_weight "
                f"(now {self.config.pairwise_weight}), unless the objects are rectangles",
                stacklevel=2,
            )


def _around(line: Tensor, reach: int) -> slice:
    """The set part of a line, and `reach` entries to both sides."""
    places = line.nonzero()[:, 0].tolist()
    return slice(max(places[0] - reach, 0), places[-1] + 1 + reach) if places else slice(0, 0)
