import pytest
import timm
import torch
from torch import nn

from perpixel.nn.layers import (
    ConvLayer,
    FrozenNormConv2d,
    PerLevelNorm,
    conv_norm_pairs,
    frozen_copy,
    group_norm,
    norm_modules,
)


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for value in (norm.weight.data, norm.bias.data, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_convolution_equals_convolution_then_norm_with_gradients(bias) -> None:
    conv, norm = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias), random_norm(6)
    folded = FrozenNormConv2d(conv, norm)
    x = torch.randn(2, 4, 9, 11)
    torch.testing.assert_close(folded(x), norm(conv(x)), atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(folded(x).square().sum(), conv.weight)[0]
    theirs = torch.autograd.grad(norm(conv(x)).square().sum(), conv.weight)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_a_folded_depthwise_convolution_keeps_the_dtype_of_its_input() -> None:
    folded = FrozenNormConv2d(nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False), random_norm(6))
    x = torch.randn(1, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = folded(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), folded(x), atol=0.1, rtol=0.05)


def test_a_frozen_copy_has_no_parameters_and_the_same_statistics() -> None:
    norm = random_norm(5)
    x = torch.randn(1, 5, 3, 3)
    frozen = frozen_copy(norm).train()
    assert list(frozen.parameters()) == []
    torch.testing.assert_close(frozen(x), norm(x))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv4_conv_small"])
def test_norms_are_paired_with_the_convolution_they_follow(name) -> None:
    body = timm.create_model(name, features_only=True)
    pairs = conv_norm_pairs(body, torch.zeros(1, 3, 64, 64))
    assert len(pairs) == len(list(norm_modules(body)))
    assert len({conv for conv, _ in pairs}) == len(pairs)
    for conv, norm in pairs:
        assert body.get_submodule(conv).out_channels == body.get_submodule(norm).num_features


def test_a_norm_that_follows_no_convolution_has_no_partner() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    assert conv_norm_pairs(net, torch.zeros(1, 3, 8, 8)) == []


def test_each_level_has_its_own_batch_norm_where_asked_for() -> None:
    layer = ConvLayer(4, 4, "bn", levels=3)
    assert isinstance(layer.norm, PerLevelNorm)
    x = torch.randn(2, 4, 5, 5) + 3
    layer(x, 1)
    moved = [norm.num_batches_tracked.item() for norm in layer.norm]
    assert moved == [0, 1, 0]


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (96, 32), (64, 32), (32, 16), (16, 8), (24, 8), (1, 1)])
def test_groups_are_equal_and_have_two_channels_or_more(channels, groups) -> None:
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert torch.isfinite(norm(torch.randn(2, channels, 1, 1))).all()
