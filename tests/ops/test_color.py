"""Colors against published values, edges against a loop over pixels."""

import math

import pytest
import torch

from perpixel.ops.color import coarse_lab, edge_similarity, ends, half_neighborhood, lab, similar_edges

# sRGB and CIE L*a*b* (D65, 2 degrees) as tables of colors list them.
KNOWN = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (128, 128, 128): (53.59, 0.0, 0.0),
    (8, 8, 8): (2.19, 0.0, 0.0),
}


@pytest.mark.parametrize(("rgb", "expected"), KNOWN.items())
def test_lab_of_known_colors(rgb, expected) -> None:
    found = lab(torch.tensor(rgb, dtype=torch.uint8)[:, None, None])[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.02, rtol=0)


def test_blocks_have_their_mean_color_cut_to_whole_numbers() -> None:
    image = torch.zeros(1, 3, 4, 8)
    image[..., :4] = 100
    image[..., 0, 0] = 115  # mean 100.94
    image[..., 4:] = 7
    expected = lab(torch.tensor([100.0, 7.0]).expand(3, 1, 2))
    torch.testing.assert_close(coarse_lab(image, 4)[0], expected)


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_half_of_the_neighbors_and_their_opposites_are_all(size, dilation) -> None:
    half = half_neighborhood(size, dilation)
    reach = [dilation * d for d in range(-(size // 2), size // 2 + 1)]
    everyone = {(dy, dx) for dy in reach for dx in reach} - {(0, 0)}
    assert len(half) == (size * size - 1) // 2
    assert set(half) | {(-dy, -dx) for dy, dx in half} == everyone
    assert all(dy >= 0 for dy, _ in half)


@pytest.mark.parametrize("offset", [(0, 2), (2, -2), (1, 1), (4, 0), (2, -4)])
@pytest.mark.parametrize("shape", [(5, 7), (3, 3), (1, 1), (0, 0)])
def test_ends_are_all_pairs_within_the_map(offset, shape) -> None:
    place = torch.arange(shape[0] * shape[1]).view(shape)
    first, second = (place[part].flatten().tolist() for part in ends(*shape, offset))
    expected = [
        (y * shape[1] + x, (y + offset[0]) * shape[1] + x + offset[1])
        for y in range(shape[0])
        for x in range(shape[1])
        if 0 <= y + offset[0] < shape[0] and 0 <= x + offset[1] < shape[1]
    ]
    assert list(zip(first, second, strict=True)) == expected


def test_similarity_falls_with_the_distance_of_colors() -> None:
    colors = torch.zeros(3, 1, 3)
    colors[:, 0, 1] = torch.tensor([3.0, 0.0, 4.0])
    found = edge_similarity(colors, (0, 1), theta=2.0)[0]
    assert found.tolist() == pytest.approx([math.exp(-2.5), math.exp(-2.5)])
    assert edge_similarity(colors, (0, 2))[0].tolist() == [1.0]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_similar_edges_equal_a_loop(threshold) -> None:
    colors, offsets = 4 * torch.rand(2, 3, 5, 6), half_neighborhood(3, 2)
    found = similar_edges(colors, offsets, threshold, theta=2.0)
    assert found.shape == (2, 4, 5, 6)
    for b in range(2):
        for e, (dy, dx) in enumerate(offsets):
            for y in range(5):
                for x in range(6):
                    there = 0 <= y + dy < 5 and 0 <= x + dx < 6
                    near = there and math.exp(-math.dist(colors[b, :, y, x], colors[b, :, y + dy, x + dx]) / 2)
                    assert bool(found[b, e, y, x]) == (there and near >= threshold)
