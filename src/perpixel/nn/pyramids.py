"""Feature pyramids: C3, C4, C5 of a backbone to maps of equal width, P3 to P7."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from perpixel.config import Config


class PyramidConfig(Config):
    """Args:
    channels: width of every level.
    levels: 5 for P3 to P7; 3 for P3 to P5 (the real-time models).
    extra_from: what P6 is computed from: "p5" (text and release) or "c5" (Table 3.5).
    """

    channels: int = 256
    levels: Literal[3, 5] = 5
    extra_from: Literal["p5", "c5"] = "p5"


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a nearest-neighbor top-down path, 3x3 output convolutions; P6 and P7 by 3x3
    convolutions of stride 2 (section 3.2.2).

    Attributes:
        strides: px, one a level.
        channels: width of every level.
    """

    def __init__(self, in_channels: tuple[int, ...], in_strides: tuple[int, ...], config: PyramidConfig) -> None:
        super().__init__()
        width = config.channels
        self.channels = width
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in in_channels)
        extra_in = (in_channels[-1] if config.extra_from == "c5" else width, width)
        self.extra = nn.ModuleList(
            nn.Conv2d(c, width, 3, stride=2, padding=1) for c in extra_in[: config.levels - len(in_channels)]
        )
        self.extra_from_c5 = config.extra_from == "c5"
        self.strides = in_strides + tuple(in_strides[-1] * 2 ** (i + 1) for i in range(len(self.extra)))
        for conv in (*self.lateral, *self.output, *self.extra):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [B, C_i, H_i, W_i], fine to coarse, to [B, channels, H_l, W_l], fine to coarse."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [output(x) for output, x in zip(self.output, merged, strict=True)]
        coarse = maps[-1] if self.extra_from_c5 else levels[-1]
        for i, conv in enumerate(self.extra):
            coarse = conv(coarse if i == 0 else F.relu(coarse))
            levels.append(coarse)
        return levels
