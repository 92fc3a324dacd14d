"""The trunk's heads, shared by all levels: towers, classification, a location's quality (center-ness or IoU)."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from perpixel.config import Config
from perpixel.nn.layers import ConvLayer


class HeadConfig(Config):
    """Args:
    shared_convs: layers in front of both towers.
    cls_convs, box_convs: layers of each tower.
    norm: of the towers: "gn", "bn" (one a level) or "none".
    prior: probability that classification starts with everywhere (focal loss's initialisation).
    quality: what the branch beside the box tower learns: "centerness", "iou", or "none" for no such branch.
    quality_loss: "bce", or "l1" (Table 3.4).
    """

    shared_convs: int = 0
    cls_convs: int = 4
    box_convs: int = 4
    norm: Literal["gn", "bn", "none"] = "gn"
    prior: float = 0.01
    quality: Literal["centerness", "iou", "none"] = "centerness"
    quality_loss: Literal["bce", "l1"] = "bce"


class Tower(nn.ModuleList):
    """A stack of 3x3 convolutions with norm and ReLU; with no layers, the identity."""

    def __init__(self, channels: int, depth: int, norm: str, levels: int) -> None:
        super().__init__(ConvLayer(channels, channels, norm, levels) for _ in range(depth))

    def forward(self, x: Tensor, level: int) -> Tensor:
        for layer in self:
            x = layer(x, level)
        return x


class Head(nn.Module):
    """Towers and the two predictions that every method has. Branches read the box tower's features."""

    def __init__(self, channels: int, num_classes: int, levels: int, config: HeadConfig) -> None:
        super().__init__()
        self.shared_tower = Tower(channels, config.shared_convs, config.norm, levels)
        self.cls_tower = Tower(channels, config.cls_convs, config.norm, levels)
        self.box_tower = Tower(channels, config.box_convs, config.norm, levels)
        self.logits = prediction(channels, num_classes, bias=-math.log((1 - config.prior) / config.prior))
        self.centerness = prediction(channels, 1) if config.quality != "none" else None
        for module in self.modules():
            if isinstance(module, ConvLayer):
                init_conv(module.conv)

    def towers(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Features [B, D, H_l, W_l] of the classification tower and of the box tower for every level."""
        shared = [self.shared_tower(x, level) for level, x in enumerate(levels)]
        return (
            [self.cls_tower(x, level) for level, x in enumerate(shared)],
            [self.box_tower(x, level) for level, x in enumerate(shared)],
        )


def prediction(channels: int, outputs: int, bias: float = 0.0) -> nn.Conv2d:
    """A 3x3 convolution that predicts `outputs` numbers a location: small weights, so that it starts at `bias`."""
    return init_conv(nn.Conv2d(channels, outputs, 3, padding=1), bias)


def init_conv(conv: nn.Conv2d, bias: float = 0.0) -> nn.Conv2d:
    """RetinaNet's initialisation of heads: normal weights of deviation 0.01 and a constant bias."""
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
    return conv
