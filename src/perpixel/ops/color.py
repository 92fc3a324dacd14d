"""Color of pixels and of their neighbors (section 6.2.2), in torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# sRGB primaries to CIE XYZ, and the white of daylight D65.
XYZ_OF_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)


def lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b* [..., 3, H, W] of sRGB [..., 3, H, W] in 0..255: equal distances look about equally different."""
    x = rgb.float() / 255
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055).clamp(min=0) ** 2.4, x / 12.92)
    matrix = torch.tensor(XYZ_OF_RGB, device=rgb.device) / torch.tensor(WHITE, device=rgb.device)[:, None]
    t = torch.einsum("ij,...jhw->...ihw", matrix, linear)
    x, y, z = torch.where(t > 0.008856, t.clamp(min=1e-9) ** (1 / 3), 7.787 * t + 16 / 116).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def coarse_lab(images: Tensor, stride: int) -> Tensor:
    """L*a*b* [B, 3, H/stride, W/stride] of the mean color of every stride x stride block of raw RGB images; means are
    cut to whole numbers, as in the release."""
    return lab(F.avg_pool2d(images.float(), stride).floor())


def half_neighborhood(size: int, dilation: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) to half of the size x size - 1 neighbors of a pixel, so that every edge occurs once."""
    reach = range(-(size // 2), size // 2 + 1)
    return [(dilation * dy, dilation * dx) for dy in reach for dx in reach if (dy, dx) > (0, 0)]


def ends(height: int, width: int, offset: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Rows and columns of the first ends of all edges by an offset within a map, and of their second ends."""
    dy, dx = offset
    first = slice(0, max(height - dy, 0)), slice(max(-dx, 0), max(width - max(dx, 0), 0))
    second = slice(min(dy, height), height), slice(max(dx, 0), max(width - max(-dx, 0), 0))
    return first, second


def edge_similarity(colors: Tensor, offset: tuple[int, int], theta: float = 2.0) -> Tensor:
    """Color similarity [..., H - |dy|, W - |dx|] of all edges by an offset (eq. 6.7).

    Args:
        colors: [..., 3, H, W] L*a*b*.
        offset: dy >= 0, dx.
        theta: color distance at which the similarity has fallen to 1/e.
    """
    (y0, x0), (y1, x1) = ends(colors.shape[-2], colors.shape[-1], offset)
    distance = (colors[..., y0, x0] - colors[..., y1, x1]).square().sum(-3).sqrt()
    return (-distance / theta).exp()


def similar_edges(colors: Tensor, offsets: Sequence[tuple[int, int]], threshold: float, theta: float = 2.0) -> Tensor:
    """bool [..., E, H, W]: whether the edge from a pixel by each of E offsets has a similarity of at least `threshold`;
    False where it leaves the map."""
    height, width = colors.shape[-2:]
    found = torch.zeros((*colors.shape[:-3], len(offsets), height, width), dtype=torch.bool, device=colors.device)
    for index, offset in enumerate(offsets):
        y, x = ends(height, width, offset)[0]
        found[..., index, y, x] = edge_similarity(colors, offset, theta) >= threshold
    return found
