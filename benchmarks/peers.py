"""torchvision's FCOS in the shapes that a comparison needs: with the same weights, or trained by the same engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from perpixel.nn.backbones import STRIDES, Backbone, BackboneConfig, load_imagenet_weights, stage_modules
from perpixel.nn.layers import replace_module
from perpixel.recipe import Recipe
from perpixel.structures import Batch, Detections, Progress, Size


def fcos_resnet50(num_classes: int, *, frozen_norm: bool, **options: Any) -> FCOS:
    """`torchvision.models.detection.fcos_resnet50_fpn` with random weights, layer by layer.

    Args:
        frozen_norm: `FrozenBatchNorm2d` and frozen stem and first stage, as torchvision builds it around pre-trained
            weights; otherwise live batch norm and everything trained, as it builds it without.
        options: of `FCOS`.
    """
    norm = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
    extra = LastLevelP6P7(256, 256)
    trainable = 3 if frozen_norm else 5
    body = _resnet_fpn_extractor(resnet50(norm_layer=norm), trainable, returned_layers=[2, 3, 4], extra_blocks=extra)
    return FCOS(body, num_classes, **options)


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives torchvision's FCOS R50 the weights of ours (stride in the 3x3, level scales of 1).

    Raises:
        KeyError, RuntimeError: the two are not the same network.
    """
    own = ours.state_dict()
    state = {}
    for name, value in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            state[name] = own[_our_name(name)].reshape(value.shape)
    theirs.load_state_dict(state, strict=False)


def _our_name(name: str) -> str:
    """Our name of a tensor of torchvision's FCOS R50."""
    parts = name.split(".")
    last = parts[-1]
    if name.startswith("backbone.body."):
        *path, layer = parts[2:-1]
        if "downsample" in path:
            return ".".join(["backbone.body", *path, "0", "norm" if layer == "1" else "conv", last])
        kind = "norm" if layer.startswith("bn") else "conv"
        return ".".join(["backbone.body", *path, "conv" + layer[-1], kind, last])
    if name.startswith("backbone.fpn.extra_blocks."):
        return f"pyramid.extra.{int(parts[3][1]) - 6}.{last}"
    if name.startswith("backbone.fpn."):
        return f"pyramid.{'lateral' if parts[2] == 'inner_blocks' else 'output'}.{parts[3]}.{last}"
    tower = "cls" if parts[1] == "classification_head" else "box"
    if parts[2] == "conv":
        index = int(parts[3])
        return f"head.{tower}_tower.{index // 3}.{'norm' if index % 3 else 'conv'}.{last}"
    heads = {"cls_logits": "head.logits", "bbox_reg": "branches.box.ltrb", "bbox_ctrness": "head.centerness"}
    return f"{heads[parts[2]]}.{last}"


class TimmFPN(nn.Module):
    """A backbone as torchvision's detectors want it: a dict of maps P3 to P7, and `out_channels`."""

    def __init__(self, body: nn.Module, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(in_channels), channels, extra_blocks=LastLevelP6P7(channels, channels))
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))
        return maps


class TorchvisionOutputs(NamedTuple):
    """What torchvision's FCOS computes before losses or detections; float32."""

    head: dict[str, Tensor]
    anchors: list[Tensor]
    counts: list[int]  # locations of every level
    sizes: list[Size]


class TorchvisionDetector(nn.Module):
    """torchvision's FCOS behind the protocol of our detectors (forward, loss, decode), so that one engine trains and
    scores both. Every step is torchvision's own: normalisation and padding, network, matching, losses, decoding.

    It knows no regions to ignore: those are background to it.

    Args:
        recipe: gives backbone, weights, width, depth, and what decoding may keep.
        num_classes: C.
        shared_backbone: use this project's backbone module instead of timm's own layers.
    """

    def __init__(self, recipe: Recipe, num_classes: int, *, shared_backbone: bool = False) -> None:
        super().__init__()
        if recipe.head.cls_convs != recipe.head.box_convs or recipe.head.shared_convs:
            raise ValueError("torchvision's FCOS has two towers of one depth: set head.cls_convs = head.box_convs")
        body, channels = (_our_body if shared_backbone else _timm_body)(recipe.backbone)
        width, limits = recipe.pyramid.channels, recipe.decode
        self.num_classes = num_classes
        self.divisor = 32
        self.model = FCOS(
            TimmFPN(body, channels, width),
            num_classes,
            head=FCOSHead(width, 1, num_classes, num_convs=recipe.head.cls_convs),
            image_mean=[value / 255 for value in recipe.backbone.mean],
            image_std=[value / 255 for value in recipe.backbone.std],
            score_thresh=limits.score_threshold,
            nms_thresh=limits.nms_threshold,
            detections_per_img=limits.max_detections,
            topk_candidates=limits.pre_nms_top,
        )

    def forward(
        self, images: Tensor, sizes: Sequence[Size] | None = None, *, auxiliary: bool = False
    ) -> TorchvisionOutputs:
        """Dense predictions of raw RGB pictures [B, 3, H, W], of which `sizes` (H, W) are valid."""
        sizes = sizes or [(images.shape[-2], images.shape[-1])] * len(images)
        transform = self.model.transform  # its own forward would resize
        pictures = [transform.normalize(x[:, :h, :w].float() / 255) for x, (h, w) in zip(images, sizes, strict=True)]
        batch = ImageList(transform.batch_images(pictures).contiguous(memory_format=_layout(images)), list(sizes))
        maps = list(self.model.backbone(batch.tensors).values())
        head = {name: value.float() for name, value in self.model.head(maps).items()}
        anchors = self.model.anchor_generator(batch, maps)
        return TorchvisionOutputs(head, anchors, [m.shape[2] * m.shape[3] for m in maps], batch.image_sizes)

    def loss(
        self, outputs: TorchvisionOutputs, batch: Batch, progress: Progress, logs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """torchvision's three terms under our names."""
        device = outputs.head["cls_logits"].device
        real = [target[~target.ignore].to(device) for target in batch.targets]
        truth = [{"boxes": target.boxes, "labels": target.labels} for target in real]
        found = self.model.compute_loss(truth, outputs.head, outputs.anchors, outputs.counts)
        return {
            "cls": found["classification"],
            "box": found["bbox_regression"],
            "centerness": found["bbox_ctrness"],
        }

    def decode(
        self, outputs: TorchvisionOutputs, sizes: Sequence[Size], output_sizes: Sequence[Size] | None = None
    ) -> list[Detections]:
        """torchvision's detections in the frames of `output_sizes`."""
        head = {name: list(value.split(outputs.counts, dim=1)) for name, value in outputs.head.items()}
        anchors = [list(rows.split(outputs.counts)) for rows in outputs.anchors]
        wanted = list(output_sizes or sizes)
        found = self.model.postprocess_detections(head, anchors, outputs.sizes)
        for rows, size, output_size in zip(found, outputs.sizes, wanted, strict=True):
            rows["boxes"] = resize_boxes(rows["boxes"], list(size), list(output_size))
        return [Detections(size=size, **rows) for size, rows in zip(wanted, found, strict=True)]


def _layout(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _timm_body(config: BackboneConfig) -> tuple[nn.Module, Sequence[int]]:
    """timm's feature extractor with the recipe's weights, its norms frozen by timm's own means."""
    everything: Any = timm.create_model(config.name, features_only=True)
    wanted = tuple(everything.feature_info.reduction().index(stride) for stride in STRIDES)
    body: Any = timm.create_model(config.name, features_only=True, out_indices=wanted)
    load_imagenet_weights(body, config)
    frozen = stage_modules(body, config.frozen_stages)
    for name, module in list(body.named_modules()):
        if name in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if isinstance(module, nn.BatchNorm2d) and (name in frozen or config.norm == "frozen"):
            replace_module(body, name, freeze_batch_norm_2d(module))
    return body, body.feature_info.channels()


def _our_body(config: BackboneConfig) -> tuple[nn.Module, Sequence[int]]:
    body = Backbone(config)
    return body, body.channels
