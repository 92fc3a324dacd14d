"""The factored mask head against a loop over instances and pixels, and against grouped convolution."""

import math

import pytest
import torch
import torch.nn.functional as F

from perpixel.locations import make_grid
from perpixel.ops.dynamic import CHUNK, MaskHead


def slow_logits(head: MaskHead, theta, features, points, origin, scale) -> torch.Tensor:
    """Every instance and every cell alone: 1x1 convolutions as sums over inputs, straight from section 5.2.2."""
    result = torch.zeros(len(theta), len(points))
    for n, numbers in enumerate(theta.tolist()):
        take = iter(numbers)
        weights = [[[next(take) for _ in range(into)] for _ in range(out)] for out, into in head.layers]
        biases = [[next(take) for _ in range(out)] for out, _ in head.layers]
        for m, point in enumerate(points.tolist()):
            x = []
            if head.coordinates:
                x += [(origin[n][i].item() - point[i]) / scale[n][i].item() for i in range(2)]
            if features is not None:
                x += features.flatten(1)[:, m].tolist()
            for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                x = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
                x = [max(v, 0) for v in x] if depth < head.depth - 1 else x
            result[n, m] = x[0]
    return result


def problem(head: MaskHead, count: int, height: int = 3, width: int = 4):
    theta = torch.randn(count, head.size)
    features = torch.randn(head.channels, height, width) if head.channels else None
    points = make_grid([(height, width)], [8]).points
    origin, scale = 40 * torch.rand(count, 2), 64.0 * 2 ** torch.arange(count)[:, None].expand(-1, 2)
    return theta, features, points, origin, scale


HEADS = [
    MaskHead(8, True),
    MaskHead(16, True),
    MaskHead(1, True, width=2, depth=2),
    MaskHead(4, True, depth=1),
    MaskHead(4, True, width=4, depth=4),
    MaskHead(8, False),
    MaskHead(0, True),
]


@pytest.mark.parametrize("head", HEADS)
def test_factored_form_equals_a_loop_over_instances_and_pixels(head) -> None:
    theta, features, points, origin, scale = problem(head, 3)
    found = head.logits(theta, head.planes(features, points), origin, scale)
    torch.testing.assert_close(found, slow_logits(head, theta, features, points, origin, scale), atol=2e-4, rtol=1e-4)


def grouped_logits(theta, features, points, origin, scale) -> torch.Tensor:
    """Three layers of width 8 as the release writes them: inputs copied for every instance, one group each."""
    count, (channels, height, width) = len(theta), features.shape
    into = channels + 2
    w1, w2, w3, b1, b2, b3 = theta.split([into * 8, 64, 8, 8, 8, 1], dim=1)
    place = ((origin[:, None] - points[None]) / scale[:, None]).transpose(1, 2).reshape(count, 2, height, width)
    x = torch.cat([place, features.expand(count, -1, -1, -1)], 1).reshape(1, -1, height, width)
    x = F.conv2d(x, w1.reshape(-1, into, 1, 1), b1.flatten(), groups=count).relu()
    x = F.conv2d(x, w2.reshape(-1, 8, 1, 1), b2.flatten(), groups=count).relu()
    return F.conv2d(x, w3.reshape(-1, 8, 1, 1), b3.flatten(), groups=count).view(count, -1)


def test_factored_form_and_its_gradients_equal_grouped_convolution() -> None:
    head = MaskHead(8, True)
    theta, features, points, origin, scale = problem(head, 5, 12, 17)
    price = torch.randn(5, 12 * 17)
    results = []
    for form in ("factored", "grouped"):
        t, f = theta.clone().requires_grad_(), features.clone().requires_grad_()
        if form == "factored":
            logits = head.logits(t, head.planes(f, points), origin, scale)
        else:
            logits = grouped_logits(t, f, points, origin, scale)
        (logits * price).sum().backward()
        results.append((logits.detach(), t.grad, f.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("channels", "size"), [(8, 169), (16, 233)])
def test_number_of_parameters_is_that_of_the_text(channels, size) -> None:
    assert MaskHead(channels, True).size == size


def test_head_computes_in_float32_under_autocast() -> None:
    head = MaskHead(8, True)
    theta, features, points, origin, scale = problem(head, 2)
    planes = head.planes(features.bfloat16(), points)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.logits(theta, planes, origin, scale)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head.logits(theta, planes, origin, scale), atol=0, rtol=0)


def test_no_instances_are_no_logits_that_still_reach_the_features() -> None:
    head = MaskHead(8, True)
    theta, features, points, origin, scale = problem(head, 0)
    theta.requires_grad_()
    features.requires_grad_()
    logits = head.logits(theta, head.planes(features, points), origin, scale)
    assert logits.shape == (0, 12)
    logits.sum().backward()
    assert features.grad.abs().sum() == 0
    assert theta.grad.shape == (0, head.size)


def test_a_chunk_is_bounded_by_the_map_and_never_empty() -> None:
    head, device = MaskHead(8, True), torch.device("cpu")
    assert head.chunk(100 * 136, device) == CHUNK["cpu"] // (8 * 100 * 136)
    assert head.chunk(10**9, device) == 1
    assert math.log2(CHUNK["cuda"]) > math.log2(CHUNK["cpu"])
