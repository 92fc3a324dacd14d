"""Scoring a network on a data set, alone or over several processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from perpixel import distributed
from perpixel.engine.checkpoint import write_text
from perpixel.metrics import CocoResults, Kind, coco_scores
from perpixel.structures import Batch, Categories, Detections

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def score(
    own: CocoResults,
    categories: Categories,
    image_ids: Sequence[int],
    annotation_file: str | Path,
    *,
    kinds: Sequence[Kind] = ("bbox",),
    results_file: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores by kind of what all processes found, equal in all of them.

    Args:
        own: this process's detections; no picture may be in two processes.
        categories: what the labels mean in the data set's own ids.
        image_ids: all pictures that count, of all processes.
        annotation_file: the truth.
        kinds: what to score.
        results_file: detections are written here as COCO results.
    """
    results = gather(own)
    told: list[Any] = [None]
    if distributed.rank() == 0:
        if results_file is not None:
            write_text(results_file, json.dumps(results.to_dicts()))
        told[0] = {k: coco_scores(annotation_file, results, k, categories, image_ids=image_ids) for k in kinds}
    if distributed.is_distributed():
        dist.broadcast_object_list(told, src=0)
    scores: dict[str, dict[str, Any]] = told[0]
    return scores


@torch.inference_mode()
def detect(net: Any, batches: Iterable[Batch], categories: Categories, *, precision: str = "fp32") -> CocoResults:
    """Detections of all batches, in pixels of the stored pictures.

    Args:
        net: a detector; put into evaluation mode.
        batches: this process's share of the pictures.
        categories: what the labels mean in the data set's own ids.
        precision: of the network's layers, by autocast.
    """
    device, dtype = next(net.parameters()).device, DTYPES[precision]
    net.eval()
    parts = []
    for batch in batches:
        images = batch.images.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = net(images, batch.sizes)
        found = net.decode(outputs, batch.sizes, batch.original_sizes)
        parts += [to_columns(d, i, categories) for d, i in zip(found, batch.image_ids, strict=True)]
    return CocoResults.cat(parts)


def to_columns(detections: Detections, image_id: int, categories: Categories) -> CocoResults:
    """One image's detections as columns of a results table."""
    boxes = detections.boxes.cpu().double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    ids = np.asarray(categories.ids, np.int64)[detections.labels.cpu().numpy()]
    keypoints = detections.keypoints
    return CocoResults(
        image_ids=np.full(len(detections), image_id, np.int64),
        category_ids=ids,
        boxes=boxes,
        scores=detections.scores.cpu().double().numpy(),
        masks=None if detections.masks is None else detections.rle(),
        keypoints=None if keypoints is None else keypoints.cpu().double().numpy(),
    )


def gather(own: CocoResults) -> CocoResults:
    """All processes' detections, in every process; each picture must be in one process alone."""
    if not distributed.is_distributed():
        return own
    parts: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(parts, own)
    return CocoResults.cat(parts)
