"""Optimizers with parameter groups by role, and the running mean of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perpixel.engine.settings import TrainConfig
from perpixel.nn.layers import norm_modules

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainConfig], torch.optim.Optimizer]] = {
    "sgd": lambda groups, config: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True),
    "adamw": lambda groups, config: torch.optim.AdamW(groups, lr=config.lr, fused=True),
}


def parameter_groups(net: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one weight decay and one learning rate.

    Every group has `base_lr`, which the schedule multiplies. Groups and their members come in the network's order.
    """
    of_norms = {id(p) for module in norm_modules(net) for p in module.parameters(recurse=False)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = config.decay_norm if id(parameter) in of_norms else config.decay_bias or not name.endswith("bias")
        decay = config.weight_decay if decays else 0.0
        lr = config.lr * (config.backbone_lr_factor if name.startswith("backbone.") else 1.0)
        group = groups.setdefault((decay, lr), {"params": [], "weight_decay": decay, "lr": lr, "base_lr": lr})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a run; its learning rates are set anew before every step by `set_rate`."""
    return OPTIMIZERS[config.optimizer](parameter_groups(net, config), config)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rate of every group: `factor` times its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class Ema:
    """Running mean of a network's weights.

    The decay grows from 0.1 to its final value over the first steps, so that the mean forgets the untrained weights
    even in a short run. Integer buffers, and buffers that batch norm averages already, are copied.

    Args:
        net: the network that is trained.
        decay: share of the mean that a step keeps.

    Attributes:
        net: a copy whose parameters are the mean, for validation.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Takes in the weights after step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean: list[Tensor] = [p.data for p in self.net.parameters()]
        torch._foreach_lerp_(mean, [p.data for p in net.parameters()], 1.0 - decay)
        for kept, new in zip(self.net.buffers(), net.buffers(), strict=True):
            kept.copy_(new)
