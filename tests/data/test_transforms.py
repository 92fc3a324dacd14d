"""Views move pixels, boxes, points and masks together; torchvision's tv_tensors are the reference."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from torchvision import tv_tensors

from perpixel.data.transforms import View, clip_boxes, jitter_colors, pad_to, plan_view, show_keypoints


def photo(height: int, width: int) -> torch.Tensor:
    small = torch.rand(1, 3, 6, 8) * 255
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)


VIEWS = [
    View.whole((60, 80)),
    View.whole((60, 80), (90, 120)),
    View((60, 80), (0, 0, 60, 80), (30, 40), mirrored=True),
    View((60, 80), (10, 20, 40, 50), (80, 100)),
    View((60, 80), (10, 20, 40, 50), (80, 100), mirrored=True),
]


@pytest.mark.parametrize("view", VIEWS)
def test_pixels_and_boxes_follow_torchvision(view: View) -> None:
    image = photo(60, 80)
    boxes = torch.tensor([[25.0, 12.0, 60.0, 45.0], [0.0, 0.0, 80.0, 60.0], [22.5, 11.25, 30.0, 14.5]])
    expected_image = tvf.resize(tvf.crop(tv_tensors.Image(image), *view.crop), list(view.size), antialias=True)
    wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 80), clamping_mode=None)
    expected = tvf.resize(tvf.crop(wrapped, *view.crop), list(view.size))
    if view.mirrored:
        expected_image, expected = tvf.horizontal_flip(expected_image), tvf.horizontal_flip(expected)
    difference = (view.image(image).int() - expected_image.int()).abs()
    assert difference.max() <= 1  # mirrored before or after resizing rounds differently
    assert view.boxes(boxes.numpy()) == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize("view", VIEWS)
def test_a_marked_pixel_is_found_where_its_point_goes(view: View) -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 28:32, 48:52] = 255
    shown = view.image(image)[0].double()
    rows, columns = torch.meshgrid(torch.arange(view.size[0]), torch.arange(view.size[1]), indexing="ij")
    center = [float((shown * (axis + 0.5)).sum() / shown.sum()) for axis in (columns, rows)]
    assert view.points(np.array([50.0, 30.0])).tolist() == pytest.approx(center, abs=0.05)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("stride", [1, 4])
def test_stored_indices_invert_the_view(view: View, stride: int) -> None:
    rows, columns = view.stored_indices(stride)
    for j, column in enumerate(columns.tolist()):
        for i, row in enumerate(rows.tolist()):
            x, y = view.points(np.array([column + 0.5, row + 0.5])).tolist()
            scale = max(1.0, *view.scale)
            assert abs(x - (stride // 2 + j * stride + 0.5)) <= scale / 2 + 1e-6
            assert abs(y - (stride // 2 + i * stride + 0.5)) <= scale / 2 + 1e-6
    assert len(rows) == len(range(stride // 2, view.size[0], stride))


def test_reduced_pictures_show_the_same(shared: object) -> None:
    image = photo(240, 320)
    reduced = tvf.resize(image, [60, 80], antialias=True)
    view = View((240, 320), (40, 80, 120, 160), (30, 40), mirrored=True)
    assert (view.image(image).int() - view.image(reduced).int()).abs().float().mean() < 2


def test_two_mirrors_are_none() -> None:
    view = View((60, 80), (0, 0, 60, 80), (60, 80), mirrored=True)
    image = photo(60, 80)
    points = np.random.default_rng(0).uniform(0, 60, (5, 2))
    assert torch.equal(view.image(view.image(image)), image)
    assert view.points(view.points(points)) == pytest.approx(points)


def test_plans_use_their_whole_range() -> None:
    rng = np.random.default_rng(0)
    views = [plan_view((480, 640), rng, short_side=(256, 320), max_size=400, flip=0.5, crop=0.5) for _ in range(300)]
    assert {v.mirrored for v in views} == {True, False}
    assert 0.4 < np.mean([v.mirrored for v in views]) < 0.6
    kept = np.array([[v.crop[2] / 480, v.crop[3] / 640] for v in views])
    assert kept.min() >= 0.5 - 1e-3
    assert kept.min(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert kept.max() > 0.98
    for view in views:
        top, left, height, width = view.crop
        assert 0 <= top <= 480 - height
        assert 0 <= left <= 640 - width
        assert min(view.size) in (256, 320) or max(view.size) == 400
        assert view.size[0] / view.size[1] == pytest.approx(height / width, rel=0.01)


def test_without_options_a_plan_is_the_plain_resize() -> None:
    view = plan_view((480, 640), np.random.default_rng(0), short_side=(800,), max_size=1333)
    assert view == View((480, 640), (0, 0, 480, 640), (800, 1067))


def test_large_scale_jitter_shrinks_the_picture_or_keeps_a_part_of_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        view = plan_view((480, 640), rng, short_side=(480,), max_size=1000, scale_jitter=(0.5, 2.0))
        factor = view.scale[0]
        assert 0.49 <= factor <= 2.02
        if factor <= 1:
            assert view.crop == (0, 0, 480, 640)
            assert view.size[0] == pytest.approx(480 * factor, abs=1)
        else:
            assert view.size == (480, 640)  # never larger than without jitter
            assert view.crop[2] == pytest.approx(480 / factor, abs=1)


def test_clipping_tells_how_much_of_each_box_is_left() -> None:
    boxes = np.array([[10, 10, 20, 20], [-10, 0, 10, 20], [95, 45, 105, 55], [200, 0, 210, 10]], np.float32)
    clipped, left = clip_boxes(boxes, (50, 100))
    assert clipped[:3].tolist() == [[10, 10, 20, 20], [0, 0, 10, 20], [95, 45, 100, 50]]
    assert left.tolist() == [1, 0.5, 0.25, 0]


def test_a_mirror_exchanges_left_and_right_keypoints_and_a_crop_hides_them() -> None:
    keypoints = np.array([[[10, 5, 2], [30, 6, 1], [20, 50, 2], [0, 0, 0]]], np.float32)  # left, right, nose, unknown
    partner = np.array([[1, 0, 2, 3]])
    mirrored = show_keypoints(View((60, 80), (0, 0, 60, 80), (60, 80), True), keypoints, partner)
    assert mirrored[0].tolist() == [[50, 6, 1], [70, 5, 2], [60, 50, 2], [0, 0, 0]]
    cropped = show_keypoints(View((60, 80), (0, 15, 40, 40), (80, 80)), keypoints, partner)
    assert cropped[0].tolist() == [[0, 0, 0], [30, 12, 1], [0, 0, 0], [0, 0, 0]]
    assert keypoints[0, 0].tolist() == [10, 5, 2]  # the truth itself is untouched


def test_color_jitter_of_strength_0_is_the_identity_and_otherwise_follows_the_seed() -> None:
    image = photo(20, 30)
    assert jitter_colors(image, 0.0, np.random.default_rng(0)) is image
    a, b, c = (jitter_colors(image, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a.dtype == torch.uint8
    assert a.shape == image.shape
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_padding_is_zero_and_pictures_keep_their_place() -> None:
    images = [photo(20, 30), photo(32, 16)]
    batch = pad_to(images, (32, 64))
    assert batch.shape == (2, 3, 32, 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for row, image in zip(batch, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(row[:, :height, :width], image)
        assert row.sum() == image.sum(dtype=torch.int64)
