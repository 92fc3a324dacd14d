"""Batch norm over the pictures of all processes, on any device and backend.

torch's own works on GPUs alone. This one does the same sums with plain collectives, so that a run on CPUs through
gloo learns the same as one process with the whole batch, up to rounding, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perpixel.distributed import is_distributed
from perpixel.nn.layers import activation_of

SUMMED = (0, 2, 3)  # what statistics sum over: batch, rows, columns


def _per_channel(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], variance [D] and number of values a channel [1] of [B, D, H, W] over all processes.

    Each process reduces its own part about its own mean, so that no digits cancel, and tells the others.
    """
    own_mean = x.mean(SUMMED)
    own_squares = (x - _per_channel(own_mean)).square().sum(SUMMED)
    own = torch.cat([own_mean, own_squares, own_mean.new_tensor([x.numel() // x.shape[1]])])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    means, squares, counts = torch.stack(parts).split([x.shape[1], x.shape[1], 1], dim=1)  # [processes, ·]
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    var = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, var, count


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with statistics of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float()
        mean, var, count = _statistics(wide)
        scale = (var + eps).rsqrt()
        y = (wide - _per_channel(mean)) * _per_channel(scale * weight) + _per_channel(bias)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        grad = grads[0].float()
        unit = (x.float() - _per_channel(mean)) * _per_channel(scale)
        own_bias, own_weight = grad.sum(SUMMED), (grad * unit).sum(SUMMED)
        sums = torch.cat([own_bias, own_weight])
        dist.all_reduce(sums)  # the statistics of this process's pictures enter the losses of all
        all_bias, all_weight = (sums / count).chunk(2)
        inner = grad - _per_channel(all_bias) - unit * _per_channel(all_weight)
        return (inner * _per_channel(scale * weight)).to(x.dtype), own_weight, own_bias, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [B, D, H, W] whose statistics in training come from the pictures of all processes.

    In evaluation, and in a single process, it is the norm that it was made from; names of parameters and buffers are
    the same. Padding differs between processes whose pictures differ in size, and takes part in the statistics.

    Args:
        norm: the layer to replace; parameters and buffers are shared with it. timm's layers carry an activation,
            which is kept.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.after = activation_of(norm)
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return self.after(super().forward(x))
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
            self.running_mean.lerp_(mean, rate)  # type: ignore[union-attr]
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), rate)  # type: ignore[union-attr]
        return self.after(y)


def synchronize_norms(module: nn.Module) -> nn.Module:
    """Replaces, in place, every batch norm below `module` that learns; the module itself is returned."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SyncBatchNorm2d):
            setattr(module, name, SyncBatchNorm2d(child))
        else:
            synchronize_norms(child)
    return module
