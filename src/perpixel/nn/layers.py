"""Layers that know no task: norms by name, norms with fixed statistics, and how a network's norms are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

GROUPS = 32  # of group normalisation


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 equal groups, or fewer where the width asks for it: a group has two channels or more (of a
    single one, a map of one cell would have no deviation)."""
    groups = math.gcd(GROUPS, channels)
    return nn.GroupNorm(max(1, groups // 2) if groups == channels else groups, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "gn": group_norm,
    "bn": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
}


class PerLevelNorm(nn.ModuleList):
    """One norm a pyramid level, for towers whose convolutions are shared (the release's "BN head")."""

    def __init__(self, kind: str, channels: int, levels: int) -> None:
        super().__init__(NORMS[kind](channels) for _ in range(levels))


class ConvLayer(nn.Module):
    """3x3 convolution, norm, ReLU: one layer of a tower. `norm`: "gn", "bn" (one a level) or "none"."""

    def __init__(self, channels: int, out_channels: int, norm: str, levels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        norms: dict[str, Callable[[], nn.Module]] = {
            "gn": lambda: group_norm(out_channels),
            "bn": lambda: PerLevelNorm("bn", out_channels, levels),
            "none": nn.Identity,
        }
        self.norm = norms[norm]()
        self.per_level = isinstance(self.norm, PerLevelNorm)

    def forward(self, x: Tensor, level: int) -> Tensor:  # [B, D, H, W]
        norm = self.norm[level] if self.per_level else self.norm  # type: ignore[index]
        x = norm(self.conv(x))
        return F.relu(x, inplace=x.dtype == torch.float32)  # in bf16, CPUs are slower in place


class FrozenNormConv2d(nn.Module):
    """A convolution and the batch norm with fixed statistics that follows it, as one convolution.

    The norm is folded into the weights anew at every call, which costs next to nothing beside a pass over the
    activations, and lets gradients reach the unfolded weights.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = frozen_copy(norm)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()  # [D]
        shift = self.norm.bias - self.norm.running_mean * scale
        if self.conv.bias is not None:
            shift = shift + self.conv.bias * scale
        weight = self.conv.weight * scale[:, None, None, None]
        x = _padded(self.conv, x)
        if x.device.type == "cpu" and self.conv.groups > 1:
            # On CPUs the bf16 backward of depthwise convolutions is up to 5 times slower than the float32 one.
            with torch.autocast("cpu", enabled=False):
                return self.conv._conv_forward(x.float(), weight.float(), shift.float()).to(x.dtype)
        return self.conv._conv_forward(x, weight, shift)


def _padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Input of a timm convolution with TensorFlow's "same" padding, which pads by its input's size; else x."""
    if type(conv) is nn.Conv2d:
        return x
    from timm.layers import pad_same

    return pad_same(x, list(conv.kernel_size), list(conv.stride), list(conv.dilation))  # type: ignore[arg-type]


def frozen_copy(norm: nn.Module) -> FrozenBatchNorm2d:
    """A batch norm as one with fixed statistics and no parameters."""
    frozen = FrozenBatchNorm2d(norm.running_mean.numel(), eps=norm.eps)  # type: ignore[union-attr,operator,arg-type]
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(frozen, name).copy_(getattr(norm, name).detach())
    return frozen


@torch.no_grad()
def conv_norm_pairs(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of every convolution and the batch norm that consumes its output, found by running `example` once.

    The pairing is by data flow, so it holds for any network, whatever its layers are called.
    """
    made_by: dict[int, str] = {}
    kept: list[Tensor] = []  # outputs stay alive, so that no id is used twice
    pairs: list[tuple[str, str]] = []
    hooks = []

    def after_conv(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            made_by[id(output)] = name
            kept.append(output)

        return hook

    def before_norm(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in made_by:
                pairs.append((made_by.pop(id(inputs[0])), name))

        return hook

    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            hooks.append(child.register_forward_hook(after_conv(name)))
        elif isinstance(child, nn.BatchNorm2d | FrozenBatchNorm2d):
            hooks.append(child.register_forward_pre_hook(before_norm(name)))
    training = module.training
    module.eval()(example)
    module.train(training)
    for handle in hooks:
        handle.remove()
    return pairs


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the submodule called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, new)


def activation_of(norm: nn.Module) -> nn.Module:
    """What remains of a norm layer once its norm is folded away: timm's fused layers carry an activation."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def norm_modules(root: nn.Module) -> Iterator[nn.Module]:
    """All normalisation layers of a network."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)
    return (module for module in root.modules() if isinstance(module, kinds))
