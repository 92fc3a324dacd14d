import pytest
import torch

from perpixel.nn.heads import Head, HeadConfig
from perpixel.nn.pyramids import FPN, PyramidConfig


def maps(height: int = 64, width: int = 96) -> list[torch.Tensor]:
    return [torch.randn(1, c, height // s, width // s) for c, s in ((8, 8), (16, 16), (32, 32))]


@pytest.mark.parametrize(("levels", "strides"), [(5, (8, 16, 32, 64, 128)), (3, (8, 16, 32))])
def test_levels_have_one_width_and_halve_in_size(levels, strides) -> None:
    fpn = FPN((8, 16, 32), (8, 16, 32), PyramidConfig(channels=12, levels=levels))
    out = fpn(maps(128, 256))
    assert fpn.strides == strides
    assert [tuple(m.shape) for m in out] == [(1, 12, 128 // s, 256 // s) for s in strides]


def test_p6_comes_from_p5_or_c5() -> None:
    inputs = maps(128, 128)
    for source, width in (("p5", 12), ("c5", 32)):
        fpn = FPN((8, 16, 32), (8, 16, 32), PyramidConfig(channels=12, extra_from=source))
        assert fpn.extra[0].in_channels == width
        out = fpn(inputs)
        expected = fpn.extra[0]({"p5": out[2], "c5": inputs[2]}[source])
        torch.testing.assert_close(out[3], expected)
        torch.testing.assert_close(out[4], fpn.extra[1](out[3].relu()))


def test_each_level_sees_all_coarser_ones() -> None:
    fpn = FPN((8, 16, 32), (8, 16, 32), PyramidConfig(channels=12))
    inputs = [m.requires_grad_() for m in maps()]
    fpn(inputs)[0].sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in inputs)


def test_odd_sizes_are_upsampled_to_their_lateral() -> None:
    fpn = FPN((8, 16, 32), (8, 16, 32), PyramidConfig(channels=12))
    odd = [torch.randn(1, 8, 13, 7), torch.randn(1, 16, 7, 4), torch.randn(1, 32, 4, 2)]
    assert [tuple(m.shape[-2:]) for m in fpn(odd)] == [(13, 7), (7, 4), (4, 2), (2, 1), (1, 1)]


def test_shared_layers_stand_in_front_of_both_towers() -> None:
    head = Head(16, 3, 5, HeadConfig(shared_convs=2, cls_convs=0, box_convs=1))
    x = [torch.randn(1, 16, 4, 4)]
    cls, box = head.towers(x)
    shared = head.shared_tower(x[0], 0)
    torch.testing.assert_close(cls[0], shared)
    torch.testing.assert_close(box[0], head.box_tower(shared, 0))


def test_classification_starts_at_its_prior() -> None:
    head = Head(16, 3, 5, HeadConfig(prior=0.02, quality="none"))
    assert head.centerness is None
    torch.testing.assert_close(head.logits.bias.sigmoid(), torch.full((3,), 0.02))
