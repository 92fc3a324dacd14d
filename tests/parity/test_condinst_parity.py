"""CondInst and BoxInst against recorded numbers of the authors' release, under weights made by rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from parity.reference import Reference, assert_same_detections
from perpixel.interop.adelaidet import load_weights
from perpixel.ops.color import coarse_lab, edge_similarity, half_neighborhood
from perpixel.ops.masks import aligned_upsample
from perpixel.recipe import build
from perpixel.structures import Batch, Detections, Instances, Outputs, Progress

RECIPES = {
    "condinst_MS_R_50_1x": "condinst/r50_1x",
    "condinst_MS_R_50_3x_sem": "condinst/r50_3x_sem",
    "boxinst_MS_R_50_1x": "boxinst/r50_1x",
}
LOSSES = {
    "cls": "loss_fcos_cls",
    "box": "loss_fcos_loc",
    "centerness": "loss_fcos_ctr",
    "mask": "loss_mask",
    "semantic": "loss_sem",
    "projection": "loss_prj",
    "pairwise": "loss_pairwise",
}
ALL = pytest.mark.parametrize("name", RECIPES)
STEPS = 90000


@pytest.fixture(scope="module")
def references(shared) -> dict[str, Reference]:
    return {name: Reference.read(shared / "parity", name) for name in RECIPES}


def make_net(reference: Reference, name: str, overrides: tuple[str, ...] = ()):
    net = build(RECIPES[name], num_classes=80, overrides=overrides)
    report = load_weights(net, reference.weights)
    assert report.missing == []
    assert report.unexpected == []
    return net


@pytest.fixture(scope="module")
def found(references) -> dict[str, tuple]:
    """A network in evaluation mode and its outputs, for each configuration."""
    result = {}
    for name, reference in references.items():
        net = make_net(reference, name).eval()
        with torch.no_grad():
            result[name] = net, net(reference.image[None], [reference.size])
    return result


def unpacked(reference: Reference, prefix: str) -> torch.Tensor:
    shape = reference.record[f"{prefix}_masks_shape"]
    bits = np.unpackbits(reference.arrays[f"{prefix}_masks_packed"], count=int(np.prod(shape)))
    return torch.from_numpy(bits.reshape(shape).astype(bool))


@ALL
def test_parameter_counts_equal_the_release(references, found, name) -> None:
    record, net = references[name].record, found[name][0]
    assert sum(p.numel() for p in net.parameters()) == record["num_parameters"]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == record["trainable_parameters"]


@ALL
@pytest.mark.parametrize(("ours", "theirs"), [("logits", "cls_logits"), ("ltrb", "reg"), ("centerness", "ctr")])
def test_dense_outputs_equal_the_release(references, found, name, ours, theirs) -> None:
    expected = references[name].dense(theirs)
    value = getattr(found[name][1], ours).reshape(expected.shape)
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


@ALL
def test_controller_equals_the_release(references, found, name) -> None:
    reference, outputs = references[name], found[name][1]
    maps = outputs.controller.split([h * w for h, w in outputs.shapes], dim=1)
    for level, values, (h, w), step in zip(
        reference.record["levels"], maps, outputs.shapes, (4, 2, 1, 1, 1), strict=True
    ):
        ours = values.transpose(1, 2).unflatten(2, (h, w))[..., ::step, ::step]
        torch.testing.assert_close(ours, reference.tensor(f"top_feats_{level}"), atol=1e-4, rtol=0)


@ALL
def test_mask_features_equal_the_release(references, found, name) -> None:
    expected = references[name].tensor("mask_feats")
    torch.testing.assert_close(found[name][1].mask_features, expected, atol=3e-4, rtol=0)


@ALL
@pytest.mark.parametrize("prefix", ["det", "detr"])
def test_detections_and_masks_equal_the_release_in_both_frames(references, found, name, prefix) -> None:
    reference, (net, outputs) = references[name], found[name]
    frame = {"det": reference.size, "detr": tuple(reference.record["detr_output_hw"])}[prefix]
    assert_same_masks(reference, net.decode(outputs, [reference.size], [frame])[0], prefix)


@ALL
def test_an_image_in_a_batch_gives_the_same_detections(references, found, name) -> None:
    reference, net = references[name], found[name][0]
    images = torch.stack([reference.image.flip(2), reference.image])
    sizes = [reference.size] * 2
    with torch.no_grad():
        detections = net.decode(net(images, sizes), sizes)
    assert_same_masks(reference, detections[0], "detb")
    assert_same_masks(reference, detections[1], "det")


def test_a_batch_of_unlike_sizes_gives_each_image_its_masks(references, found) -> None:
    """The release raises here."""
    reference, net = references["condinst_MS_R_50_1x"], found["condinst_MS_R_50_1x"][0]
    with torch.no_grad():
        outputs = net(torch.stack([reference.image_b, reference.image]), [reference.size_b, reference.size])
    small, large = net.decode(outputs, [reference.size_b, reference.size])
    assert small.masks.shape == (len(small), *reference.size_b)
    assert_same_masks(reference, large, "det")


def assert_same_masks(reference: Reference, found: Detections, prefix: str) -> None:
    """Detections equal as sets, and their masks to the pixel noise of float32."""
    partner = assert_same_detections(reference, found, prefix)
    masks = unpacked(reference, prefix)
    recorded = partner < len(masks)  # some fixtures hold the first masks only
    ours, theirs = found.masks[recorded], masks[partner[recorded]]
    different = (ours != theirs).sum((1, 2))
    assert different.sum() <= 17  # the noise of float32 that the release notes measured
    assert bool((different <= 1e-3 * theirs.sum((1, 2)).clamp(min=1) + 1).all())


@ALL
def test_logits_of_detections_equal_the_release(references, found, name) -> None:
    reference, (net, outputs) = references[name], found[name]
    survivors = net.survivors(outputs)[0]
    logits = net.branches["mask"].logits_at(outputs, 0, survivors.location[:4])
    expected = reference.tensor("det_mask_logits_first4")[:, 0]
    torch.testing.assert_close(aligned_upsample(logits, 2), expected, atol=1e-4, rtol=1e-4)


# Losses


def mass_centers(masks: torch.Tensor) -> torch.Tensor:
    """In pixel indices, as the release computes them; ours (and the data's) lie half a pixel to the right and below."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in masks.shape[1:]), indexing="ij")
    area = masks.sum((1, 2))
    return torch.stack([(masks * x).sum((1, 2)) / area, (masks * y).sum((1, 2)) / area], dim=1)


def batch_of(reference: Reference, names: str, boxes_only: bool, empty: bool = False) -> Batch:
    masks = unpacked(reference, "gt")
    truths = {
        "A": replace(reference.truth(), masks=masks, centers=mass_centers(masks)),
        "B": replace(reference.truth("b_"), **triangle(reference)),
    }
    if boxes_only:
        truths = {key: replace(value, masks=None, centers=None) for key, value in truths.items()}
    if empty:
        truths["B"] = Instances.empty(reference.size_b)
    return reference.batch(names, truths)


def triangle(reference: Reference) -> dict[str, torch.Tensor]:
    from hotcoco import mask

    polygon = reference.arrays["b_gt_poly_xy"].tolist()
    drawn = mask.decode(mask.merge(mask.frPyObjects([polygon], *reference.size_b)))
    masks = torch.from_numpy(np.ascontiguousarray(drawn)).bool()[None]
    return {"masks": masks, "centers": mass_centers(masks)}


CONDINST = {
    "default": ((), "A"),
    "bitmap_gt": ((), "A"),
    "topk10": (("mask.cap=10", "mask.cap_by=score"), "A"),
    "center_sample_false": (("assign.center_radius=null",), "A"),
    "batch2_BA": ((), "BA"),
    "bbox_center_sampling": (("assign.center=box",), "A"),
}
VARIANTS = {
    "condinst_MS_R_50_1x": {**CONDINST, "bitmap_batch2_A_empty": ((), "AB")},
    "condinst_MS_R_50_3x_sem": CONDINST,
    "boxinst_MS_R_50_1x": {
        "iter0": ((), "A"),
        "iter5000": ((), "A"),
        "iter20000": ((), "A"),
        "iter20000_topk10": (("mask.cap=10",), "A"),
        "iter20000_bottom_pixels_0": (("boxinst.bottom_rows=0",), "A"),
        "iter20000_batch2_BA": ((), "BA"),
    },
}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def run_variant(reference: Reference, name: str, variant: str):
    overrides, images = VARIANTS[name][variant]
    net = make_net(reference, name, overrides).train()
    batch = batch_of(reference, images, boxes_only=name.startswith("boxinst"), empty=variant.endswith("empty"))
    # COCO's own size, from which the release computes how many rows of the network's input its 10 px at the bottom are.
    batch = replace(batch, original_sizes=[tuple(reference.record["image_original_hw"])] * len(batch))
    outputs = net(batch.images, batch.sizes, auxiliary=True)
    step = int(variant.removeprefix("iter").split("_")[0]) if variant.startswith("iter") else 0
    return net, outputs, batch, net.loss(outputs, batch, Progress(step, (step + 1) / STEPS))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_losses_equal_the_release(references, name, variant) -> None:
    losses = run_variant(references[name], name, variant)[3]
    expected = references[name].record["train"][variant]["losses"]
    assert {LOSSES[key]: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("condinst_MS_R_50_1x", "default"),
        ("condinst_MS_R_50_3x_sem", "default"),
        ("boxinst_MS_R_50_1x", "iter20000"),
    ],
)
def test_gradient_norms_equal_the_release(references, name, variant) -> None:
    reference = references[name]
    net, *_, losses = run_variant(reference, name, variant)
    sum(losses.values()).backward()
    recorded = reference.record["train"][variant]
    exact, worst = recorded["grad_norm_f64"], max(v for v in recorded["grad_norm_f64"].values() if v is not None)
    # Each recorded norm is found by loading the tensor's index into its place.
    tagged = make_net(reference, name)
    load_weights(tagged, {k: torch.full_like(v, i) for i, (k, v) in enumerate(reference.weights.items())})
    keys, checked = list(reference.weights), 0
    for (_, parameter), (_, tag) in zip(net.named_parameters(), tagged.named_parameters(), strict=True):
        for index in tag.unique().long().tolist():
            norm, key = exact[keys[index]], keys[index]
            assert (parameter.grad is None) == (norm is None), key
            if norm is not None:
                noise = abs(recorded["grad_norm"][key] - norm)
                ours = parameter.grad[tag == index].norm().item()
                assert ours == pytest.approx(norm, rel=1e-3, abs=4 * noise + 1e-7 * worst), key
                checked += 1
    assert checked == sum(norm is not None for norm in exact.values())


def test_mask_targets_and_features_in_training_equal_the_release(references) -> None:
    name = "condinst_MS_R_50_1x"
    reference = references[name]
    net, outputs, batch, _ = run_variant(reference, name, "default")
    torch.testing.assert_close(outputs.mask_features, reference.tensor("t_mask_feats"), atol=3e-4, rtol=0)
    branch = net.branches["mask"]
    shape = reference.record["t_gt_bitmasks_s4_shape"]
    packed = reference.arrays["t_gt_bitmasks_s4_packed"]
    expected = np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(bool)
    assert torch.equal(branch.criterion.targets(outputs, batch, 4)[0], torch.from_numpy(expected))


def test_mask_logits_of_positives_equal_the_release(references) -> None:
    name = "condinst_MS_R_50_1x"
    reference = references[name]
    net, outputs, *_ = run_variant(reference, name, "default")
    places, levels = reference.tensor("t_mask_inst_locations"), reference.tensor("t_mask_inst_fpn_levels")
    for i, expected in zip(
        reference.tensor("t_mask_logits_pick").tolist(), reference.tensor("t_mask_logits"), strict=True
    ):
        here = (outputs.points == places[i]).all(1) & (outputs.level == levels[i])
        logits = net.branches["mask"].logits_at(outputs, 0, here.nonzero()[:, 0])
        torch.testing.assert_close(aligned_upsample(logits, 2), expected, atol=1e-3, rtol=1e-4)


def test_color_similarity_equals_the_release(references) -> None:
    reference = references["boxinst_MS_R_50_1x"]
    expected = reference.tensor("t_image_color_similarity")  # [8, H/4, W/4], the neighbors of a 3x3 square in rows
    height, width = (side * 4 for side in expected.shape[1:])
    padded = torch.zeros(1, 3, height, width)
    padded[0, :, : reference.size[0], : reference.size[1]] = reference.image
    colors = coarse_lab(padded, 4)[0]
    later = {(0, 2): 4, (2, -2): 5, (2, 0): 6, (2, 2): 7}
    assert set(half_neighborhood(3, 2)) == set(later)
    for (dy, dx), index in later.items():
        ours = edge_similarity(colors, (dy, dx))
        rows, columns = slice(0, ours.shape[0]), slice(max(-dx, 0), max(-dx, 0) + ours.shape[1])
        theirs = expected[index, rows, columns]  # zero where the neighbor is padding
        torch.testing.assert_close(ours[theirs > 0], theirs[theirs > 0], atol=1e-4, rtol=0)


def test_dense_outputs_do_not_depend_on_the_criterion(references, found) -> None:
    outputs: Outputs = found["condinst_MS_R_50_1x"][1]
    torch.testing.assert_close(found["boxinst_MS_R_50_1x"][1].logits, outputs.logits, atol=1e-5, rtol=0)
