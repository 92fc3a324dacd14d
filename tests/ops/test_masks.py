"""Masks to pixels against the release's sequence of full-size resizes, sampling and boxes by hand."""

import pytest
import torch
import torch.nn.functional as F

from perpixel import rle
from perpixel.ops.masks import (
    aligned_upsample,
    known_masks,
    masks_in_frame,
    padded_masks,
    rles_in_frame,
    sample_masks,
    tight_boxes,
)
from perpixel.structures import Instances


def slow_upsample(line: list[float], factor: int) -> list[float]:
    """Pixel i samples the line at (i - factor // 2) / factor, clamped to its ends."""
    result = []
    for i in range(len(line) * factor):
        x = min(max((i - factor // 2) / factor, 0), len(line) - 1)
        low = int(x)
        high = min(low + 1, len(line) - 1)
        result.append(line[low] + (x - low) * (line[high] - line[low]))
    return result


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_upsampling_is_aligned_linear_interpolation_along_both_axes(factor) -> None:
    maps = torch.randn(5, 7)
    rows = torch.tensor([slow_upsample(row, factor) for row in maps.tolist()])
    expected = torch.tensor([slow_upsample(column, factor) for column in rows.T.tolist()]).T
    torch.testing.assert_close(aligned_upsample(maps[None], factor)[0], expected)


def test_upsampling_by_two_repeats_the_first_sample_and_halves_between() -> None:
    assert aligned_upsample(torch.tensor([[0.0, 1.0, 2.0]]), 2)[0].tolist() == [0, 0, 0.5, 1, 1.5, 2]


def full_size(logits: torch.Tensor, factor: int, size, output_size) -> torch.Tensor:
    """Every mask at full size, twice, as the release does it."""
    probabilities = aligned_upsample(aligned_upsample(logits, factor).sigmoid(), 8 // factor)
    cut = probabilities[:, None, : size[0], : size[1]]
    return F.interpolate(cut, size=output_size, mode="bilinear", align_corners=False)[:, 0] > 0.5


def shapes_of_all_kinds(height: int, width: int) -> torch.Tensor:
    """Logits of disks in, at and beyond the frame, a ring, noise, nothing, everything, single cells in corners."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = [((y - v) ** 2 + (x - u) ** 2).sqrt() for v, u in ((6, 9), (0, 0), (height - 1, width - 1), (-2, 5))]
    corners = torch.full((4, height, width), -3.0)
    for i, (v, u) in enumerate(((0, 0), (0, -1), (-1, 0), (-1, -1))):
        corners[i, v, u] = 4.0
    ring = 1.5 - (distance[0] - 4).abs()
    rest = [ring, torch.randn(height, width), torch.full((height, width), -1.0), torch.full((height, width), 2.0)]
    return torch.stack([*(4.3 - d for d in distance), *rest, *corners])


FRAMES = [(104, 141), (250, 333), (61, 97), (13, 30), (200, 100)]


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("frame", FRAMES)
def test_one_resize_of_the_window_equals_two_of_the_whole(factor, frame) -> None:
    logits, size = shapes_of_all_kinds(16, 20), (104, 141)
    ours, theirs = masks_in_frame(logits, factor, size, frame), full_size(logits, factor, size, frame)
    assert ours.shape == (len(logits), *frame)
    assert (ours != theirs).sum() <= 3  # probabilities within the noise of float32 of 1/2
    assert ours[:4].any()


@pytest.mark.parametrize("frame", FRAMES)
def test_run_lengths_without_pixels_are_those_of_the_masks(frame) -> None:
    logits = shapes_of_all_kinds(16, 20)
    drawn = masks_in_frame(logits, 2, (104, 141), frame)
    assert rles_in_frame(logits, 2, (104, 141), frame) == rle.encode(drawn)


def test_masks_are_cut_to_boxes_where_asked() -> None:
    logits, frame = shapes_of_all_kinds(16, 20), (104, 141)
    boxes = torch.tensor([[20.5, 30, 90, 70.2]]).repeat(len(logits), 1)
    whole = masks_in_frame(logits, 2, frame, frame)
    expected = torch.zeros_like(whole)
    expected[:, 30:71, 20:90] = whole[:, 30:71, 20:90]
    assert torch.equal(masks_in_frame(logits, 2, frame, frame, boxes), expected)
    assert rles_in_frame(logits, 2, frame, frame, boxes) == rle.encode(expected)


def test_no_masks_give_none() -> None:
    assert masks_in_frame(torch.zeros(0, 4, 4), 2, (32, 32), (20, 30)).shape == (0, 20, 30)
    assert rles_in_frame(torch.zeros(0, 4, 4), 2, (32, 32), (20, 30)) == []


def test_a_graph_on_the_logits_is_left_alone() -> None:
    logits = torch.randn(2, 4, 4, requires_grad=True)
    assert not masks_in_frame(logits, 2, (32, 32), (32, 32)).requires_grad


# Truth


def truth(masks: torch.Tensor | None, size, stride: int = 1, **fields) -> Instances:
    count = 2 if masks is None else len(masks)
    return Instances(
        size=size,
        boxes=torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1),
        labels=torch.zeros(count, dtype=torch.int64),
        masks=masks,
        mask_stride=stride,
        **fields,
    )


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("size", [(32, 48), (37, 51), (3, 5)])
def test_full_masks_are_sampled_at_half_a_stride(stride, size) -> None:
    full = torch.rand(3, *size) > 0.5
    assert torch.equal(sample_masks(truth(full, size), stride), full[:, stride // 2 :: stride, stride // 2 :: stride])


def test_masks_stored_with_the_stride_are_used_as_they_are() -> None:
    stored = torch.rand(2, 8, 12) > 0.5
    assert sample_masks(truth(stored, (32, 48), 4), 4) is stored


def test_other_strides_take_the_stored_sample_around_the_pixel() -> None:
    stored = torch.rand(1, 8, 13) > 0.5  # samples of 4 x 4 px
    found = sample_masks(truth(stored, (32, 52), 4), 8)[0]  # wanted at 4, 12, ... px
    expected = [[bool(stored[0, y // 4, x // 4]) for x in range(4, 52, 8)] for y in range(4, 32, 8)]
    assert found.tolist() == expected


def test_canvas_beyond_the_image_is_empty() -> None:
    full = torch.ones(1, 20, 30, dtype=torch.bool)
    padded = padded_masks(truth(full, (20, 30)), 4, (8, 16))
    assert padded.shape == (1, 8, 16)
    assert padded.sum() == 5 * 7  # rows at 2 to 18, columns at 2 to 26 px
    assert not padded_masks(truth(None, (20, 30)), 4, (8, 16)).any()


def test_masks_are_known_unless_labels_say_otherwise() -> None:
    full = torch.ones(2, 4, 4, dtype=torch.bool)
    assert known_masks(truth(full, (4, 4))).tolist() == [True, True]
    assert known_masks(truth(full, (4, 4), has_mask=torch.tensor([True, False]))).tolist() == [True, False]
    assert known_masks(truth(None, (4, 4))).tolist() == [False, False]


def test_tight_boxes_end_behind_the_last_pixel() -> None:
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 5:8] = True
    masks[1] = True
    assert tight_boxes(masks).tolist() == [[5, 2, 8, 4], [0, 0, 8, 6], [0, 0, 0, 0]]
    assert rle.boxes_of(rle.encode(masks[:2])).tolist() == [[5, 2, 8, 4], [0, 0, 8, 6]]
    assert rle.boxes_of([]).shape == (0, 4)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9, 1.0])
def test_a_window_encodes_as_the_whole_mask_does(density) -> None:
    g = torch.Generator().manual_seed(int(density * 10))
    for _ in range(40):
        height, width, h, w = torch.randint(1, 12, (4,), generator=g).tolist()
        h, w = min(h, height), min(w, width)
        y = int(torch.randint(0, height - h + 1, (1,), generator=g))
        x = int(torch.randint(0, width - w + 1, (1,), generator=g))
        window = torch.rand(h, w, generator=g) < density
        whole = torch.zeros(1, height, width, dtype=torch.bool)
        whole[0, y : y + h, x : x + w] = window
        assert rle.encode_window(window, (y, x), (height, width)) == rle.encode(whole)[0]
