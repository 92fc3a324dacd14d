"""Networks made ready for inference compute what they computed before."""

import pytest
import torch
from torch import Tensor, nn

from perpixel.errors import ConfigError
from perpixel.nn.layers import FrozenNormConv2d
from perpixel.optimize import (
    choose_precision,
    find_device,
    fold_norms,
    has_fast_bf16,
    prepare,
)
from perpixel.recipe import build
from tiny_run import tiny_net, tiny_recipe

CPU = torch.device("cpu")


def shake_norms(net: nn.Module) -> nn.Module:
    """Statistics and affine parameters as training leaves them."""
    for module in net.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(hasattr(module, "running_var") for module in net.modules())


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ([], 0),  # frozen norms, TensorFlow's padding
        (["backbone.norm=live"], 0),
        (["backbone.name=resnet18", "backbone.norm=live", "backbone.frozen_stages=0"], 0),
        (["head.norm=bn"], 20),  # two towers of two layers and five levels share convolutions: not foldable
    ],
)
def test_folding_keeps_every_output(changes: list[str], left: int) -> None:
    net = shake_norms(build("fcos/lite0", 3, ["pyramid.channels=48", *changes]))
    folded = fold_norms(net)
    assert norms(folded) == left
    assert not any(isinstance(module, FrozenNormConv2d) for module in folded.modules())
    images = torch.rand(1, 3, 96, 160) * 255
    with torch.no_grad():
        for before, after in zip(net(images)[:3], folded(images)[:3], strict=True):
            assert torch.allclose(before, after, atol=1e-4, rtol=1e-4)


class Twice(nn.Module):
    """The convolution's output is used beside the norm's, so folding would change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.conv(images)
        return self.norm(x), {"raw": x}


def test_a_network_that_folding_would_change_is_left_alone() -> None:
    net = shake_norms(Twice())
    assert fold_norms(net) is net


def test_a_norm_without_parameters_is_folded() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    net[1].running_mean.normal_()
    net.eval()
    folded = fold_norms(net)
    images = torch.rand(2, 3, 5, 5)
    assert norms(folded) == 0
    assert torch.allclose(net(images), folded(images), atol=1e-5)


def test_bf16_keeps_float32_where_a_layer_is_handed_float32() -> None:
    net = tiny_net()
    wanted = net.branches.box.ltrb.weight.clone()
    ready = prepare(net, CPU, "bf16")
    kinds = {name: p.dtype for name, p in ready.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        "branches.box.ltrb.weight",
        "branches.box.ltrb.bias",
        "branches.box.scales",
    }
    assert torch.equal(ready.branches.box.ltrb.weight, wanted)  # not through bf16 and back
    outputs = ready(torch.rand(1, 3, 64, 64) * 255)
    assert outputs.logits.dtype == outputs.ltrb.dtype == torch.float32


def test_bf16_is_close_to_float32() -> None:
    net = tiny_net()
    images = torch.rand(1, 3, 96, 96) * 255
    exact, rough = prepare(net, CPU, "fp32")(images), prepare(net, CPU, "bf16")(images)
    assert (exact.logits - rough.logits).abs().max() < 0.05 * exact.logits.abs().max()
    assert (exact.ltrb - rough.ltrb).abs().max() < 0.05 * exact.ltrb.abs().max()


def test_the_original_network_stays_as_it_is() -> None:
    net = tiny_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepare(net, CPU, "bf16")
    assert net.training
    assert all(p.requires_grad for p in net.head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_precision_auto_asks_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_precision("auto", CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_precision("auto", CPU) == "fp32"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not has_fast_bf16(CPU)
    assert choose_precision("bf16", CPU) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_precision("auto", torch.device("cuda")) == "fp32"


def test_unknown_devices_and_precisions_are_named() -> None:
    assert find_device("cpu") == CPU
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="device=tpu: cannot be used"):
        find_device("tpu")
    with pytest.raises(ConfigError, match="device=cuda:99"):
        find_device("cuda:99")
    with pytest.raises(ConfigError, match="precision=fp8: expected one of auto, fp32, bf16"):
        choose_precision("fp8", CPU)


def test_recipe_of_the_tiny_run_is_valid() -> None:
    assert tiny_recipe().pyramid.channels == 48
