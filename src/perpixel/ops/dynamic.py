"""The dynamic mask head of CondInst: a tiny network of 1x1 convolutions whose weights are predicted for each instance.

Written as grouped convolution over copies of the features, one an instance, the head is slow, cannot be exported with
a varying number of instances, and costs most of the memory of training. Here it is factored. The features are the same
for all instances of an image, and so are the coordinates once an instance's own place is taken out of them: with
c = (o - p) / s, the first layer is

    W_c c + W_f f + b = [-W_c / s, W_f, b + W_c o / s] [p, f, 1],

one matrix of all instances times one matrix of the image. Later layers are batched products of 8 x 8 matrices.

Letters: N instances, M cells of the map, C channels of the features, θ parameters of an instance: all weights (layer by
layer; out, in; coordinates first), then all biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Values that one layer's activations of a chunk of instances may have: what stays in a core's cache; on a GPU, what
# keeps it busy. `1` instance at least.
CHUNK = {"cpu": 2**19, "cuda": 2**25}


@dataclass(frozen=True)
class MaskHead:
    """Layout of the head.

    Args:
        channels: C of the features that it reads; 0 for none.
        coordinates: whether it reads the two coordinates.
        width: channels of all layers but the last, which has one.
        depth: number of layers; with 1 the head is linear.
    """

    channels: int
    coordinates: bool
    width: int = 8
    depth: int = 3

    @cached_property
    def layers(self) -> list[tuple[int, int]]:
        """(out, in) of every layer."""
        ins = [2 * self.coordinates + self.channels] + [self.width] * (self.depth - 1)
        return list(zip([*ins[1:], 1], ins, strict=True))

    @property
    def size(self) -> int:
        """Number of parameters of an instance."""
        return sum(out * (into + 1) for out, into in self.layers)

    def split(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights [N, out, in] and biases [N, out] of every layer from θ [N, size]."""
        weights = theta.split([out * into for out, into in self.layers] + [out for out, _ in self.layers], dim=1)
        return [
            (weight.reshape(-1, out, into), bias)
            for (out, into), weight, bias in zip(self.layers, weights[: self.depth], weights[self.depth :], strict=True)
        ]

    def planes(self, features: Tensor | None, points: Tensor) -> Tensor:
        """What the instances of an image share, [K, M]: coordinates of the cells, features, and ones for the bias.

        Args:
            features: [C, h, w]; None where the head reads none.
            points: float32 [M, 2] xy of the cells, px.
        """
        parts = [points.T] if self.coordinates else []
        if features is not None and self.channels:
            parts.append(features.flatten(1).float())
        return torch.cat([*parts, torch.ones_like(points[:, :1]).T])

    def logits(self, theta: Tensor, planes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
        """Mask logits [N, M]. Coordinates of instance n at p are (origin_n - p) / scale_n.

        Args:
            theta: [N, size].
            planes: [K, M] of `planes`, of the image that all N instances are in.
            origin: [N, 2] xy, px.
            scale: [N, 2], px.
        """
        with torch.autocast(theta.device.type, enabled=False):
            return self._run(self._fold(theta.float(), origin, scale), planes)

    def many_logits(self, theta: Tensor, planes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
        """The same for any number of instances, some of them at a time."""
        size = self.chunk(planes.shape[1], planes.device)
        with torch.autocast(theta.device.type, enabled=False):
            layers = self._fold(theta.float(), origin, scale)
            parts = [
                self._run([(w[i : i + size], b[i : i + size]) for w, b in layers], planes)
                for i in range(0, max(len(theta), 1), size)
            ]
            return torch.cat(parts)

    def _fold(self, theta: Tensor, origin: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of all layers, the first one's for `planes` (which hold its bias's ones, too)."""
        (weight, bias), *rest = self.split(theta)
        if self.coordinates:
            by_pixel = weight[:, :, :2] / scale[:, None]  # [N, out, 2]
            bias = bias + (by_pixel @ origin[:, :, None])[..., 0]
            weight = torch.cat([-by_pixel, weight[:, :, 2:]], dim=2)
        first = torch.cat([weight, bias[..., None]], dim=2)  # [N, out, K]
        return [(first, bias), *((w, b[..., None]) for w, b in rest)]

    def _run(self, layers: list[tuple[Tensor, Tensor]], planes: Tensor) -> Tensor:
        (first, _), *rest = layers
        x = (first.flatten(0, 1) @ planes).view(*first.shape[:2], planes.shape[1])
        for weight, bias in rest:
            x = torch.baddbmm(bias, weight, x.relu_())
        return x[:, 0]

    def chunk(self, cells: int, device: torch.device) -> int:
        """How many instances to compute at a time on a map of so many cells."""
        return max(1, CHUNK.get(device.type, CHUNK["cuda"]) // (self.width * cells))
