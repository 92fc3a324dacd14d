"""Resize, multi-scale, crop, mirror, large-scale jitter and color jitter.

A random view of a picture is planned from its size alone, then applied to pixels, boxes, polygons and keypoints. So
the padded size of a batch is known before any file is opened, polygons are drawn once at their final size, and a
JPEG need not be decoded larger than the view. Pixels go through torchvision's v2 kernels. Coordinates do not go through
tv_tensors: those mirror a box at W - x but a keypoint at W - 1 - x, while here a point is a place on the plane.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor

from perpixel.data.images import fit_size, resize
from perpixel.structures import Size

Array = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class View:
    """A part of a stored picture, shown at some size and possibly mirrored: cut, then resized, then mirrored.

    Args:
        source: (H, W) of the stored picture, px.
        crop: top, left, height and width of the part, px of the stored picture.
        size: (H, W) of the result, px.
        mirrored: left and right exchanged.
    """

    source: Size
    crop: tuple[int, int, int, int]
    size: Size
    mirrored: bool = False

    @classmethod
    def whole(cls, source: Size, size: Size | None = None) -> "View":
        """The whole picture, at its own size or another one."""
        return cls(source, (0, 0, *source), size or source)

    @property
    def scale(self) -> tuple[float, float]:
        """Result px a stored px, along x and y."""
        return self.size[1] / self.crop[3], self.size[0] / self.crop[2]

    @property
    def source_size_needed(self) -> Size:
        """(H, W) px of the whole stored picture at which the part has the size of the result."""
        (sx, sy), (height, width) = self.scale, self.source
        return math.ceil(height * sy), math.ceil(width * sx)

    def points(self, points: Array) -> Array:
        """Points [..., 2] xy of the stored picture in the frame of the result, px, not clipped."""
        top, left = self.crop[:2]
        shown = (points - np.array([left, top], points.dtype)) * np.array(self.scale, points.dtype)
        if self.mirrored:
            shown[..., 0] = self.size[1] - shown[..., 0]
        return shown

    def boxes(self, boxes: Array) -> Array:
        """Boxes [N, 4] xyxy of the stored picture in the frame of the result, px, not clipped."""
        corners = self.points(boxes.reshape(-1, 2, 2))
        if self.mirrored:
            corners[:, :, 0] = corners[:, ::-1, 0]
        return corners.reshape(-1, 4)

    def stored_indices(self, stride: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows and columns of the stored picture under the centers of the result's pixels [stride // 2 :: stride]."""
        top, left = self.crop[:2]
        sx, sy = self.scale
        y = np.arange(stride // 2, self.size[0], stride) + 0.5
        x = np.arange(stride // 2, self.size[1], stride) + 0.5
        x = self.size[1] - x if self.mirrored else x
        rows, columns = np.floor(y / sy + top), np.floor(x / sx + left)
        return rows.astype(np.int64), columns.astype(np.int64)

    def image(self, image: Tensor) -> Tensor:
        """The view of a picture uint8 [3, h, w], which may have been decoded at a reduced size."""
        ky, kx = image.shape[1] / self.source[0], image.shape[2] / self.source[1]
        top, left, height, width = self.crop
        y0, x0 = round(top * ky), round(left * kx)
        part = image[:, y0 : max(y0 + 1, round((top + height) * ky)), x0 : max(x0 + 1, round((left + width) * kx))]
        mirror_first = self.mirrored and part[0].numel() < math.prod(self.size)  # whichever moves fewer bytes
        shown = resize(part.flip(2) if mirror_first else part, self.size)
        return shown.flip(2) if self.mirrored and not mirror_first else shown


def plan_view(
    source: Size,
    rng: np.random.Generator,
    *,
    short_side: Sequence[int],
    max_size: int,
    flip: float = 0.0,
    crop: float = 1.0,
    scale_jitter: tuple[float, float] | None = None,
) -> View:
    """A random view of a picture.

    Args:
        source: (H, W) of the stored picture, px.
        rng: where the random numbers come from.
        short_side: lengths of the shorter side, px; one is drawn (multi-scale).
        max_size: largest length of the longer side, px.
        flip: probability of a mirror image.
        crop: smallest part of each side that a random cut keeps; 1 keeps all.
        scale_jitter: range of a factor on the size. Above 1, a random part of the enlarged picture is kept, of the
            size that the picture would have had; below 1, the picture is smaller.
    """
    height, width = source
    if crop < 1:
        height = max(1, round(height * rng.uniform(crop, 1)))
        width = max(1, round(width * rng.uniform(crop, 1)))
    size = fit_size((height, width), short_side[int(rng.integers(len(short_side)))], max_size)
    if scale_jitter is not None:
        factor = rng.uniform(*scale_jitter)
        if factor > 1:
            height, width = max(1, round(height / factor)), max(1, round(width / factor))
        else:
            size = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    top = int(rng.integers(source[0] - height + 1))
    left = int(rng.integers(source[1] - width + 1))
    return View(source, (top, left, height, width), size, bool(rng.random() < flip))


def clip_boxes(boxes: Array, size: Size) -> tuple[Array, Array]:
    """Boxes [N, 4] xyxy cut at the frame `size` (H, W), and the part of each area [N] that is left, 0..1."""
    limits = np.array([size[1], size[0], size[1], size[0]], boxes.dtype)
    clipped = np.clip(boxes, 0, limits)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    left = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    return clipped, left / np.maximum(area, 1e-12)


def show_keypoints(view: View, keypoints: Array, partner: npt.NDArray[np.int64]) -> Array:
    """Keypoints [N, K, 3] (x, y, v) in the frame of the view; what falls outside is as if not labelled, (0, 0, 0).

    Args:
        view: the view.
        keypoints: in the frame of the stored picture.
        partner: [N, K]; which keypoint of the object a mirror turns each one into (left into right).
    """
    shown = keypoints.copy()
    shown[..., :2] = view.points(keypoints[..., :2])
    if view.mirrored:
        shown = np.take_along_axis(shown, partner[..., None], axis=1)
    x, y, v = shown[..., 0], shown[..., 1], shown[..., 2]
    inside = (v > 0) & (x >= 0) & (y >= 0) & (x <= view.size[1]) & (y <= view.size[0])
    shown[~inside] = 0
    return shown


def jitter_colors(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation times 1 - strength to 1 + strength, in random order; 0 changes nothing."""
    if strength <= 0:
        return image
    changes = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation]
    values = rng.uniform(1 - strength, 1 + strength, len(changes))
    for index in rng.permutation(len(changes)):
        image = changes[index](image, float(values[index]))
    return image


def pad_to(images: Sequence[Tensor], size: Size) -> Tensor:
    """Pictures [3, h, w] at the top left of one batch uint8 [B, 3, H, W], zeros beyond. Memory order B, H, W, 3."""
    batch = torch.empty(len(images), *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for row, image in zip(batch, images, strict=True):
        height, width = image.shape[1:]
        row[:, :height, :width] = image
        row[:, height:] = 0
        row[:, :height, width:] = 0
    return batch
