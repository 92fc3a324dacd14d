"""BoxInst's criterion against slow loops over pixels and edges, and what it can and cannot learn."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from methods.mask_nets import bare, batch_of, disks, picture, small_net
from perpixel.locations import make_grid
from perpixel.methods.boxinst import BoxCriterion, BoxInstConfig
from perpixel.ops.color import coarse_lab
from perpixel.ops.losses import dice_loss
from perpixel.ops.masks import aligned_upsample
from perpixel.structures import Batch, Outputs, Progress

SIZE = (40, 48)
TRUTH = disks((18, 17, 12.5), (38, 30, 7.5), size=SIZE)


def blank(images: int = 1, shape=(5, 6)) -> Outputs:
    """Outputs of a network whose predictions do not matter."""
    points, level = make_grid([shape], [8])
    logits = torch.zeros(images, len(points), 3)
    return Outputs(logits=logits, centerness=None, ltrb=None, points=points, level=level, shapes=(shape,))


def noisy(batch: Batch) -> Batch:
    """Edges of all similarities, and not two values alike."""
    return replace(batch, images=(batch.images.float() + 40 * torch.rand(batch.images.shape)).clamp(0, 255))


def slow_edges(batch: Batch, config: BoxInstConfig, bottom: int) -> dict[tuple, float]:
    """Color similarity of every edge, both ways, between samples whose color is known."""
    colors = coarse_lab(batch.images, 4)[0]
    height, width = colors.shape[1:]
    steps = [config.dilation * d for d in range(-(config.size // 2), config.size // 2 + 1)]
    found = {}
    for y in range(height):
        for x in range(width):
            for dy in steps:
                for dx in steps:
                    v, u = y + dy, x + dx
                    if (dy, dx) != (0, 0) and 0 <= v < height and 0 <= u < width:
                        near = math.exp(-math.dist(colors[:, y, x], colors[:, v, u]) / config.theta)
                        found[(y, x), (v, u)] = near
    return found


def inside_box(box: list[float], y: int, x: int) -> bool:
    x0, y0, x1, y1 = (int(v) for v in box)
    return x0 <= 4 * x + 2 <= x1 and y0 <= 4 * y + 2 <= y1


def known_color(batch: Batch, bottom: int, y: int, x: int) -> bool:
    height, width = batch.sizes[0]
    return 4 * y + 2 < height - bottom and 4 * x + 2 < width


def slow_pairwise(logits, boxes, masks, batch, config: BoxInstConfig, bottom: int) -> float:
    """The release's form or the text's, over all edges one by one."""
    similar = slow_edges(batch, config, bottom)
    total = count = 0.0
    for logit, box, mask in zip(logits, boxes, masks, strict=True):
        p = aligned_upsample(logit[None].double(), 2)[0].sigmoid()
        for ((y, x), (v, u)), near in similar.items():
            first, second = inside_box(box, y, x), inside_box(box, v, u)
            known = known_color(batch, bottom, v, u)
            if config.inside == "first":
                counts = first and known
            else:
                counts = (first or second) and known and known_color(batch, bottom, y, x) and (y, x) < (v, u)
            if not counts:
                continue
            together = p[y, x] * p[v, u] + (1 - p[y, x]) * (1 - p[v, u])  # eq. 6.4
            if config.edges == "mask":
                total -= math.log(together if mask[y, x] == mask[v, u] else 1 - together)  # eq. 6.5
                count += 1
            else:
                total -= math.log(together) * (near >= config.threshold)
                count += near >= config.threshold if config.normalizer == "supervised" else 1
    return total / max(count, 1)


def terms(config: BoxInstConfig, batch: Batch, logits: torch.Tensor, objects: list[int], fraction: float = 1.0):
    criterion = BoxCriterion(config)
    target = criterion.targets(blank(len(batch), (batch.images.shape[2] // 8, batch.images.shape[3] // 8)), batch, 4)[0]
    logs: dict = {}
    sums = criterion.sums(logits, 2, objects, target)
    return criterion.losses(sums, torch.tensor(float(max(len(objects), 1))), Progress(0, fraction), logs), logs


FORMS = {
    "release": {},
    "text": {"threshold": 0.1, "inside": "either", "normalizer": "all", "warmup": 0.0, "bottom_rows": 0},
    "near": {"size": 3, "dilation": 1, "theta": 5.0},
    "wide": {"size": 5, "dilation": 1, "inside": "either", "bottom_rows": 0},
    "wider": {"size": 5, "dilation": 2, "normalizer": "all"},
    "no threshold": {"threshold": 0.0},
    "true edges": {"edges": "mask", "inside": "either", "normalizer": "all", "bottom_rows": 0},
}


@pytest.mark.parametrize("form", FORMS)
def test_pairwise_loss_equals_a_loop_over_edges(form) -> None:
    config = BoxInstConfig(**FORMS[form])
    batch = noisy(batch_of(TRUTH))
    batch = replace(batch, original_sizes=[(50, 60)])  # 10 px of 50 at the bottom are 8 of 40 in the network's frame
    logits, objects = 3 * torch.randn(3, 5, 6), [0, 0, 1]
    losses, logs = terms(config, batch, logits, objects)
    boxes = [TRUTH.boxes[o].tolist() for o in objects]
    masks = [TRUTH.masks[o, 2::4, 2::4] for o in objects]
    expected = slow_pairwise(logits, boxes, masks, batch, config, bottom=8 * (config.bottom_rows > 0))
    assert expected > 0.02
    assert losses["pairwise"].item() == pytest.approx(expected, rel=1e-4)
    assert logs["pairwise_unweighted"].item() == pytest.approx(expected, rel=1e-4)


def lines(logits: torch.Tensor, box: list[float]):
    """Projections of a probability map at stride 4 and of a box, along both axes, straight from eq. 6.2."""
    p = aligned_upsample(logits[None], 2)[0].sigmoid()
    height, width = p.shape
    b = torch.tensor([[inside_box(box, y, x) for x in range(width)] for y in range(height)])
    return [(p.amax(1), b.any(1)), (p.amax(0), b.any(0))]


@pytest.mark.parametrize("kind", ["dice", "bce"])
def test_projection_of_cells_equals_that_of_the_upsampled_mask(kind) -> None:
    logits, objects = 3 * torch.randn(3, 5, 6), [0, 1, 1]
    losses, _ = terms(BoxInstConfig(projection=kind), batch_of(TRUTH), logits, objects)
    expected = 0.0
    for logit, o in zip(logits, objects, strict=True):
        for p, b in lines(logit, TRUTH.boxes[o].tolist()):
            if kind == "dice":
                expected += dice_loss(p[None], b[None])[0]
            else:
                expected += torch.nn.functional.binary_cross_entropy(p, b.float())
    torch.testing.assert_close(losses["projection"], expected / 3, atol=1e-5, rtol=1e-4)


def test_a_filled_box_costs_no_projection_and_an_empty_mask_all_of_it() -> None:
    box = bare(disks((24, 20, 12), size=SIZE))
    batch = replace(batch_of(TRUTH), targets=[box])
    cells = torch.full((5, 6), -30.0)
    cells[1:4, 1:5] = 30.0  # 8 to 32 and 8 to 40 px; the box is 8 to 32 and 12 to 36 px
    full, _ = terms(BoxInstConfig(), batch, cells[None], [0])
    empty, logs = terms(BoxInstConfig(), batch, torch.full((1, 5, 6), -30.0), [0])
    assert full["projection"] < 0.2
    assert empty["projection"].item() == pytest.approx(2.0, abs=1e-3)
    assert logs["box_filled"] == 0


def test_pairwise_term_rises_with_the_schedule() -> None:
    logits, batch = torch.randn(1, 5, 6), batch_of(TRUTH)
    full = terms(BoxInstConfig(warmup=0.2), batch, logits, [0], 0.2)[0]
    for fraction, factor in ((0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.9, 1.0)):
        losses, logs = terms(BoxInstConfig(warmup=0.2), batch, logits, [0], fraction)
        torch.testing.assert_close(losses["pairwise"], factor * full["pairwise"])
        torch.testing.assert_close(logs["pairwise_unweighted"], full["pairwise"])
        torch.testing.assert_close(losses["projection"], full["projection"])
    always = terms(BoxInstConfig(warmup=0.0), batch, logits, [0], 0.0)[0]
    torch.testing.assert_close(always["pairwise"], full["pairwise"])


def test_weights_scale_their_terms() -> None:
    logits, batch = torch.randn(1, 5, 6), batch_of(TRUTH)
    one, _ = terms(BoxInstConfig(), batch, logits, [0])
    other, _ = terms(BoxInstConfig(projection_weight=0.5, pairwise_weight=3), batch, logits, [0])
    torch.testing.assert_close(other["projection"], 0.5 * one["projection"])
    torch.testing.assert_close(other["pairwise"], 3 * one["pairwise"])


def test_known_masks_teach_by_dice_and_the_rest_by_their_boxes() -> None:
    partly = replace(TRUTH, has_mask=torch.tensor([True, False]))
    logits = torch.randn(3, 5, 6)
    mixed, _ = terms(BoxInstConfig(masks="known"), batch_of(partly), logits, [0, 0, 1])
    boxes, _ = terms(BoxInstConfig(), batch_of(TRUTH), logits[2:], [1])
    dice = dice_loss(aligned_upsample(logits[:2], 2).sigmoid(), TRUTH.masks[[0, 0], 2::4, 2::4]).sum()
    assert mixed.keys() == {"mask", "projection", "pairwise"}
    torch.testing.assert_close(mixed["mask"], dice / 3)
    torch.testing.assert_close(mixed["projection"], boxes["projection"] / 3)
    torch.testing.assert_close(mixed["pairwise"], boxes["pairwise"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [True, True]),
        ({"masks": "known"}, [True, True]),
        ({"masks": "known", "projection_weight": 0, "pairwise_weight": 0}, [True, False]),  # Table 6.7, first row
        ({"edges": "mask"}, [True, False]),
    ],
)
def test_who_takes_part(config, expected) -> None:
    criterion = BoxCriterion(BoxInstConfig(**config))
    partly = replace(TRUTH, has_mask=torch.tensor([True, False]))
    assert criterion.supervised(batch_of(partly)).tolist() == expected
    assert criterion.needs == (frozenset({"masks"}) if config else frozenset())


def test_a_box_between_samples_has_no_edges() -> None:
    tiny = bare(disks((24, 20, 1), size=SIZE))
    batch = replace(batch_of(TRUTH), targets=[replace(tiny, boxes=torch.tensor([[23.0, 19.0, 25.5, 21.5]]))])
    losses, logs = terms(BoxInstConfig(), batch, torch.randn(2, 5, 6), [0, 0])
    assert losses["pairwise"] == 0
    assert all(bool(value.isfinite()) for value in (*losses.values(), *logs.values()))


def test_no_instances_cost_nothing() -> None:
    batch = replace(batch_of(TRUTH), targets=[bare(disks(size=SIZE))])
    losses, _ = terms(BoxInstConfig(), batch, torch.zeros(0, 5, 6), [])
    assert {name: value.item() for name, value in losses.items()} == {"projection": 0, "pairwise": 0}


# Learning


def learned_mask(config: BoxInstConfig, radius: float) -> float:
    """IoU with the truth of a free map of logits that the criterion has taught; a disk of its own color in the picture,
    and a blob of another radius to start from (a network starts from its coordinates)."""
    size = (128, 160)
    truth = disks((80, 64, 44), size=size)
    batch = batch_of(truth)
    batch = replace(batch, images=batch.images.float() + 2 * torch.rand(batch.images.shape), targets=[bare(truth)])
    criterion = BoxCriterion(config)
    target = criterion.targets(blank(1, (16, 20)), batch, 4)[0]
    points = make_grid([(16, 20)], [8]).points.view(1, 16, 20, 2)
    logits = ((radius - (points - torch.tensor([80.0, 64.0])).norm(dim=-1)) / 20).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        losses = criterion.losses(criterion.sums(logits, 2, [0], target), torch.tensor(1.0), Progress(0, 0.5), {})
        sum(losses.values()).backward()
        optimizer.step()
    found, true = aligned_upsample(logits.detach(), 2)[0] > 0, truth.masks[0, 2::4, 2::4]
    return ((found & true).sum() / (found | true).sum()).item()


def test_boxes_and_colors_are_enough_for_the_mask_and_neither_alone_is() -> None:
    assert learned_mask(BoxInstConfig(), radius=45) > 0.95
    assert learned_mask(BoxInstConfig(**FORMS["text"]), radius=20) > 0.95
    assert learned_mask(BoxInstConfig(pairwise_weight=0), radius=20) < 0.7  # touches all sides and leaves the rest
    assert learned_mask(BoxInstConfig(threshold=0.0), radius=45) < 0.8  # Table 6.2: with all edges it fills the box


NETS = [(), ("boxinst.masks=known",), ("boxinst.edges=mask",), ("mask.factor=4", "data.mask_stride=2")]


@pytest.mark.parametrize("overrides", NETS, ids=lambda o: ",".join(o) or "default")
def test_networks_learn_from_every_batch(overrides) -> None:
    two = disks((40, 40, 24), (90, 60, 20), has_mask=torch.tensor([True, False]))
    for truths in ((two, disks((30, 30, 20), size=(64, 72))), (disks(), bare(disks((40, 40, 24)))), (disks(), disks())):
        net = small_net("boxinst/lite0", *overrides).train()
        batch = batch_of(*(t if t.masks is not None else disks((40, 40, 24)) for t in truths))
        batch = replace(batch, targets=list(truths))
        losses = net.loss(net(batch.images, batch.sizes, auxiliary=True), batch, Progress(10, 0.5))
        sum(losses.values()).backward()
        assert all(bool(value.isfinite()) for value in losses.values())
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_a_run_whose_masks_stay_boxes_says_so_once() -> None:
    criterion, cells = BoxCriterion(BoxInstConfig(threshold=0.1)), torch.full((1, 5, 6), 9.0)
    target = criterion.targets(blank(), batch_of(TRUTH), 4)[0]

    def step(fraction: float) -> None:
        criterion.losses(criterion.sums(cells, 2, [0], target), torch.tensor(1.0), Progress(0, fraction), {})

    with pytest.warns(UserWarning, match=r"cover 100% of their boxes.*boxinst.threshold \(now 0.1\)"):
        step(0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0.95)
        other = BoxCriterion(BoxInstConfig())
        for fraction in (0.5, 0.95):
            other.losses(other.sums(-cells, 2, [0], target), torch.tensor(1.0), Progress(0, fraction), {})


def test_pictures_are_what_the_criterion_sees() -> None:
    assert picture(TRUTH)[:, 17, 18].tolist() == [200, 40, 60]
