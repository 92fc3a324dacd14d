"""COCO's average precision and recall, for boxes, masks and keypoints: a small adapter over hotcoco.

Results travel in columns: evaluation of a large set must not build a dict per box. Scores are numbers in 0..1, or None
where the truth has nothing to score (no small object, say), which COCO's own tool writes as -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import hotcoco
import hotcoco.mask
import numpy as np
from numpy.typing import NDArray

from perpixel.errors import DataError
from perpixel.structures import Categories

Kind = Literal["bbox", "segm", "keypoints"]
Score = float | None
IOUS = np.linspace(0.5, 0.95, 10)
MEAN_SIGMA = 0.067  # mean of COCO's 17; for keypoints whose data set names no sigmas


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoResults:
    """M detections in columns, in pixels of the stored pictures.

    Args:
        image_ids: int64 [M].
        category_ids: int64 [M], the data set's own.
        boxes: float64 [M, 4] x, y, width, height.
        scores: float64 [M].
        masks: M compressed run-length dicts.
        keypoints: float64 [M, K, 3] x, y, score.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    masks: list[dict[str, Any]] | None = None
    keypoints: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> CocoResults:
        ids = np.zeros(0, np.int64)
        return cls(image_ids=ids, category_ids=ids, boxes=np.zeros((0, 4)), scores=np.zeros(0))

    @classmethod
    def cat(cls, parts: Sequence[CocoResults]) -> CocoResults:
        """All rows of several parts; parts without rows may lack masks and keypoints."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return cls.empty()
        columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _COLUMNS}
        masks = None if parts[0].masks is None else [rle for p in parts for rle in p.masks or []]
        keypoints = None if parts[0].keypoints is None else np.concatenate([p.keypoints for p in parts])  # type: ignore[misc]
        return cls(**columns, masks=masks, keypoints=keypoints)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Entries of a COCO results file."""
        columns = zip(
            self.image_ids.tolist(), self.category_ids.tolist(), self.boxes.round(3).tolist(),
            self.scores.round(6).tolist(), strict=True,
        )  # fmt: skip
        entries: list[dict[str, Any]] = [
            {"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in columns
        ]
        for entry, rle in zip(entries, self.masks or [], strict=False):
            entry["segmentation"] = rle
        if self.keypoints is not None:
            for entry, points in zip(entries, self.keypoints.reshape(len(self), -1).round(3).tolist(), strict=True):
                entry["keypoints"] = points
        return entries


_COLUMNS = ("image_ids", "category_ids", "boxes", "scores")


def coco_scores(
    annotation_file: str | Path,
    results: CocoResults,
    kind: Kind,
    categories: Categories,
    *,
    image_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """COCO's summary of detections against the truth in a file.

    Args:
        annotation_file: truth in COCO's format.
        results: detections with the file's own ids.
        kind: what is compared: boxes, masks, or keypoints by their object keypoint similarity.
        categories: the classes to score; with keypoints, those of them that have a skeleton.
        image_ids: the images to score; None: all of the file.

    Returns:
        "AP" (mean over IoU 0.5 to 0.95), "AP50", "AP75", "APs", "APm", "APl" (by area of the object: below 32², to 96²,
        above, px; keypoints have no small), "AR1", "AR10", "AR100" (keypoints: "AR", "AR50", "AR75"), and "per_class":
        {name: {"AP", "AP50"}}.

    Raises:
        DataError: the file cannot be read as COCO.
    """
    truth = _read_truth(annotation_file)
    found = truth.load_res(_rows(results, kind)) if kind == "keypoints" else _load_columns(truth, results, kind)
    precision, recall, order = [], [], []
    for sigmas, chosen in _groups(categories, kind):
        judge = hotcoco.COCOeval(truth, found, kind)
        params = judge.params
        params.cat_ids = sorted(categories.ids[c] for c in chosen)
        if image_ids is not None:
            params.img_ids = sorted(int(i) for i in image_ids)
        if sigmas is not None:
            params.kpt_oks_sigmas = list(sigmas)
        judge.params = params
        judge.evaluate()
        judge.accumulate()
        table: Any = judge.eval
        precision.append(table["precision"])  # [IoUs, recalls, classes, areas, limits]
        recall.append(table["recall"])  # [IoUs, classes, areas, limits]
        order += params.cat_ids
    if not order:
        raise DataError(f"{annotation_file}: no category has keypoints, so there is nothing to score")
    summary = _Table(np.concatenate(precision, axis=2), np.concatenate(recall, axis=1))
    names = [categories.names[categories.ids.index(i)] for i in order]
    per_class = {name: {"AP": summary.ap(c=c), "AP50": summary.ap(iou=0.5, c=c)} for c, name in enumerate(names)}
    return {**_summary(summary, kind), "per_class": per_class}


def _read_truth(annotation_file: str | Path) -> hotcoco.COCO:
    try:
        return hotcoco.COCO(str(annotation_file))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{annotation_file}: cannot be read as COCO annotations ({error})") from error


def _load_columns(truth: hotcoco.COCO, results: CocoResults, kind: Kind) -> hotcoco.COCO:
    columns = [results.image_ids[:, None], results.boxes, results.scores[:, None], results.category_ids[:, None]]
    rows = np.concatenate(columns, axis=1, dtype=np.float64)  # [M, 7]
    if kind == "bbox":
        return truth.load_res(rows)
    if results.masks is None and len(results):
        raise DataError(
            "segm: the detections have no masks; evaluate kinds=('bbox',) or use a network with a mask branch"
        )
    masks: list[Any] = results.masks or []
    found = truth.load_res(rows, segmentation=masks)
    if masks:  # a mask counts as small, medium or large by its own area, not by its box's
        found.update_anns(ids=np.arange(1, len(masks) + 1), area=np.asarray(hotcoco.mask.area(masks), np.float64))
    return found


def _rows(results: CocoResults, kind: Kind) -> list[dict[str, Any]]:
    if results.keypoints is None and len(results):
        raise DataError(f"{kind}: the detections have no keypoints; use a network with a keypoint branch")
    # Without its box, an entry's area is the extent of its keypoints, as COCO's server has it.
    return [{k: v for k, v in entry.items() if k != "bbox"} for entry in replace(results, masks=None).to_dicts()]


def _groups(categories: Categories, kind: Kind) -> list[tuple[tuple[float, ...] | None, list[int]]]:
    """Class indices that one evaluation can take together: those with the same sigmas."""
    if kind != "keypoints":
        return [(None, list(range(len(categories))))]
    groups: dict[tuple[float, ...], list[int]] = {}
    for c, skeleton in enumerate(categories.skeletons or ()):
        if skeleton is not None:
            sigmas = skeleton.sigmas or (MEAN_SIGMA,) * len(skeleton.names)
            groups.setdefault(sigmas, []).append(c)
    return list(groups.items())


@dataclass(frozen=True, slots=True)
class _Table:
    """precision [IoUs, recalls, classes, areas, limits] and recall [IoUs, classes, areas, limits]; -1 for no truth."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def ap(self, *, iou: float | None = None, area: int = 0, c: int | None = None) -> Score:
        chosen = self.precision[_ious(iou), :, _classes(c), area, -1]
        return _mean(chosen)

    def ar(self, *, iou: float | None = None, limit: int = -1) -> Score:
        return _mean(self.recall[_ious(iou), :, 0, limit])


def _ious(iou: float | None) -> slice:
    if iou is None:
        return slice(None)
    index = int(np.argmin(np.abs(IOUS - iou)))
    return slice(index, index + 1)


def _classes(c: int | None) -> slice:
    return slice(None) if c is None else slice(c, c + 1)


def _mean(values: NDArray[np.float64]) -> Score:
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _summary(table: _Table, kind: Kind) -> dict[str, Score]:
    scores = {"AP": table.ap(), "AP50": table.ap(iou=0.5), "AP75": table.ap(iou=0.75)}
    if kind == "keypoints":
        sizes = {"APm": table.ap(area=1), "APl": table.ap(area=2)}
        return {**scores, **sizes, "AR": table.ar(), "AR50": table.ar(iou=0.5), "AR75": table.ar(iou=0.75)}
    sizes = {name: table.ap(area=index) for index, name in enumerate(("APs", "APm", "APl"), start=1)}
    recalls = {f"AR{count}": table.ar(limit=index) for index, count in enumerate((1, 10, 100))}
    return {**scores, **sizes, **recalls}


def report(scores: dict[str, dict[str, Any]]) -> str:
    """Scores in percent for people: a line a kind, then a line a class, best first."""
    lines = []
    for kind, values in scores.items():
        summary = "  ".join(f"{name} {percent(value)}" for name, value in values.items() if name != "per_class")
        lines += [f"{kind}: {summary}", *_class_lines(values["per_class"])]
    return "\n".join(lines)


def _class_lines(per_class: dict[str, dict[str, Score]]) -> list[str]:
    width = max(len(name) for name in per_class)
    ranked = sorted(per_class.items(), key=lambda item: -(item[1]["AP"] or 0.0))
    return [f"  {name:<{width}}  " + "  ".join(f"{k} {percent(v)}" for k, v in row.items()) for name, row in ranked]


def percent(score: Score) -> str:
    """A score in percent, or a dash where there was nothing to score."""
    return "-" if score is None else f"{100 * score:.1f}"
