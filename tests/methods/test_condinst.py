"""CondInst: every variant learns and decodes; which locations learn; masks by hand and in their frames."""

from dataclasses import replace

import pytest
import torch

from methods.mask_nets import SIZE, bare, batch_of, disks, small_net
from perpixel.errors import ConfigError
from perpixel.methods import condinst
from perpixel.methods.condinst import DiceCriterion
from perpixel.methods.semantic import semantic_loss, semantic_target
from perpixel.ops.boxes import rescale_boxes
from perpixel.ops.dynamic import CHUNK
from perpixel.ops.losses import dice_loss
from perpixel.ops.masks import aligned_upsample
from perpixel.recipe import build
from perpixel.rle import encode
from perpixel.structures import Progress

TWO = disks((40, 40, 24), (90, 60, 20))
ONE = disks((30, 30, 20), size=(64, 72))


def learn(net, batch):
    outputs = net(batch.images, batch.sizes, auxiliary=True)
    losses = net.loss(outputs, batch, Progress(10, 0.5))
    sum(losses.values()).backward()
    return outputs, losses


VARIANTS = [
    (),
    ("mask.levels=1", "mask.controller_convs=2"),
    ("mask.depth=1", "mask.channels=1"),
    ("mask.depth=2", "mask.width=2", "mask.channels=16"),
    ("mask.coordinates=absolute",),
    ("mask.coordinates=none",),
    ("mask.coordinates=only",),
    ("mask.factor=1", "mask.norm=bn"),
    ("mask.factor=4", "data.mask_stride=2"),
    ("mask.semantic=0.5", "mask.cap=20", "mask.cap_by=chance"),
    ("box=null",),
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda o: ",".join(o) or "default")
@pytest.mark.parametrize("truths", [(TWO, ONE), (TWO, disks()), (disks(), disks())], ids=["unlike", "one", "none"])
def test_every_variant_learns_from_every_batch_and_reaches_every_parameter(overrides, truths) -> None:
    net = small_net("condinst/lite0", *overrides).train()
    _, losses = learn(net, batch_of(*truths))
    assert all(bool(value.isfinite()) for value in losses.values())
    assert "mask" in losses
    assert ("semantic" in losses) == ("mask.semantic=0.5" in overrides)
    missing = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda o: ",".join(o) or "default")
def test_every_variant_decodes_into_the_frames_asked_for(overrides) -> None:
    net = small_net("condinst/lite0", "decode.score_threshold=0.004", *overrides).eval()
    batch = batch_of(TWO, ONE)
    frames = [(50, 61), (128, 144)]
    with torch.no_grad():
        found = net.decode(net(batch.images, batch.sizes), batch.sizes, frames)
    for detections, frame in zip(found, frames, strict=True):
        assert 0 < len(detections) <= 100
        assert detections.masks.shape == (len(detections), *frame)
        assert detections.masks.any()


def test_auxiliary_outputs_are_for_training_only() -> None:
    net = small_net("condinst/lite0", "mask.semantic=1.0")
    images = batch_of(TWO).images
    assert net(images).auxiliary == {}
    outputs = net(images, auxiliary=True)
    assert outputs.auxiliary["semantic"].shape == (1, 3, *outputs.shapes[0])


def test_computing_once_more_changes_neither_losses_nor_gradients(monkeypatch) -> None:
    batch, results = batch_of(TWO, ONE), []
    for kept, chunk in ((2**40, 2**19), (0, 2**19), (0, 1)):
        monkeypatch.setattr(condinst, "KEPT", kept)
        monkeypatch.setitem(CHUNK, "cpu", chunk)
        net = small_net("condinst/lite0").train()
        _, losses = learn(net, batch)
        mask = net.branches["mask"]
        results.append([losses["mask"].detach(), mask.controller.weight.grad, mask.features.tower[-1].weight.grad])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_memory_kept_for_the_backward_pass_does_not_grow_with_positives(monkeypatch) -> None:
    monkeypatch.setattr(condinst, "KEPT", 0)
    net = small_net("condinst/lite0", "mask.cap=null", "assign.center_radius=null").train()
    kept = []
    for radius in (9, 45):  # of an object: many more locations
        batch = batch_of(disks((60, 48, radius)))
        outputs = net(batch.images, batch.sizes, auxiliary=True)
        targets = net.targets(outputs, batch)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            net.branches["mask"].loss(outputs, targets, batch, Progress(), {})
        cells = outputs.shapes[0][0] * outputs.shapes[0][1]
        kept.append((len(targets.labels), sum(n for n in saved if n >= cells)))
    assert kept[1][0] > 5 * kept[0][0]
    growth = kept[1][1] - kept[0][1]
    assert growth <= (kept[1][0] - kept[0][0]) * 2 * net.branches["mask"].shape.size  # parameters, but no maps


def test_dice_by_hand() -> None:
    probabilities = torch.tensor([[[0.5, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    target = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 1]]]).bool()
    found = dice_loss(probabilities, target)
    torch.testing.assert_close(found, torch.tensor([1 - 2 * 1.5 / (1.25 + 2), 1.0]), atol=1e-5, rtol=0)


def test_mask_loss_is_the_mean_over_positive_locations() -> None:
    net, batch = small_net("condinst/lite0", "mask.cap=null").train(), batch_of(TWO, ONE)
    outputs, losses = learn(net, batch)
    a, branch = net.targets(outputs, batch).assignment, net.branches["mask"]
    prices = []
    for image, location, obj in zip(a.image.tolist(), a.location, a.object.tolist(), strict=True):
        logits = branch.logits_at(outputs, image, location[None])
        target = branch.criterion.targets(outputs, batch, 4)[image][[obj - 2 * image]]
        upsampled = aligned_upsample(logits, 2)
        prices.append(dice_loss(upsampled.sigmoid(), target))
    torch.testing.assert_close(losses["mask"], torch.cat(prices).mean())


# Which locations learn


def learners_of(net, batch, seed: int = 0):
    outputs = net(batch.images, batch.sizes)
    torch.manual_seed(seed)
    targets = net.targets(outputs, batch)
    return outputs, targets, net.branches["mask"]._learners(outputs, targets, batch)


def test_a_cap_by_chance_is_one_of_the_batch_and_reproducible() -> None:
    net, batch = small_net("condinst/lite0", "mask.cap=7", "mask.cap_by=chance"), batch_of(TWO, ONE)
    first, again, other = (learners_of(net, batch, seed)[2] for seed in (1, 1, 2))
    assert sum(len(rows) for rows in first.objects) == 7
    assert torch.equal(first.location, again.location)
    assert not torch.equal(first.location, other.location)
    assert all(rows == sorted(rows) for rows in first.objects)


def test_a_cap_by_score_takes_the_best_locations_of_every_object() -> None:
    net, batch = small_net("condinst/lite0", "mask.cap=6", "mask.cap_by=score"), batch_of(TWO, ONE)
    outputs, targets, learners = learners_of(net, batch)
    a = targets.assignment
    score = outputs.logits.amax(-1).sigmoid() * outputs.centerness.sigmoid()
    locations = learners.location.split([len(rows) for rows in learners.objects])
    for image, (rows, chosen) in enumerate(zip(learners.objects, locations, strict=True)):
        share = 6 // len(set(rows))
        for obj in set(rows):
            mine = a.location[(a.image == image) & (a.object == obj + 2 * image)]
            best = mine[score[image, mine].argsort(descending=True)][:share]
            assert set(chosen[[r == obj for r in rows]].tolist()) == set(best.tolist())
    assert [sorted(set(rows)) for rows in learners.objects] == [[0, 1], [0]]


def test_every_object_keeps_a_location_where_there_are_more_objects_than_the_cap() -> None:
    net, batch = small_net("condinst/lite0", "mask.cap=1", "mask.cap_by=score"), batch_of(TWO)
    assert learners_of(net, batch)[2].objects == [[0, 1]]


def test_objects_without_a_mask_do_not_learn_one() -> None:
    net = small_net("condinst/lite0")
    partly = replace(TWO, has_mask=torch.tensor([False, True]))
    assert set(learners_of(net, batch_of(partly))[2].objects[0]) == {1}
    assert not DiceCriterion().supervised(batch_of_boxes()).any()
    _, losses = learn(net.train(), batch_of_boxes())
    assert losses["mask"] == 0


def batch_of_boxes():
    batch = batch_of(TWO)
    return replace(batch, targets=[bare(TWO)])


# The auxiliary task


def test_the_smallest_mask_wins_a_cell_and_boxes_without_masks_are_unknown() -> None:
    large, small, hidden, crowd = torch.zeros(4, 32, 40, dtype=torch.bool)
    large[:24, :24], small[8:16, 8:16] = True, True
    truth = replace(
        disks((8, 8, 8), (12, 12, 4), (36, 28, 4), (36, 4, 4), size=(32, 40)),
        masks=torch.stack([large, small, hidden, crowd]),
        has_mask=torch.tensor([True, True, False, True]),
        ignore=torch.tensor([False, False, False, True]),
        labels=torch.tensor([0, 1, 2, 2]),
    )
    labels, valid = semantic_target(truth, (4, 6))
    assert labels.tolist() == [[0, 0, 0, -1, -1, -1], [0, 1, 0, -1, -1, -1], [0, 0, 0, -1, -1, -1], [-1] * 6]
    unknown = [(0, 4), (3, 4)]
    assert valid.tolist() == [[(y, x) not in unknown for x in range(6)] for y in range(4)]


def test_semantic_loss_is_the_focal_loss_over_known_cells_by_those_of_objects() -> None:
    logits = torch.randn(1, 3, 12, 16)
    labels, _ = semantic_target(TWO, (12, 16))
    p, total = logits.sigmoid()[0], 0.0
    for c in range(3):
        for y in range(12):
            for x in range(16):
                q = p[c, y, x] if labels[y, x] == c else 1 - p[c, y, x]
                total -= (0.25 if labels[y, x] == c else 0.75) * (1 - q) ** 2 * q.log()
    torch.testing.assert_close(semantic_loss(logits, [TWO]), total / (labels >= 0).sum(), atol=1e-5, rtol=1e-4)


# Inference


@pytest.fixture(scope="module")
def decoded():
    net = small_net("condinst/lite0", "decode.score_threshold=0.004").eval()
    batch = batch_of(TWO, ONE)
    with torch.no_grad():
        outputs = net(batch.images, batch.sizes)
    return net, outputs, batch


def test_masks_of_chosen_locations_are_those_of_the_detections(decoded) -> None:
    net, outputs, batch = decoded
    found = net.decode(outputs, batch.sizes)
    for image, survivors in enumerate(net.survivors(outputs)):
        boxes = rescale_boxes(survivors.boxes, batch.sizes[image], batch.sizes[image])
        shown = (boxes[:, 2:] > boxes[:, :2]).all(1)
        masks = net.branches["mask"].masks_at(outputs, image, survivors.location[shown], batch.sizes[image])
        assert torch.equal(masks, found[image].masks)


def test_compact_masks_are_the_run_lengths_of_the_masks(decoded) -> None:
    net, outputs, batch = decoded
    frames = [(70, 90), (64, 72)]
    whole, compact = (net.decode(outputs, batch.sizes, frames, compact=c) for c in (False, True))
    for a, b in zip(whole, compact, strict=True):
        assert encode(a.masks) == b.masks
        assert torch.equal(a.boxes, b.boxes)


def test_masks_leave_their_boxes_unless_they_are_cut(decoded) -> None:
    net, outputs, batch = decoded
    cut_net = small_net("condinst/lite0", "decode.score_threshold=0.004", "mask.crop=true").eval()
    whole, cut = (n.decode(outputs, batch.sizes)[0] for n in (net, cut_net))
    assert whole.masks.sum() > cut.masks.sum() > 0
    x, y = torch.arange(SIZE[1]), torch.arange(SIZE[0])
    low, high = cut.boxes[:, :2].floor(), cut.boxes[:, 2:].ceil()
    columns = (x >= low[:, :1]) & (x < high[:, :1])
    rows = (y >= low[:, 1:]) & (y < high[:, 1:])
    assert torch.equal(cut.masks, whole.masks & rows[:, :, None] & columns[:, None])


def test_a_network_without_boxes_tells_duplicates_apart_by_masks() -> None:
    net = small_net("condinst/lite0", "box=null", "decode.score_threshold=0.004", "decode.nms_threshold=0.3").eval()
    batch = batch_of(TWO, ONE)
    with torch.no_grad():
        outputs = net(batch.images, batch.sizes)
    assert outputs.ltrb is None
    whole, compact = (net.decode(outputs, batch.sizes, compact=c) for c in (False, True))
    for survivors, detections, other in zip(net.survivors(outputs), whole, compact, strict=True):
        masks = net.branches["mask"].logits_at(outputs, survivors.image, survivors.location) > 0
        flat = masks.flatten(1).float()
        shared = flat @ flat.T
        iou = shared / (flat.sum(1)[:, None] + flat.sum(1) - shared)
        rivals = (survivors.labels[:, None] == survivors.labels).triu(1)
        assert len(survivors.labels) > 1
        assert iou[rivals].max() <= 0.3
        for box, mask in zip(detections.boxes, detections.masks, strict=True):
            y, x = mask.nonzero().T
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert torch.equal(detections.boxes, other.boxes)


def test_masks_that_suppression_compares_are_capped() -> None:
    net = small_net("condinst/lite0", "box=null", "decode.score_threshold=0.004", "mask.candidates=3").eval()
    with torch.no_grad():
        found = net.decode(net(batch_of(TWO).images), [SIZE])
    assert 0 < len(found[0]) <= 3


def test_nothing_found_is_no_masks(decoded) -> None:
    net, outputs, batch = decoded
    nothing = outputs._replace(logits=outputs.logits - 50)
    for compact in (False, True):
        found = net.decode(nothing, batch.sizes, compact=compact)[0]
        assert len(found) == len(found.masks) == 0


# Recipes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("box=null", "mask=null"), "nothing is predicted"),
        (("box=null", "decode.quality=from_box"), "need boxes"),
        (("mask=null", "boxinst={}"), "add a section mask"),
        (("mask.factor=4",), "set data.mask_stride=2"),
    ],
)
def test_sections_that_cannot_go_together_are_refused(overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build("condinst/lite0", 3, overrides)
