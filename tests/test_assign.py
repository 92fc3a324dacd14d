"""Assignment against worked examples and a slow loop over every (location, object) pair."""

import math

import pytest
import torch

from perpixel.assign import BACKGROUND, IGNORED, AssignConfig, assign
from perpixel.errors import ConfigError
from perpixel.locations import make_grid
from perpixel.structures import Instances

STRIDES = (8, 16, 32, 64, 128)
SHAPES = tuple((math.ceil(256 / s), math.ceil(320 / s)) for s in STRIDES)
SIZE = (256, 320)


def truth(boxes: list[list[float]], ignore: list[bool] | None = None, centers=None) -> Instances:
    return Instances(
        size=SIZE,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        ignore=None if ignore is None else torch.tensor(ignore),
        centers=centers,
    )


def random_truth(seed: int, count: int) -> Instances:
    g = torch.Generator().manual_seed(seed)
    size = 4 + 200 * torch.rand(count, 2, generator=g) ** 2
    low = torch.rand(count, 2, generator=g) * (torch.tensor([320.0, 256.0]) - size)
    return Instances(
        size=SIZE,
        boxes=torch.cat([low, low + size], 1),
        labels=torch.zeros(count, dtype=torch.int64),
        ignore=torch.rand(count, generator=g) < 0.2,
    )


def slow_assign(target: Instances, rules: AssignConfig) -> list[tuple[list[int], int]]:
    """Objects of every location, best first, and what an empty slot is; straight from sections 3.2.1 to 3.3.1."""
    grid = make_grid(SHAPES, STRIDES)
    upper = [64, 128, 256, 512, math.inf]
    result = []
    for (x, y), level in zip(grid.points.tolist(), grid.level.tolist(), strict=True):
        s, wanted, ignored = STRIDES[level], [], False
        for i, (x0, y0, x1, y1) in enumerate(target.boxes.tolist()):
            ltrb = (x - x0, y - y0, x1 - x, y1 - y)
            if target.ignore[i]:
                ignored |= min(ltrb) > 0
                continue
            w, h, cx, cy = x1 - x0, y1 - y0, (x0 + x1) / 2, (y0 + y1) / 2
            if rules.center_radius is not None:
                rx = ry = rules.center_radius * s
                if rules.center_shape == "box":
                    rx, ry = rx * w / math.sqrt(w * h), ry * h / math.sqrt(w * h)
                if not (max(cx - rx, x0) < x < min(cx + rx, x1) and max(cy - ry, y0) < y < min(cy + ry, y1)):
                    continue
            if min(ltrb) <= 0:
                continue
            low, high = ([-1, *upper][level], upper[level])
            measure = {"max_distance": max(ltrb), "sqrt_area": math.sqrt(w * h) / 2, "max_side": max(w, h) / 2}
            if rules.level_rule == "fpn":
                taken = min(max(math.floor(5 + math.log2(math.sqrt(w * h) / 224)), 3), 7) == level + 3
            elif rules.level_rule == "all":
                taken = True
            else:
                taken = low <= measure[rules.level_rule] <= high
            if taken:
                key = w * h if rules.tie_rule == "smallest" else (x - cx) ** 2 + (y - cy) ** 2
                wanted.append((key, i))
        result.append(([i for _, i in sorted(wanted)], IGNORED if ignored else BACKGROUND))
    return result


RULES = {
    "default": {},
    "whole box": {"center_radius": None},
    "radius 2": {"center_radius": 2.0},
    "aspect ratio": {"center_shape": "box"},
    "sqrt_area": {"level_rule": "sqrt_area"},
    "max_side": {"level_rule": "max_side"},
    "fpn": {"level_rule": "fpn"},
    "all levels": {"level_rule": "all", "center_radius": None},
    "nearest": {"tie_rule": "nearest_center", "center_radius": None},
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_a_loop_over_all_pairs(name) -> None:
    rules = AssignConfig(**RULES[name])
    targets = [random_truth(seed, count) for seed, count in ((1, 12), (2, 0), (3, 40))]
    result = assign(SHAPES, STRIDES, targets, rules, k=2)
    for image, target in enumerate(targets):
        expected = slow_assign(target, rules)
        assert result.gt_index[image].tolist() == [(objects + [empty] * 2)[:2] for objects, empty in expected]
        assert result.candidates[image].tolist() == [len(objects) for objects, _ in expected]


def test_positives_list_exactly_the_assigned_locations() -> None:
    targets = [random_truth(5, 30), random_truth(6, 30)]
    a = assign(SHAPES, STRIDES, targets, AssignConfig())
    dense = torch.zeros_like(a.gt_index, dtype=torch.bool)
    dense[a.image, a.location, a.slot] = True
    assert torch.equal(dense, a.gt_index >= 0)
    local = a.object - torch.tensor([0, 30])[a.image]
    assert torch.equal(local, a.gt_index[a.image, a.location, a.slot])


def test_a_small_box_is_answered_by_the_cells_around_its_center_on_the_finest_level() -> None:
    # Box of 40 px around (100, 100): center region 88..112, whose cells of stride 8 are 92, 100, 108.
    a = assign(SHAPES, STRIDES, [truth([[80, 80, 120, 120]])], AssignConfig())
    points = make_grid(SHAPES, STRIDES).points[a.location]
    assert sorted(points.tolist()) == [[x, y] for x in (92.0, 100.0, 108.0) for y in (92.0, 100.0, 108.0)]


def test_smallest_object_wins_where_two_overlap() -> None:
    a = assign(SHAPES, STRIDES, [truth([[70, 70, 130, 130], [80, 80, 120, 120]])], AssignConfig())
    assert set(a.object.tolist()) == {1}
    assert a.candidates.max() == 2


def test_the_first_of_two_equal_objects_wins() -> None:
    a = assign(SHAPES, STRIDES, [truth([[80, 80, 120, 120]] * 2)], AssignConfig())
    assert set(a.object.tolist()) == {0}


@pytest.mark.parametrize(("closed", "levels"), [(True, {0, 1}), (False, set())])
def test_a_distance_at_the_end_of_a_range_belongs_to_both_levels_or_to_none(closed, levels) -> None:
    # Every level has the point (100 or 104, ...); a box whose largest distance from it is exactly 64.
    rules = AssignConfig(closed_ranges=closed, center_radius=None)
    x, y = 72.0, 72.0  # a point of stride 16 (8 + 4*16); of stride 8 it is not one, so take a box per level
    fine = assign(SHAPES, STRIDES, [truth([[68 - 64, 60, 76, 76]])], rules)
    coarse = assign(SHAPES, STRIDES, [truth([[x - 64, y - 8, x + 8, y + 8]])], rules)
    grid = make_grid(SHAPES, STRIDES)
    at_fine = ((grid.points == torch.tensor([68.0, 68.0])).all(1) & (grid.level == 0)).nonzero().item()
    at_coarse = ((grid.points == torch.tensor([x, y])).all(1) & (grid.level == 1)).nonzero().item()
    found = {0} if fine.gt_index[0, at_fine, 0] == 0 else set()
    found |= {1} if coarse.gt_index[0, at_coarse, 0] == 0 else set()
    assert found == levels


def test_mass_centers_move_the_center_region() -> None:
    rules = AssignConfig(center="mass")
    at_mass = assign(SHAPES, STRIDES, [truth([[80, 80, 120, 120]], centers=torch.tensor([[84.0, 84.0]]))], rules)
    points = make_grid(SHAPES, STRIDES).points[at_mass.location]
    assert sorted(points.tolist()) == [[84.0, 84.0], [84.0, 92.0], [92.0, 84.0], [92.0, 92.0]]


def test_an_ignore_region_hides_background_but_not_objects() -> None:
    target = truth([[80, 80, 120, 120], [40, 40, 200, 200]], ignore=[False, True])
    a = assign(SHAPES, STRIDES, [target], AssignConfig())
    points = make_grid(SHAPES, STRIDES).points
    inside = ((points > 40) & (points < 200)).all(1)
    assert (a.gt_index[0, inside, 0] != BACKGROUND).all()
    assert (a.gt_index[0, ~inside, 0] == BACKGROUND).all()
    assert (a.gt_index[0, :, 0] == 0).sum() == 9
    assert torch.equal(a.valid[0], a.gt_index[0, :, 0] != IGNORED)


def test_objects_beyond_the_picture_and_thinner_than_a_cell_are_harmless() -> None:
    a = assign(
        SHAPES, STRIDES, [truth([[-90, -90, -50, -50], [100.1, 90, 103.9, 130], [400, 400, 500, 500]])], AssignConfig()
    )
    assert len(a.object) == 0


def test_ranges_must_match_the_levels() -> None:
    with pytest.raises(ConfigError, match=r"expected 4 upper ends for 5 levels"):
        assign(SHAPES, STRIDES, [truth([[1, 1, 9, 9]])], AssignConfig(ranges=(64.0,)))


def test_three_levels_end_with_an_open_range() -> None:
    a = assign(SHAPES[:3], STRIDES[:3], [truth([[0, 0, 320, 256]])], AssignConfig())
    assert set(make_grid(SHAPES[:3], STRIDES[:3]).level[a.location].tolist()) == {2}
