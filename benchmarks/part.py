"""One training run of a contest, in a process of its own: train on one split for some minutes, score, write the result.

`contest.py` starts this. Everything but the network is the same for all entrants: batches, optimizer, schedule, clock
and metric are this project's engine.

    python benchmarks/part.py SPECIFICATION.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from peers import TorchvisionDetector
from perpixel.config import dump
from perpixel.data.coco import CocoDataset
from perpixel.data.loading import batches_per_epoch, eval_batches, open_dataset, train_batches
from perpixel.engine.checkpoint import load_into, load_weights_file, save_run_header
from perpixel.engine.evaluate import detect, score
from perpixel.engine.train import TrainResult, train
from perpixel.recipe import Recipe, build, load_recipe
from perpixel.structures import Batch
from timing import busy_seconds

NETWORKS: dict[str, Callable[[Recipe, int], Any]] = {
    "perpixel": lambda recipe, classes: build(recipe, classes, imagenet=True),
    "torchvision": TorchvisionDetector,
    "torchvision, our backbone": lambda recipe, classes: TorchvisionDetector(recipe, classes, shared_backbone=True),
}
INTERRUPTED = 130


def main(specification: Path, result: Path) -> int:
    """Exit status: 0 with a result, 130 if it was interrupted (the same call goes on)."""
    given = json.loads(specification.read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    recipe = load_recipe(given["recipe"], given["overrides"])
    dataset = open_dataset(recipe.data, "train", recipe.needs)
    torch.manual_seed(recipe.train.seed)
    net = NETWORKS[given["network"]](recipe, len(dataset.categories))
    began, busy, used = time.perf_counter(), busy_seconds(), sum(os.times()[:4])
    ended = _train(net, recipe, dataset, Path(given["work"]))
    if ended.reason != "finished":
        return INTERRUPTED
    elapsed, used = time.perf_counter() - began, sum(os.times()[:4]) - used  # with the loader's processes
    others = max(0.0, busy_seconds() - busy - used) / max(elapsed, 1e-9)
    load_into(net, load_weights_file(ended.run.last), ended.run.last)
    scores = _score(net, recipe, Path(given["work"]))
    found = {"scores": scores, "steps": ended.step, "seconds": round(ended.seconds, 1), "other_cpus": round(others, 2)}
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


def _train(net: Any, recipe: Recipe, dataset: CocoDataset, work: Path) -> TrainResult:
    size = recipe.train.batch_size // recipe.train.accumulate

    def make_batches(start: int) -> Iterator[Batch]:
        return train_batches(dataset, recipe.data, batch_size=size, seed=recipe.train.seed, start_step=start)

    run = save_run_header(work, dump(recipe), dataset.categories)
    steps = batches_per_epoch(dataset, recipe.train.batch_size)
    return train(net, recipe.train, make_batches=make_batches, steps_per_epoch=steps, run=run, resume=True)


def _score(net: Any, recipe: Recipe, work: Path) -> dict[str, Any]:
    """Box scores; the detections stay in the work folder."""
    dataset = open_dataset(recipe.data, "val", recipe.needs)
    found = detect(net, eval_batches(dataset, recipe.data, batch_size=1), dataset.categories)
    scores = score(
        found,
        dataset.categories,
        dataset.image_ids,
        dataset.annotation_file,
        results_file=work / "detections.json",
    )
    return scores["bbox"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
