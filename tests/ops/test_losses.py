import pytest
import torch
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss, sigmoid_focal_loss

from perpixel.ops.losses import BOX_LOSSES, QUALITY_LOSSES, focal_loss_sum, ltrb_overlap


def one_hot(shape, positives) -> torch.Tensor:
    target = torch.zeros(shape).flatten()
    target[positives] = 1
    return target.view(shape)


def test_focal_loss_equals_torchvision_on_one_hot_targets() -> None:
    logits = 4 * torch.randn(2, 30, 5, requires_grad=True)
    positives = torch.tensor([3, 77, 200, 299])
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, 20:] = False
    ours = focal_loss_sum(logits, valid, positives)
    theirs = (sigmoid_focal_loss(logits, one_hot(logits.shape, positives)) * valid[..., None]).sum()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_focal_loss_is_finite_at_extreme_logits() -> None:
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    loss = focal_loss_sum(logits, torch.ones(1, 1, dtype=torch.bool), torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_focal_loss_of_an_ignored_location_has_no_gradient() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    focal_loss_sum(logits, torch.tensor([[True, False]]), torch.zeros(0, dtype=torch.int64)).backward()
    assert logits.grad[0, 0].abs().min() > 0
    assert logits.grad[0, 1].abs().max() == 0


def test_unsmoothed_giou_equals_torchvision() -> None:
    a, b = torch.rand(50, 4) * 5 + 0.1, torch.rand(50, 4) * 5 + 0.1
    boxes = [torch.cat([-x[:, :2], x[:, 2:]], 1) for x in (a, b)]
    loss = BOX_LOSSES["giou"](ltrb_overlap(a, b, smooth=0.0))
    torch.testing.assert_close(loss, generalized_box_iou_loss(*boxes), atol=1e-5, rtol=1e-5)
    assert (complete_box_iou_loss(*boxes) >= BOX_LOSSES["linear_iou"](ltrb_overlap(a, b, smooth=0.0)) - 1e-5).all()


def test_smoothed_iou_of_an_empty_prediction_against_a_unit_box_is_one_half() -> None:
    overlap = ltrb_overlap(torch.zeros(1, 4), torch.full((1, 4), 0.5))
    assert overlap.iou.item() == pytest.approx(0.5)
    assert BOX_LOSSES["linear_iou"](overlap).item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", BOX_LOSSES)
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_every_box_loss_is_zero_for_a_perfect_box_and_finite_for_an_empty_one(name, smooth) -> None:
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert BOX_LOSSES[name](ltrb_overlap(box, box, smooth)).item() == pytest.approx(0, abs=1e-6)
    empty = torch.zeros(1, 4, requires_grad=True)
    loss = BOX_LOSSES[name](ltrb_overlap(empty, box, smooth))
    loss.backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(empty.grad).all()


def test_quality_losses_by_hand() -> None:
    logits, target = torch.tensor([0.0, 0.0]), torch.tensor([0.5, 1.0])
    assert QUALITY_LOSSES["bce"](logits, target).item() == pytest.approx(2 * 0.693147, rel=1e-5)
    assert QUALITY_LOSSES["l1"](logits, target).item() == pytest.approx(0.5)
