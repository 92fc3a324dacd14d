"""The mask head, masks to pixels, and the memory of mask losses, against the forms of the authors' release.

    python benchmarks/mask_head.py

The release's forms are written out here: the head as grouped convolution over copies of the features, masks resized at
full size twice, and logits, upsampling and dice loss of all positives at once. Inputs are random but for the masks
that are brought to pixels, which are ellipses as large as objects are.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from perpixel.assign import Assignment
from perpixel.locations import make_grid
from perpixel.methods.condinst import DiceCriterion, MaskBranch, MaskConfig
from perpixel.methods.detector import Targets
from perpixel.ops.dynamic import MaskHead
from perpixel.ops.losses import dice_loss
from perpixel.ops.masks import CELL, aligned_upsample, masks_in_frame, rles_in_frame
from perpixel.rle import encode
from perpixel.structures import Batch, Instances, Outputs, Progress
from provenance import RESULTS, table, write_section
from timing import take_turns

SIZE = (800, 1067)  # of the picture, px
MAP = (100, 136)  # cells of its padded stride-8 map
COUNTS = (100, 200)  # instances
POSITIVES = 500
OBJECTS = 20  # that the positives belong to
HEAD = MaskHead(channels=8, coordinates=True)
POINTS = make_grid([MAP], [CELL]).points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-other-cpus", type=float, default=0.15, help="busier rounds are repeated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for part in arguments.parts:
        title, body = PARTS[part](arguments)
        print(f"\n## {title}\n\n{body}", flush=True)
        write_section(title, body, arguments.out)


def grouped_logits(theta: Tensor, features: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    """The release's form of a head of three layers of width 8: one group of channels an instance; [N, h, w]."""
    count, channels = len(theta), len(features) + 2
    w1, w2, w3, b1, b2, b3 = theta.split([channels * 8, 64, 8, 8, 8, 1], dim=1)
    place = ((origin[:, None] - POINTS) / scale[:, None]).transpose(1, 2).reshape(count, 2, *MAP)
    x = torch.cat([place, features.expand(count, -1, -1, -1)], 1).reshape(1, -1, *MAP)
    x = F.conv2d(x, w1.reshape(-1, channels, 1, 1), b1.flatten(), groups=count).relu()
    x = F.conv2d(x, w2.reshape(-1, 8, 1, 1), b2.flatten(), groups=count).relu()
    return F.conv2d(x, w3.reshape(-1, 8, 1, 1), b3.flatten(), groups=count)[0]


def factored_logits(theta: Tensor, features: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    return HEAD.many_logits(theta, HEAD.planes(features, POINTS), origin, scale).view(-1, *MAP)


def instances(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """θ, features, origin and scale of random instances."""
    place = torch.rand(count, 2) * torch.tensor([SIZE[1], SIZE[0]])
    return 0.3 * torch.randn(count, HEAD.size), torch.randn(8, *MAP), place, torch.full((count, 2), 64.0)


def head(arguments: argparse.Namespace) -> tuple[str, str]:
    """Logits of many instances on one map."""
    work: dict[str, Callable[[], Any]] = {}
    for count in COUNTS:
        inputs = instances(count)
        torch.testing.assert_close(factored_logits(*inputs), grouped_logits(*inputs), atol=1e-3, rtol=1e-3)
        work[f"grouped, {count}"] = lambda inputs=inputs: grouped_logits(*inputs)
        work[f"factored, {count}"] = lambda inputs=inputs: factored_logits(*inputs)
    with torch.inference_mode():
        times = take_turns(work, rounds=arguments.rounds, max_other_cpus=arguments.max_other_cpus)
    rows = [
        [f"{count} instances"]
        + [f"{1e3 * times.median(f'{form}, {count}'):.1f} ms" for form in ("grouped", "factored")]
        + [f"{times.ratio(f'factored, {count}', f'grouped, {count}'):.3f}"]
        for count in COUNTS
    ]
    body = table([f"{MAP[0]} x {MAP[1]} cells, fp32", "grouped", "factored", "ratio"], rows)
    return "Mask head: factored against grouped convolution", body


def two_resizes(logits: Tensor) -> Tensor:
    """The release's way to pixels: everything at full size."""
    whole = aligned_upsample(aligned_upsample(logits, 2).sigmoid(), CELL // 2)[:, None, : SIZE[0], : SIZE[1]]
    return F.interpolate(whole, size=SIZE, mode="bilinear", align_corners=False)[:, 0] > 0.5


def pixels(arguments: argparse.Namespace) -> tuple[str, str]:
    """100 masks at full size."""
    half = 20 + 130 * torch.rand(100, 2) ** 2  # px
    center = torch.rand(100, 2) * torch.tensor([SIZE[1], SIZE[0]])
    distance = ((POINTS - center[:, None]) / half[:, None]).norm(dim=2)
    logits = (8 * (1 - distance)).view(-1, *MAP)
    assert int((masks_in_frame(logits, 2, SIZE, SIZE) != two_resizes(logits)).sum()) <= 17
    work = {
        "two resizes of the whole": lambda: two_resizes(logits),
        "one resize of the window": lambda: masks_in_frame(logits, 2, SIZE, SIZE),
        "two resizes, then run lengths": lambda: encode(two_resizes(logits)),
        "straight to run lengths": lambda: rles_in_frame(logits, 2, SIZE, SIZE),
    }
    with torch.inference_mode():
        times = take_turns(work, rounds=arguments.rounds, max_other_cpus=arguments.max_other_cpus)
    rows = [[name, f"{1e3 * times.median(name):.0f} ms"] for name in work]
    return "Masks to pixels", table([f"100 masks at {SIZE[0]} x {SIZE[1]} px", "time"], rows)


def memory(arguments: argparse.Namespace) -> tuple[str, str]:
    """Peak of what a forward and a backward pass of head and loss allocate."""
    theta, features, origin, scale = instances(POSITIVES)
    truth = torch.rand(OBJECTS, 2 * MAP[0], 2 * MAP[1]) > 0.9
    objects = torch.arange(POSITIVES) * OBJECTS // POSITIVES

    def at_once() -> float:
        t, f = theta.clone().requires_grad_(), features.clone().requires_grad_()
        logits = aligned_upsample(grouped_logits(t, f, origin, scale), 2)
        loss = dice_loss(logits.sigmoid(), truth[objects]).mean()
        loss.backward()
        return loss.item()

    def in_chunks() -> float:
        outputs, targets, batch = _as_training(theta, features, origin, truth, objects)
        branch = MaskBranch(8, (8,), 1, MaskConfig(branch_channels=8, levels=1), DiceCriterion())
        loss = branch.loss(outputs, targets, batch, Progress(), {})["mask"]
        loss.backward()
        return loss.item()

    losses = at_once(), in_chunks()
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    peaks = [peak_bytes(work) / 2**20 for work in (at_once, in_chunks)]
    rows = [[f"{POSITIVES} positives", *(f"{p:.0f} MiB" for p in peaks), f"{peaks[1] / peaks[0]:.3f}"]]
    body = table([f"{CELL * MAP[0]} x {CELL * MAP[1]} px, fp32", "grouped, at once", "ours", "ratio"], rows)
    return "Memory of mask head and loss in training", body


def _as_training(
    theta: Tensor, features: Tensor, origin: Tensor, truth: Tensor, objects: Tensor
) -> tuple[Outputs, Targets, Batch]:
    """The same instances as locations of a one-level network that are positive for their objects."""
    outputs = Outputs(
        logits=torch.zeros(1, POSITIVES, 1),
        centerness=None,
        ltrb=None,
        points=origin,
        level=torch.zeros(POSITIVES, dtype=torch.int64),
        controller=theta[None].clone().requires_grad_(),
        mask_features=features[None].clone().requires_grad_(),
        shapes=(MAP,),
    )
    image, location = torch.zeros(POSITIVES, dtype=torch.int64), torch.arange(POSITIVES)
    rows = Assignment(torch.zeros(1, POSITIVES, 1), image[None], image, location, image, objects)
    count = torch.tensor(float(POSITIVES))
    targets = Targets(rows, rows, image, torch.zeros(POSITIVES, 4), torch.zeros(POSITIVES), count)
    size = (CELL * MAP[0], CELL * MAP[1])
    labels = torch.zeros(len(truth), dtype=torch.int64)
    owner = Instances(size=size, boxes=torch.zeros(len(truth), 4), labels=labels, masks=truth, mask_stride=4)
    return outputs, targets, Batch(images=torch.zeros(1, 3, *size), sizes=[size], targets=[owner])


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest sum of what is allocated and not yet freed, as the profiler counts it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


PARTS: dict[str, Callable[[argparse.Namespace], tuple[str, str]]] = {"head": head, "pixels": pixels, "memory": memory}


if __name__ == "__main__":
    main()
