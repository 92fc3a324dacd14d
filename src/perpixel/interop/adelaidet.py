"""Weights of the authors' release (AdelaiDet, on detectron2), mapped by name onto our modules.

A rule is a pattern over their names and the names that the same tensor may have here; the first that the network has
is taken. (A convolution and its frozen norm are one module here where a norm is frozen, and two where it is live.)
Another part of the release, such as a mask branch, is another row of `RULES`.

The tensors are used as they are: the release's padding, strides, color order and pixel statistics are settings of
the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perpixel.errors import CheckpointError

HEAD = "proposal_generator.fcos_head."
RESNET = r"backbone\.bottom_up\.res(?P<stage>\d)\.(?P<block>\d+)\."
IGNORED = re.compile(r"(.*\.)?pixel_(mean|std)$|.*\.num_batches_tracked$|mask_head\.(_iter|sizes_of_interest)$")

# (their name, our possible names); `{stage-1}` is a group of the pattern, with arithmetic.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", ("backbone.body.conv1.weight", "backbone.body.conv1.conv.weight")),
    (
        r"backbone\.bottom_up\.stem\.conv1\.norm\.(?P<leaf>\w+)",
        ("backbone.body.bn1.{leaf}", "backbone.body.conv1.norm.{leaf}"),
    ),
    (
        RESNET + r"conv(?P<i>\d)\.weight",
        (
            "backbone.body.layer{stage-1}.{block}.conv{i}.weight",
            "backbone.body.layer{stage-1}.{block}.conv{i}.conv.weight",
        ),
    ),
    (
        RESNET + r"conv(?P<i>\d)\.norm\.(?P<leaf>\w+)",
        (
            "backbone.body.layer{stage-1}.{block}.bn{i}.{leaf}",
            "backbone.body.layer{stage-1}.{block}.conv{i}.norm.{leaf}",
        ),
    ),
    (
        RESNET + r"shortcut\.weight",
        (
            "backbone.body.layer{stage-1}.{block}.downsample.0.weight",
            "backbone.body.layer{stage-1}.{block}.downsample.0.conv.weight",
        ),
    ),
    (
        RESNET + r"shortcut\.norm\.(?P<leaf>\w+)",
        (
            "backbone.body.layer{stage-1}.{block}.downsample.1.{leaf}",
            "backbone.body.layer{stage-1}.{block}.downsample.0.norm.{leaf}",
        ),
    ),
    (r"backbone\.fpn_(?P<kind>lateral|output)(?P<level>\d)\.(?P<leaf>\w+)", ("pyramid.{kind}.{level-3}.{leaf}",)),
    (r"backbone\.top_block\.p(?P<level>\d)\.(?P<leaf>\w+)", ("pyramid.extra.{level-6}.{leaf}",)),
    (re.escape(HEAD) + r"share_tower\.(?P<rest>.+)", ("head.shared_tower.{rest}",)),
    (re.escape(HEAD) + r"cls_tower\.(?P<rest>.+)", ("head.cls_tower.{rest}",)),
    (re.escape(HEAD) + r"bbox_tower\.(?P<rest>.+)", ("head.box_tower.{rest}",)),
    (re.escape(HEAD) + r"cls_logits\.(?P<leaf>\w+)", ("head.logits.{leaf}",)),
    (re.escape(HEAD) + r"ctrness\.(?P<leaf>\w+)", ("head.centerness.{leaf}",)),
    (re.escape(HEAD) + r"bbox_pred\.(?P<leaf>\w+)", ("branches.box.ltrb.{leaf}",)),
    (re.escape(HEAD) + r"scales", ("branches.box.scales",)),
    (r"controller\.(?P<leaf>\w+)", ("branches.mask.controller.{leaf}",)),
    (r"mask_branch\.(?P<rest>(refine|tower)\..+)", ("branches.mask.features.{rest}",)),
    (r"mask_branch\.seg_head\.(?P<rest>.+)", ("branches.mask.semantic.{rest}",)),
    (r"mask_branch\.logits\.(?P<leaf>\w+)", ("branches.mask.semantic.2.{leaf}",)),
)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What did not find its place; both are empty for a supported configuration.

    Args:
        missing: tensors of the network that the file does not have.
        unexpected: tensors of the file that the network does not have.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_weights(net: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Copies the release's tensors into a network, in place.

    Args:
        net: of `perpixel.build`, with the recipe of the same configuration.
        state_dict: as stored in a released `.pth`; either the mapping itself or {"model": mapping}.

    Returns:
        what is left over on either side; everything else has been copied.

    Raises:
        CheckpointError: a tensor has another shape than its place in the network. Nothing is copied then.
    """
    own = net.state_dict()
    renamed, unexpected = rename(state_dict, own)
    for name, tensor in renamed.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name}: the network has {list(own[name].shape)} but the file {list(tensor.shape)}; build the network "
                f"with the recipe of the file's configuration and with num_classes={count_classes(state_dict)}"
            )
    net.load_state_dict(renamed, strict=False)
    missing = [name for name in own if name not in renamed and not IGNORED.match(name)]
    return LoadReport(missing, unexpected)


def is_release(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict carries the names of the authors' release."""
    return any(key.startswith(("proposal_generator.", "backbone.bottom_up.")) for key in _tensors(state_dict))


def count_classes(state_dict: Mapping[str, Any]) -> int | None:
    """Number of classes that released weights predict; None if the file has no classification layer."""
    bias = _tensors(state_dict).get(HEAD + "cls_logits.bias")
    return None if bias is None else len(bias)


def rename(state_dict: Mapping[str, Any], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of `own`, and their names that have no place there."""
    renamed, unexpected = {}, []
    for key, tensor in _regular(_tensors(state_dict)).items():
        place = next((name for name in _candidates(key) if name in own), None)
        if place is not None:
            renamed[place] = tensor
        elif not IGNORED.match(key):
            unexpected.append(key)
    return renamed, unexpected


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = state_dict.get("model", state_dict)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"state dict: expected names and tensors under 'model', got {type(inner).__name__}")
    return {str(key): torch.as_tensor(value) for key, value in inner.items() if not isinstance(value, str | None)}


def _regular(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names with the two irregularities removed: towers number convolution, norm and activation in one row, and
    every level's scale is a tensor of its own."""
    scales = {key: value for key, value in state.items() if re.fullmatch(re.escape(HEAD) + r"scales\.\d+\.scale", key)}
    regular = {_tower_name(key, state): value for key, value in state.items() if key not in scales}
    if scales:
        ordered = sorted(scales, key=lambda key: int(key.split(".")[-2]))
        regular[HEAD + "scales"] = torch.cat([scales[key].reshape(1) for key in ordered])
    return regular


def _tower_name(key: str, state: dict[str, Tensor]) -> str:
    """`…cls_tower.3.weight` → `…cls_tower.1.conv.weight`: the layer's number, then which part of it."""
    match = re.fullmatch(r"(?P<tower>.*_tower\.)(?P<index>\d+)\.(?P<rest>.+)", key)
    if match is None:
        return key
    tower, index, rest = match["tower"], int(match["index"]), match["rest"]
    found = (re.fullmatch(re.escape(tower) + r"(\d+)\.weight", name) for name in state)
    convs = sorted(int(m[1]) for m in found if m is not None and state[m[0]].ndim == 4)
    layer = sum(1 for conv in convs if conv <= index) - 1
    return f"{tower}{layer}.{'conv' if index in convs else 'norm'}.{rest}"


def _candidates(key: str) -> list[str]:
    for pattern, templates in RULES:
        match = re.fullmatch(pattern, key)
        if match is not None:
            return [_fill(template, match) for template in templates]
    return []


def _fill(template: str, match: re.Match[str]) -> str:
    def value(hole: re.Match[str]) -> str:
        text = match[hole["name"]]
        return str(int(text) - int(hole["less"])) if hole["less"] else text

    return re.sub(r"\{(?P<name>\w+)(-(?P<less>\d+))?\}", value, template)
