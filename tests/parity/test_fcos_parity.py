"""FCOS against recorded numbers of the authors' release (fcos_R_50_1x), under weights made by rule."""

import pytest
import torch

from parity.reference import Reference, assert_same_detections
from perpixel.interop.adelaidet import load_weights
from perpixel.recipe import build
from perpixel.structures import Instances, Outputs, Progress


@pytest.fixture(scope="module")
def reference(shared) -> Reference:
    return Reference.read(shared / "parity", "fcos_R_50_1x")


def make_net(reference: Reference, overrides: tuple[str, ...] = ()):
    net = build("fcos/r50_1x", num_classes=80, overrides=overrides)
    report = load_weights(net, reference.weights)
    assert report.unexpected == []
    assert [name for name in report.missing if name != "foreground"] == []
    return net


@pytest.fixture(scope="module")
def net(reference):
    return make_net(reference)


@pytest.fixture(scope="module")
def outputs(reference, net) -> Outputs:
    with torch.no_grad():
        return net(reference.image[None], [reference.size])


def test_parameter_counts_equal_the_release(reference, net) -> None:
    counts = [p.numel() for p in net.parameters()], [p.numel() for p in net.parameters() if p.requires_grad]
    assert sum(counts[0]) == reference.record["num_parameters"]
    assert sum(counts[1]) == reference.record["trainable_parameters"]


@pytest.mark.parametrize(("ours", "theirs"), [("logits", "cls_logits"), ("ltrb", "reg"), ("centerness", "ctr")])
def test_dense_outputs_equal_the_release(reference, outputs, ours, theirs) -> None:
    value = getattr(outputs, ours)
    expected = reference.dense(theirs)
    torch.testing.assert_close(value.reshape(expected.shape), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["det", "detr"])
def test_detections_equal_the_release_in_both_frames(reference, net, outputs, prefix) -> None:
    frame = {"det": reference.size, "detr": tuple(reference.record["detr_output_hw"])}[prefix]
    found = net.decode(outputs, [reference.size], [frame])[0]
    assert_same_detections(reference, found, prefix)


def test_an_image_padded_to_a_larger_neighbor_gives_the_same_detections(reference, net) -> None:
    images = torch.stack([reference.image_b, reference.image])
    with torch.no_grad():
        found = net.decode(net(images, [reference.size_b, reference.size]), [reference.size_b, reference.size])
    assert_same_detections(reference, found[0], "detb")
    assert_same_detections(reference, found[1], "det")


VARIANTS = {
    "default": ((), "A"),
    "center_sample_false": (("assign.center_radius=null",), "A"),
    "loc_iou": (("box.loss=iou",), "A"),
    "loc_linear_iou": (("box.loss=linear_iou",), "A"),
    "cls_norm_moving_fg": (("cls.normalizer=moving_fg",), "A"),
    "cls_norm_all": (("cls.normalizer=all",), "A"),
    "box_quality_iou": (("head.quality=iou", "box.weighting=none"), "A"),
    "batch2_BA": ((), "BA"),
    "batch2_A_empty": ((), "AB"),
}
NAMES = {"cls": "loss_fcos_cls", "box": "loss_fcos_loc", "centerness": "loss_fcos_ctr", "iou": "loss_fcos_iou"}


def run_variant(reference: Reference, variant: str):
    overrides, images = VARIANTS[variant]
    net = make_net(reference, overrides)
    truths = {"A": reference.truth(), "B": reference.truth("b_")}
    if variant == "batch2_A_empty":
        truths["B"] = Instances.empty(reference.size_b)
    batch = reference.batch(images, truths)
    outputs = net(batch.images, batch.sizes, auxiliary=True)
    return net, outputs, batch, net.loss(outputs, batch, Progress())


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_equal_the_release(reference, variant) -> None:
    losses = run_variant(reference, variant)[3]
    expected = reference.record["train"][variant]["losses"]
    assert {NAMES[name]: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_gradient_norms_equal_the_release(reference) -> None:
    net, *_, losses = run_variant(reference, "default")
    sum(losses.values()).backward()
    expected = reference.record["train"]["default"]["grad_norm"]
    # The report of a mapping names no places, so each recorded norm is found by loading the tensor's index into it.
    tags = {key: torch.full_like(value, index) for index, (key, value) in enumerate(reference.weights.items())}
    tagged = make_net(reference)
    load_weights(tagged, tags)
    keys = list(reference.weights)
    checked = 0
    for (_, parameter), (_, tag) in zip(net.named_parameters(), tagged.named_parameters(), strict=True):
        for index in tag.unique().long().tolist():
            norm = expected[keys[index]]
            assert (parameter.grad is None) == (norm is None)
            if norm is not None:
                part = parameter.grad[tag == index]
                assert part.norm().item() == pytest.approx(norm, rel=1e-3), keys[index]
                checked += 1
    assert checked == sum(norm is not None for norm in expected.values())


@pytest.mark.parametrize(
    ("variant", "prefix"), [("default", "t"), ("batch2_BA", "tba"), ("center_sample_false", "tnc")]
)
def test_every_location_answers_for_the_same_object(reference, variant, prefix) -> None:
    net, outputs, batch, _ = run_variant(reference, variant)
    targets = net.targets(outputs, batch)
    gt_index = targets.assignment.gt_index[..., 0]
    images = len(batch)
    recorded = {
        name: torch.cat(
            [reference.tensor(f"{prefix}_{name}_{p}").view(images, -1) for p in reference.record["levels"]], 1
        )
        for name in ("labels", "gt_inds")
    }
    first = torch.tensor([0, *(len(t) for t in batch.targets[:-1])]).cumsum(0)[:, None]
    positive = recorded["labels"] != 80
    assert torch.equal(gt_index >= 0, positive)
    assert torch.equal(gt_index[positive], (recorded["gt_inds"] - first)[positive])
    parts = [reference.tensor(f"{prefix}_reg_targets_{p}").view(images, -1, 4) for p in reference.record["levels"]]
    a = targets.assignment
    torch.testing.assert_close(targets.ltrb, torch.cat(parts, 1)[a.image, a.location], atol=1e-4, rtol=0)
