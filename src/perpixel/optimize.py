"""A network made ready for inference: norms folded into convolutions, memory layout and number format of the machine.

Folding rests on data flow, not on names: a convolution and the batch norm that alone consumes its output are found by
running the network once. The result is compared with the original on a random input, and dropped if it differs.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perpixel.errors import ConfigError
from perpixel.nn.layers import FrozenNormConv2d, activation_of, conv_norm_pairs, replace_module

Precision = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")
TOLERANCE = 1e-3  # largest accepted change of an output by folding, relative to its largest value
EXAMPLE = (1, 3, 128, 96)  # of the random picture, px; large enough to reach every level


def find_device(device: str | torch.device) -> torch.device:
    """The device called `device`; "auto" is a GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device}: cannot be used ({reason}); use auto, cpu, or cuda with a GPU") from error
    return chosen


def choose_precision(precision: str, device: torch.device) -> Precision:
    """The number format called `precision`; "auto" is bf16 where the hardware multiplies it natively, else fp32.

    Raises:
        ConfigError: another name.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}: expected one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision  # type: ignore[return-value]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively (and not by emulation)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public name yet
    return device.type == "cpu" and supported is not None and bool(supported())


def prepare(net: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """A copy of a detector for inference; the original stays as it is.

    Args:
        net: takes [B, 3, H, W] and gives `Outputs`.
        device: where it will run.
        precision: "fp32", or "bf16" for all layers but those that are handed float32 (a method casts up in front of
            the layers whose outputs are measured in pixels).
    """
    ready = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    ready = fold_norms(ready).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return to_bf16(ready) if precision == "bf16" else ready


@torch.no_grad()
def fold_norms(net: nn.Module) -> nn.Module:
    """The network with every foldable batch norm folded into its convolution, or `net` itself where that would change
    its outputs."""
    example = torch.rand(EXAMPLE, generator=torch.Generator().manual_seed(0)) * 255
    folded = copy.deepcopy(net)
    for name, module in list(folded.named_modules()):
        if isinstance(module, FrozenNormConv2d):
            replace_module(folded, name, _folded(module.conv, module.norm))
    pairs = conv_norm_pairs(folded, example)
    conv_uses, norm_uses = Counter(conv for conv, _ in pairs), Counter(norm for _, norm in pairs)
    for conv, norm in pairs:
        if conv_uses[conv] == norm_uses[norm] == 1:  # not a convolution shared by norms of several levels
            old = folded.get_submodule(norm)
            replace_module(folded, conv, _folded(folded.get_submodule(conv), old))
            replace_module(folded, norm, activation_of(old))
    return folded if _same_outputs(net, folded, example) else net


def _folded(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """The convolution (same class, so same padding) whose output is that of `norm(conv(x))`."""
    merged = copy.deepcopy(conv)
    weight, bias = merged.weight, merged.bias
    assert isinstance(weight, Tensor)
    variance, mean = norm.running_var, norm.running_mean
    assert isinstance(variance, Tensor)
    assert isinstance(mean, Tensor)
    scale = (variance.double() + norm.eps).rsqrt()  # type: ignore[operator]
    shift = -mean.double() * scale
    if isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor):
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if isinstance(bias, Tensor):
        shift = shift + bias.double() * scale
    merged.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).to(weight.dtype), requires_grad=False)
    merged.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    return merged


def _same_outputs(net: nn.Module, other: nn.Module, example: Tensor) -> bool:
    return all(
        float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))
        for a, b in zip(_tensors(net(example)), _tensors(other(example)), strict=True)
    )


def _tensors(outputs: Any) -> list[Tensor]:
    """All tensors of an `Outputs` or another nest of tuples, lists and dicts, in float64."""
    if isinstance(outputs, Tensor):
        return [outputs.double()]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for value in values for t in _tensors(value)] if isinstance(outputs, dict | tuple | list) else []


@torch.no_grad()
def to_bf16(net: nn.Module) -> nn.Module:
    """Layers in bf16, in place. A layer that turns out to be handed float32 keeps its float32 weights."""
    for module in net.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False  # in bf16, CPUs are two to three times slower in place
    layers = [m for m in net.modules() if not any(m.children()) and any(t.is_floating_point() for t in _own(m))]
    originals = {module: {name: p.data for name, p in module.named_parameters()} for module in layers}

    def keep_float32(module: nn.Module, inputs: Any) -> None:
        if inputs[0].dtype == torch.float32:
            module.to(torch.float32)
            for name, value in originals[module].items():  # as they were, not through bf16 and back
                module.get_parameter(name).data = value

    handles = [module.to(torch.bfloat16).register_forward_pre_hook(keep_float32) for module in layers]
    net(torch.zeros(EXAMPLE, device=next(net.parameters()).device))
    for handle in handles:
        handle.remove()
    return net


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
