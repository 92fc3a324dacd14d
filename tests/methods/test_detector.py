"""The trunk and the box branch: padding, precision, candidates, suppression, and what a loss may touch."""

import math

import pytest
import torch

from perpixel.errors import ShapeError
from perpixel.locations import make_grid
from perpixel.methods.detector import Detector
from perpixel.recipe import build
from perpixel.structures import Batch, Instances, Outputs, Progress

SLIM = ["pyramid.channels=16", "head.cls_convs=1", "head.box_convs=1"]


def slim(*overrides: str, classes: int = 3) -> Detector:
    return build("fcos/lite0", classes, [*SLIM, *overrides]).eval()


def truth(size=(96, 128)) -> Instances:
    return Instances(
        size=size,
        boxes=torch.tensor([[8.0, 8, 60, 70], [40, 30, 120, 90]]),
        labels=torch.tensor([0, 2]),
    )


def blank(net: Detector, height: int = 128, width: int = 128, images: int = 1) -> Outputs:
    """Outputs that find nothing: a canvas to write predictions on."""
    shapes = tuple((math.ceil(height / s), math.ceil(width / s)) for s in net.strides)
    points, level = make_grid(shapes, net.strides)
    return Outputs(
        logits=torch.full((images, len(points), net.num_classes), -10.0),
        centerness=torch.full((images, len(points)), 4.0),
        ltrb=torch.full((images, len(points), 4), 2.0),
        points=points,
        level=level,
        shapes=shapes,
    )


@torch.no_grad()
def test_any_size_is_padded_inside_and_padding_changes_nothing() -> None:
    net = slim()
    image = torch.randint(0, 256, (1, 3, 70, 100), dtype=torch.uint8)
    padded = torch.full((1, 3, 96, 128), 77, dtype=torch.uint8)
    padded[:, :, :70, :100] = image
    a, b = net(image), net(padded, [(70, 100)])
    assert a.shapes == b.shapes == ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.ltrb, b.ltrb)
    torch.testing.assert_close(net(padded.float(), torch.tensor([[70, 100]])).logits, b.logits)


def test_the_backbone_sees_the_mean_color_beyond_a_picture_in_its_color_order() -> None:
    net = build("fcos/lite0", 1, [*SLIM, "backbone.order=bgr", "backbone.mean=[1, 2, 3]", "backbone.std=[1, 1, 2]"])
    x = net.normalize(torch.full((1, 3, 32, 32), 9.0), [(20, 32)])
    assert x[0, :, 0, 0].tolist() == [8.0, 7.0, 3.0]
    assert x[0, :, 20:].abs().max() == 0


@torch.no_grad()
def test_pixels_stay_float32_in_bf16() -> None:
    net = slim()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    assert {outputs.logits.dtype, outputs.centerness.dtype, outputs.ltrb.dtype} == {torch.float32}


def test_wrong_inputs_are_refused() -> None:
    net = slim()
    with pytest.raises(ShapeError, match=r"images: expected \[B, 3, H, W\]"):
        net(torch.zeros(3, 64, 64))
    with pytest.raises(ShapeError, match="sizes: expected 1 pairs"):
        net(torch.zeros(1, 3, 64, 64), [(64, 64), (64, 64)])


def test_an_untrained_network_predicts_boxes_of_four_strides() -> None:
    outputs = slim()(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(outputs.ltrb, torch.full_like(outputs.ltrb, 4.0), atol=0.3, rtol=0)
    empty = slim("box.start=0")(torch.zeros(1, 3, 64, 64))
    assert empty.ltrb.abs().max() < 0.3


def test_every_trainable_parameter_gets_a_gradient_even_from_pictures_without_objects() -> None:
    net = slim().train()
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    batch = Batch(images=images, sizes=[(96, 128)] * 2, targets=[Instances.empty((96, 128))] * 2)
    losses = net.loss(net(batch.images, batch.sizes, auxiliary=True), batch, Progress())
    assert losses["box"] == 0
    assert losses["centerness"] == 0
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ([], {"cls", "box", "centerness"}),
        (["head.quality=iou", "box.weighting=none"], {"cls", "box", "iou"}),
        (["head.quality=none", "box.weighting=none", "decode.quality=none"], {"cls", "box"}),
        (["head.quality_loss=l1"], {"cls", "box", "centerness"}),
    ],
)
def test_loss_terms_are_the_objective_and_nothing_else(overrides, terms) -> None:
    net = slim(*overrides)
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    batch = Batch(images=images, sizes=[(96, 128)], targets=[truth()])
    logs = {}
    losses = net.loss(net(batch.images, batch.sizes, auxiliary=True), batch, Progress(), logs)
    assert set(losses) == terms
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    assert set(logs) == {"positives", "iou"}
    assert not any(value.requires_grad for value in logs.values())


def test_ignored_regions_neither_reward_nor_punish() -> None:
    net = slim()
    outputs = blank(net)
    outputs.logits.requires_grad_()
    target = Instances(
        size=(128, 128),
        boxes=torch.tensor([[8.0, 8, 72, 72]]),
        labels=torch.tensor([1]),
        ignore=torch.tensor([True]),
    )
    batch = Batch(images=torch.zeros(1, 3, 128, 128), sizes=[(128, 128)], targets=[target])
    sum(net.loss(outputs, batch, Progress()).values()).backward()
    inside = ((outputs.points > 8) & (outputs.points < 72)).all(1)
    assert outputs.logits.grad[0, inside].abs().max() == 0
    assert outputs.logits.grad[0, ~inside].abs().min() > 0


def test_running_foreground_moves_only_while_learning_and_is_saved() -> None:
    net = slim("cls.normalizer=moving_fg")
    count = torch.tensor(50.0)
    assert net.running_foreground(count).item() == pytest.approx(95)
    with torch.no_grad():
        assert net.running_foreground(count).item() == pytest.approx(95)
    assert net.state_dict()["foreground"].item() == pytest.approx(95)


def test_a_detection_is_decoded_to_the_output_frame_with_the_root_of_the_product() -> None:
    net = slim()
    outputs = blank(net)
    outputs.logits[0, 5, 1] = 2.0  # level 0, x = 44, y = 4; box of 2 strides to each side
    (found,) = net.decode(outputs, [(128, 128)], [(64, 256)])
    assert found.labels.tolist() == [1]
    score = (torch.tensor(2.0).sigmoid() * torch.tensor(4.0).sigmoid()).sqrt()
    torch.testing.assert_close(found.scores, score[None])
    assert found.boxes.tolist() == [[2 * 28.0, 0.0, 2 * 60.0, 10.0]]


def test_one_location_may_be_several_classes_and_classes_do_not_suppress_each_other() -> None:
    net = slim()
    outputs = blank(net)
    outputs.logits[0, 5] = torch.tensor([1.0, 2.0, -10.0])
    outputs.logits[0, 6, 1] = 1.5  # 8 px further: IoU with its neighbor 0.6 exactly, kept; same class
    (found,) = net.decode(outputs, [(128, 128)])
    assert sorted(found.labels.tolist()) == [0, 1, 1]
    outputs.ltrb[0, 6] += torch.tensor([0.2, 0, -0.2, 0])
    (found,) = net.decode(outputs, [(128, 128)])
    assert sorted(found.labels.tolist()) == [0, 1]


def test_the_threshold_acts_on_the_class_or_on_the_product() -> None:
    outputs = blank(slim())
    outputs.logits[0, 5, 0] = -2.5  # 0.076
    outputs.centerness[0, 5] = 0.0  # product 0.038
    assert len(slim().decode(outputs, [(128, 128)])[0]) == 1
    assert len(slim("decode.threshold_on=product").decode(outputs, [(128, 128)])[0]) == 0


def test_quality_may_be_computed_from_the_box_or_left_out() -> None:
    outputs = blank(slim())
    outputs.logits[0, 5, 0] = 0.0
    outputs.ltrb[0, 5] = torch.tensor([1.0, 2, 4, 2])  # center-ness 0.5
    from_box = slim("decode.quality=from_box").decode(outputs, [(128, 128)])[0]
    assert from_box.scores.item() == pytest.approx(0.5)
    alone = slim("decode.quality=none").decode(outputs, [(128, 128)])[0]
    assert alone.scores.item() == pytest.approx(0.5)


def test_limits_hold_per_level_and_per_image() -> None:
    net = slim("decode.pre_nms_top=7", "decode.max_detections=9")
    outputs = blank(net, images=2)
    outputs = outputs._replace(ltrb=outputs.ltrb * 0.2)  # boxes too small to overlap
    outputs.logits[0, :300, 0] = torch.rand(300)
    outputs.logits[1, :4, 0] = 1.0
    first, second = net.decode(outputs, [(128, 128)] * 2)
    assert len(first) == 9  # 7 of the first level and 2 or more of the second
    assert (first.scores.diff() <= 0).all()
    assert len(second) == 4


def test_boxes_beyond_the_picture_are_dropped_and_others_clipped() -> None:
    net = slim()
    outputs = blank(net)
    outputs.logits[0, 15, 0] = 1.0  # x = 124: box 108..140
    outputs.logits[0, 7, 1] = 1.0  # x = 60
    (found,) = net.decode(outputs, [(128, 50)])
    assert found.boxes.tolist() == [[44.0, 0.0, 50.0, 20.0]]


def test_nothing_found_is_an_empty_result() -> None:
    (found,) = slim().decode(blank(slim()), torch.tensor([[128, 128]]))
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
