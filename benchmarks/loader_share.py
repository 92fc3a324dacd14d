"""CPU seconds of making training batches and of learning from them. `speed.py` runs this in a process of its own.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/loader_share.py --data DIR

The last line printed is JSON: one entry a case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from perpixel.data.loading import open_dataset, train_batches
from perpixel.engine.optim import make_optimizer
from perpixel.recipe import Recipe, build, load_recipe
from perpixel.structures import Batch, Progress

CASES = {
    "fcos/lite0 bf16": ("fcos/lite0", ["train.precision=bf16"]),
    "fcos/lite0 fp32": ("fcos/lite0", ["train.precision=fp32"]),
    "fcos/r50_1x bf16, 480 px": ("fcos/r50_1x", ["train.precision=bf16", "data.short_side=[480]", "data.max_size=640"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="COCO folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, (source, overrides) in CASES.items():
        own = ["backbone.weights=none", "train.batch_size=4", "data.workers=0", f"data.root={arguments.data}"]
        rows.append({"name": name, **measure(load_recipe(source, [*overrides, *own]), arguments.steps)})
    print(json.dumps(rows))


def measure(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Median CPU seconds of a batch in the loader and in the step; the first two steps do not count."""
    dataset = open_dataset(recipe.data, "train")
    net: Any = build(recipe, len(dataset.categories)).train().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net, recipe.train)
    batches = train_batches(dataset, recipe.data, batch_size=recipe.train.batch_size, seed=0)
    laps = [_lap(batches, net, optimizer, recipe) for _ in range(steps + 2)][2:]
    loader, step = (statistics.median(column) for column in zip(*laps, strict=True))
    return {"batch": recipe.train.batch_size, "steps": steps, "loader": loader, "step": step}


def _lap(batches: Iterator[Batch], net: Any, optimizer: torch.optim.Optimizer, recipe: Recipe) -> tuple[float, float]:
    began = time.process_time()
    batch = next(batches)
    loaded = time.process_time()
    images = batch.images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        outputs = net(images, batch.sizes, auxiliary=True)
    torch.stack(list(net.loss(outputs, batch, Progress()).values())).sum().backward()
    nn.utils.clip_grad_norm_(net.parameters(), recipe.train.clip_norm or 1e9)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loaded - began, time.process_time() - loaded


if __name__ == "__main__":
    main()
