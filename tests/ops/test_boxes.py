import pytest
import torch

from perpixel.ops.boxes import boxes_from_ltrb, centerness_of, ltrb_from_boxes, rescale_boxes


def test_boxes_and_distances_invert_each_other() -> None:
    points, boxes = torch.rand(7, 2) * 100, torch.rand(7, 4) * 100
    torch.testing.assert_close(boxes_from_ltrb(points, ltrb_from_boxes(points, boxes)), boxes, atol=1e-4, rtol=0)


def test_centerness_is_one_in_the_middle_half_at_the_quarter_and_zero_at_the_border() -> None:
    ltrb = torch.tensor([[2.0, 2, 2, 2], [1, 1, 4, 4], [1, 2, 4, 2], [0, 2, 4, 2], [-1, 2, 5, 2]])
    expected = torch.tensor([1.0, 0.25, 0.5, 0.0, 0.0])  # eq. 3.3
    torch.testing.assert_close(centerness_of(ltrb), expected)


def test_rescaling_stretches_each_axis_and_clips() -> None:
    boxes = torch.tensor([[-10.0, 10, 50, 120]])
    assert rescale_boxes(boxes, (100, 200), (50, 400)).tolist() == [[0.0, 5.0, 100.0, 50.0]]


def test_centerness_has_a_finite_gradient_inside() -> None:
    ltrb = torch.tensor([[1.0, 2, 3, 4]], requires_grad=True)
    centerness_of(ltrb).sum().backward()
    assert torch.isfinite(ltrb.grad).all()
    assert centerness_of(torch.tensor([[1.0, 2, 3, 4]])).item() == pytest.approx((1 / 3 * 1 / 2) ** 0.5)
