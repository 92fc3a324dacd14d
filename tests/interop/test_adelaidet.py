"""The authors' names onto ours: whole configurations of the release, and single tensors checked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import perpixel.interop
from perpixel.errors import CheckpointError
from perpixel.interop.adelaidet import count_classes, is_release, load_weights
from perpixel.recipe import build

# Configuration of the release: our recipe and what to change in it. (DLA and deformable ones are not supported yet.)
CONFIGS: dict[str, tuple[str, list[str]]] = {
    "R_50_1x": ("fcos/r50_1x", []),
    "R_50_1x_iou": ("fcos/r50_1x", ["head.quality=iou"]),
    "MS_R_50_2x": ("fcos/ms_r50_2x", []),
    "MS_R_101_2x": ("fcos/r50_1x", ["backbone.name=resnet101"]),
    "MS_X_101_32x8d_2x": ("fcos/r50_1x", ["backbone.name=resnext101_32x8d", "backbone.stride_in_1x1=false"]),
    "FCOS_RT__MS_R_50_4x_syncbn": (
        "fcos/r50_1x",
        ["backbone.norm=live", "backbone.frozen_stages=0", "pyramid.levels=3"],
    ),
    "FCOS_RT__MS_R_50_4x_syncbn_bn_head": (
        "fcos/r50_1x",
        ["backbone.norm=live", "backbone.frozen_stages=0", "pyramid.levels=3", "head.norm=bn"],
    ),
}


def released(rows: list[list[Any]]) -> dict[str, Tensor]:
    """Tensors of the recorded names and shapes; entry j of tensor i is 1000 i + j."""
    result = {}
    for i, row in enumerate(rows):
        shape = row[1]
        count = torch.Size(shape).numel()
        result[row[0]] = (1000 * i + torch.arange(count) % 1000).float().reshape(shape)
    return result


@pytest.mark.parametrize("config", CONFIGS)
def test_every_tensor_of_a_released_configuration_finds_its_place(shared: Path, config: str) -> None:
    rows = json.loads((shared / "parity" / "keys" / f"FCOS-Detection__{config}.json").read_text())["keys"]
    recipe, changes = CONFIGS[config]
    net = build(recipe, 80, changes)
    report = load_weights(net, {"model": released(rows)})
    assert report.missing == []
    assert report.unexpected == []
    trained = sum(torch.Size(row[1]).numel() for row in rows if not row[0].endswith("num_batches_tracked"))
    ours = sum(v.numel() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked"))
    assert ours == trained


PLACES = {  # by hand, from the two sources
    "backbone.bottom_up.stem.conv1.weight": "backbone.body.conv1.conv.weight",
    "backbone.bottom_up.stem.conv1.norm.running_var": "backbone.body.conv1.norm.running_var",
    "backbone.bottom_up.res2.0.shortcut.weight": "backbone.body.layer1.0.downsample.0.conv.weight",
    "backbone.bottom_up.res2.0.shortcut.norm.bias": "backbone.body.layer1.0.downsample.0.norm.bias",
    "backbone.bottom_up.res5.2.conv3.weight": "backbone.body.layer4.2.conv3.conv.weight",
    "backbone.bottom_up.res4.5.conv2.norm.running_mean": "backbone.body.layer3.5.conv2.norm.running_mean",
    "backbone.fpn_lateral3.weight": "pyramid.lateral.0.weight",
    "backbone.fpn_output5.bias": "pyramid.output.2.bias",
    "backbone.top_block.p7.weight": "pyramid.extra.1.weight",
    "proposal_generator.fcos_head.cls_tower.0.weight": "head.cls_tower.0.conv.weight",
    "proposal_generator.fcos_head.cls_tower.10.weight": "head.cls_tower.3.norm.weight",
    "proposal_generator.fcos_head.bbox_tower.9.bias": "head.box_tower.3.conv.bias",
    "proposal_generator.fcos_head.bbox_tower.4.bias": "head.box_tower.1.norm.bias",
    "proposal_generator.fcos_head.cls_logits.weight": "head.logits.weight",
    "proposal_generator.fcos_head.ctrness.bias": "head.centerness.bias",
    "proposal_generator.fcos_head.bbox_pred.weight": "branches.box.ltrb.weight",
}


def test_tensors_land_where_a_reader_of_both_sources_puts_them(shared: Path) -> None:
    rows = json.loads((shared / "parity" / "keys" / "FCOS-Detection__R_50_1x.json").read_text())["keys"]
    state = released(rows)
    net = build("fcos/r50_1x", 80)
    load_weights(net, state)
    own = net.state_dict()
    for theirs, ours in PLACES.items():
        assert torch.equal(own[ours], state[theirs]), (theirs, ours)
    scales = [state[f"proposal_generator.fcos_head.scales.{level}.scale"].item() for level in range(5)]
    assert own["branches.box.scales"].tolist() == scales


HEAD = "proposal_generator.fcos_head."


def head_of(classes: int = 3) -> dict[str, Tensor]:
    """The head of a small made-up network: one classification layer with a norm a level, a shared tower without."""
    return {
        HEAD + "share_tower.0.weight": torch.full((8, 8, 3, 3), 1.0),
        HEAD + "share_tower.0.bias": torch.full((8,), 2.0),
        HEAD + "share_tower.1.0.weight": torch.full((8,), 3.0),
        HEAD + "share_tower.1.2.running_mean": torch.full((8,), 4.0),
        HEAD + "share_tower.3.bias": torch.full((8,), 5.0),
        HEAD + "share_tower.3.weight": torch.full((8, 8, 3, 3), 6.0),
        HEAD + "cls_logits.bias": torch.full((classes,), 7.0),
    }


SMALL = [
    *("backbone.name=resnet18", "backbone.stride_in_1x1=false", "pyramid.channels=8", "pyramid.levels=3"),
    *("head.shared_convs=2", "head.cls_convs=0", "head.box_convs=0", "head.norm=bn"),
]


def test_shared_towers_and_norms_of_single_levels_are_found() -> None:
    net = build("fcos/r50_1x", 3, SMALL)
    report = load_weights(net, head_of())
    own = net.state_dict()
    assert report.unexpected == []
    assert own["head.shared_tower.0.conv.weight"].unique().tolist() == [1]
    assert own["head.shared_tower.0.norm.0.weight"].unique().tolist() == [3]
    assert own["head.shared_tower.0.norm.2.running_mean"].unique().tolist() == [4]
    assert own["head.shared_tower.1.conv.bias"].unique().tolist() == [5]
    assert "pyramid.lateral.0.weight" in report.missing
    assert not any("num_batches_tracked" in name for name in report.missing)


def test_another_number_of_classes_is_an_error_that_changes_nothing() -> None:
    net = build("fcos/r50_1x", 2, SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"head.logits.bias: the network has \[2\] but the file \[3\].*num_classes=3"
    ):
        load_weights(net, head_of())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_pixel_statistics_are_ignored_and_strangers_reported() -> None:
    state = {
        **head_of(),
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.zeros(3, 1, 1),
        "other.weight": torch.ones(2),
    }
    assert load_weights(build("fcos/r50_1x", 3, SMALL), state).unexpected == ["other.weight"]


def test_a_release_is_recognized_by_its_names() -> None:
    assert is_release(head_of())
    assert is_release({"model": head_of(), "iteration": 7})
    assert not is_release({"head.logits.bias": torch.zeros(3)})
    assert count_classes(head_of(5)) == 5
    assert count_classes({"head.logits.bias": torch.zeros(3)}) is None
    with pytest.raises(CheckpointError, match="'model'"):
        is_release({"model": [1]})


def test_the_module_is_reached_through_its_package() -> None:
    assert perpixel.interop.adelaidet.load_weights is load_weights
    assert "adelaidet" in dir(perpixel.interop)
    with pytest.raises(AttributeError, match="tensorflow"):
        _ = perpixel.interop.tensorflow
