"""From the coarse logits of masks to pixels, and what masks of a stride are to a full-size drawing.

Letters: N masks, h w cells of the map that the mask head runs on (one every `CELL` px), H W pixels. Everything here is
linear interpolation along one axis at a time, so it is written as the weights that a pixel gives to the samples.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perpixel.rle import encode_window
from perpixel.structures import Instances, Size

CELL = 8  # px of the network's input between two samples of a mask's logits
ROWS = 64  # of a mask that are drawn at a time on a CPU, so that what is between the steps stays in its cache


def aligned_weights(size: int, factor: int, device: torch.device | str = "cpu") -> Tensor:
    """Weights [size * factor, size] that upsample one axis: pixel i samples the input at (i - factor // 2) / factor,
    clamped to its ends, so that cell j lies exactly on pixel factor // 2 + j factor (the release's alignment)."""
    position = (torch.arange(size * factor, device=device) - factor // 2) / factor
    return _hat(position.clamp(0, size - 1), size)


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """Maps [..., h, w] as [..., h * factor, w * factor]; see `aligned_weights`."""
    if factor == 1:
        return maps
    rows = aligned_weights(maps.shape[-2], factor, maps.device).to(maps.dtype)
    columns = aligned_weights(maps.shape[-1], factor, maps.device).to(maps.dtype)
    return rows @ maps @ columns.T


def _hat(position: Tensor, size: int) -> Tensor:
    """Weights [P, size] of linear interpolation at positions [P] within 0..size - 1."""
    return (1 - (position[:, None] - torch.arange(size, device=position.device)).abs()).clamp(min=0).float()


def sample_masks(instances: Instances, stride: int) -> Tensor:
    """Masks bool [N, ~H/stride, ~W/stride], point-sampled at [stride // 2 :: stride] px where the stored masks have
    these pixels (stored with stride 1 or the same one), else at the nearest one. No masks: zeros."""
    height, width = (len(range(stride // 2, side, stride)) for side in instances.size)
    if instances.masks is None:
        return torch.zeros((len(instances), height, width), dtype=torch.bool, device=instances.boxes.device)
    step = instances.mask_stride
    if step == stride:
        return instances.masks
    rows, columns = (
        ((torch.arange(n, device=instances.masks.device) * stride + stride // 2) // step).clamp(max=stored - 1)
        for n, stored in zip((height, width), instances.masks.shape[1:], strict=True)
    )
    return instances.masks[:, rows[:, None], columns]


def known_masks(instances: Instances) -> Tensor:
    """bool [N]: objects whose masks are known."""
    if instances.masks is None:
        return torch.zeros_like(instances.ignore)
    return torch.ones_like(instances.ignore) if instances.has_mask is None else instances.has_mask


def padded_masks(instances: Instances, stride: int, shape: Size) -> Tensor:
    """Masks bool [N, *shape], sampled at a stride, on a canvas of `shape` that is at least as large as the image's."""
    masks = sample_masks(instances, stride)
    return F.pad(masks, (0, shape[1] - masks.shape[2], 0, shape[0] - masks.shape[1]))


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes float32 [N, 4] xyxy around the set pixels of masks bool [N, H, W]; an empty mask has an empty box."""
    (top, bottom), (left, right) = _extent(masks.any(dim=2)), _extent(masks.any(dim=1))
    return torch.stack([left, top, right, bottom], dim=1).float()


def _extent(line: Tensor) -> tuple[Tensor, Tensor]:
    """First set entry, and one past the last, of every row of bool [N, n]; both 0 where none is set."""
    size = line.shape[1]
    place = torch.arange(1, size + 1, device=line.device)
    last = (line * place).amax(dim=1)
    first = size - (line * place.flip(0)).amax(dim=1)
    return torch.where(last > 0, first, 0), last


def masks_in_frame(logits: Tensor, factor: int, size: Size, output_size: Size, boxes: Tensor | None = None) -> Tensor:
    """Masks bool [N, H, W] in the pixels of `output_size`.

    The release's sequence (aligned upsampling of the logits by `factor`, sigmoid, aligned upsampling to pixels, cut to
    the valid part, bilinear resize to the output frame, threshold 1/2), at a fraction of its price. The two resizes
    are one: the first is linear between samples that lie on whole pixels, so that interpolating it linearly between
    whole pixels samples it exactly. And only the window is computed that a mask's own positive logits can reach.

    Args:
        logits: [N, h, w] of the padded input.
        factor: 1, 2 or 4.
        size: (H, W) of the valid part of the input, px.
        output_size: (H, W) of the frame of the result.
        boxes: [N, 4] xyxy in that frame; masks are cut to them. None: they are not.
    """
    masks = _no_pixels((len(logits), *output_size), logits.device)
    for window in _windows(logits.detach(), factor, size, output_size, boxes):
        window.draw(masks[window.mask, window.rows.pixels, window.columns.pixels])
    return masks


def _no_pixels(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """bool zeros. On CPUs a fresh mapping, which the system fills with zeros page by page where one is written to;
    `torch.zeros` writes all of it, and for full-size masks that takes longer than all the rest."""
    if device.type == "cpu" and math.prod(shape) > 0:
        return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.bool).view(shape)
    return torch.zeros(shape, dtype=torch.bool, device=device)


def rles_in_frame(
    logits: Tensor, factor: int, size: Size, output_size: Size, boxes: Tensor | None = None
) -> list[dict[str, Any]]:
    """The masks of `masks_in_frame` as compressed run-length dicts; full-size pictures are never made."""
    empty = torch.zeros((0, 0), dtype=torch.bool, device=logits.device)
    rles = [encode_window(empty, (0, 0), output_size)] * len(logits)
    for window in _windows(logits.detach(), factor, size, output_size, boxes):
        y, x = window.rows.pixels, window.columns.pixels
        drawn = window.draw(empty.new_empty(y.stop - y.start, x.stop - x.start))
        rles[window.mask] = encode_window(drawn, (y.start, x.start), output_size)
    return rles


class _Cut(NamedTuple):
    """A part of an axis: `cells` of the logits, `pixels` of the output, and what leads from one to the other."""

    cells: slice
    pixels: slice
    upsample: Tensor  # [samples, cells]
    resize: Tensor  # [pixels, samples]
    below: Tensor  # int64 [pixels], the samples that a pixel lies between
    above: Tensor
    weight: Tensor  # [pixels, 1] of the one above


class _Window(NamedTuple):
    """The part of mask number `mask` where probabilities can exceed 1/2.

    Args:
        rows, columns: what leads from cells to pixels.
        strips: [samples, pixels] probabilities, resized along the columns alone.
    """

    mask: int
    rows: _Cut
    columns: _Cut
    strips: Tensor

    def draw(self, out: Tensor) -> Tensor:
        """Fills bool [H', W'], the window in pixels."""
        y = self.rows
        block = ROWS if out.device.type == "cpu" else max(len(out), 1)
        for first in range(0, len(out), block):
            part = slice(first, first + block)
            pixels = self.strips.index_select(0, y.below[part])
            pixels.lerp_(self.strips.index_select(0, y.above[part]), y.weight[part])
            torch.gt(pixels, 0.5, out=out[part])
        return out


def _windows(logits: Tensor, factor: int, size: Size, output_size: Size, boxes: Tensor | None) -> Iterator[_Window]:
    height, width = logits.shape[1:]
    vertical = _Axis(height, factor, size[0], output_size[0], logits.device)
    horizontal = _Axis(width, factor, size[1], output_size[1], logits.device)
    # Probabilities are averages of sigmoids of averages of logits: over 1/2 only near positive ones.
    (top, bottom), (left, right) = _extent(logits.amax(dim=2) > 0), _extent(logits.amax(dim=1) > 0)
    spans = torch.stack([top, bottom, left, right], dim=1).tolist()  # the one wait for the device
    limits = [(0, 0, *reversed(output_size))] * len(spans) if boxes is None else _whole_pixels(boxes)
    for index, ((top, bottom, left, right), (x0, y0, x1, y1)) in enumerate(zip(spans, limits, strict=True)):
        y, x = vertical.cut(top, bottom, y0, y1), horizontal.cut(left, right, x0, x1)
        if y is None or x is None:
            continue
        cells = logits[index, y.cells, x.cells]
        samples = (y.upsample @ cells @ x.upsample.T).sigmoid()
        yield _Window(index, y, x, samples @ x.resize.T)


def _whole_pixels(boxes: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).int().tolist()]


class _Axis:
    """One axis on its way from cells by upsampled samples to pixels of the output.

    Args:
        cells: of the padded input.
        factor: samples a cell.
        size: px of the valid part of the input.
        output_size: px of the output.
    """

    def __init__(self, cells: int, factor: int, size: int, output_size: int, device: torch.device) -> None:
        self.cells, self.factor, stride = cells, factor, CELL // factor
        self.upsample = aligned_weights(cells, factor, device)
        pixel = (torch.arange(output_size, device=device, dtype=torch.float64) + 0.5) * (size / output_size) - 0.5
        position = ((pixel.clamp(0, size - 1) - stride // 2) / stride).clamp(0, cells * factor - 1)  # in samples
        self.resize = _hat(position, cells * factor)  # [pixels, samples]
        self.below = position.long()
        self.above = (self.below + 1).clamp(max=cells * factor - 1)
        self.weight = (position - self.below).float()[:, None]
        self.positions = position.tolist()

    def cut(self, first: int, last: int, low: int, high: int) -> _Cut | None:
        """What the cells first to last - 1 can reach of the pixels low to high - 1; None if that is no pixel."""
        # A pixel that lies on cell first - 1 or on cell `last`, or beyond, has no share of the cells between.
        start = max(low, bisect_right(self.positions, (first - 1) * self.factor + self.factor // 2))
        stop = min(high, bisect_left(self.positions, last * self.factor + self.factor // 2))
        if last == first or stop <= start:
            return None
        base = int(self.positions[start])
        top = min(int(self.positions[stop - 1]) + 2, len(self.upsample))
        cells = slice(max(first - 1, 0), min(last + 1, self.cells))
        return _Cut(
            cells,
            slice(start, stop),
            self.upsample[base:top, cells],
            self.resize[start:stop, base:top],
            self.below[start:stop] - base,
            self.above[start:stop] - base,
            self.weight[start:stop],
        )
