"""Scores against pycocotools, on real annotations with disturbed truth as detections, and against counts by hand."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from perpixel.data.categories import read_categories
from perpixel.errors import DataError
from perpixel.metrics import CocoResults, coco_scores, percent, report
from perpixel.structures import Categories, Skeleton

NAMES = {
    "bbox": ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"],
    "segm": ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"],
    "keypoints": ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75"],
}


def disturbed(file: Path, *, keypoints: bool) -> CocoResults:
    """Detections made from the truth: moved, some dropped, some doubled, some of another class, random scores."""
    rng = np.random.default_rng(7)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    classes = truth.getCatIds()
    rows: list[tuple[Any, ...]] = []
    for annotation in truth.loadAnns(truth.getAnnIds()):
        if rng.random() < 0.1 or (keypoints and not annotation["num_keypoints"]):
            continue
        for _ in range(1 + (rng.random() < 0.2)):
            x, y, w, h = annotation["bbox"]
            box = np.array([x, y, w, h]) + rng.normal(0, 0.08, 4) * [w, h, w, h]
            category = int(rng.choice(classes)) if rng.random() < 0.1 else annotation["category_id"]
            mask = truth.annToRLE(annotation)
            mask = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
            points = np.array(annotation.get("keypoints", [0, 0, 0]), float).reshape(-1, 3)
            points[:, :2] += rng.normal(0, 0.05, (len(points), 2)) * [w, h]
            rows.append((annotation["image_id"], category, np.maximum(box, 1), rng.random(), mask, points))
    images, categories, boxes, scores, masks, points = zip(*rows, strict=True)
    return CocoResults(
        image_ids=np.array(images),
        category_ids=np.array(categories),
        boxes=np.array(boxes).round(3),
        scores=np.array(scores).round(6),
        masks=None if keypoints else list(masks),
        keypoints=np.array(points).round(3) if keypoints else None,
    )


def reference(file: Path, entries: list[dict[str, Any]], kind: str, image_ids: list[int] | None) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        judge = COCOeval(truth, truth.loadRes(entries), kind)
        if image_ids is not None:
            judge.params.imgIds = image_ids
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def require_equal(ours: dict[str, Any], judge: COCOeval, kind: str) -> None:
    stats = judge.stats.tolist()
    order = [0, 1, 2, 3, 4, 5, 6, 7] if kind == "keypoints" else list(range(9))
    theirs = dict(zip(NAMES[kind], (stats[i] for i in order), strict=True))
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
    precision = judge.eval["precision"][:, :, :, 0, -1]
    for c, values in enumerate(ours["per_class"].values()):
        own = precision[:, :, c][precision[:, :, c] > -1]
        assert values["AP"] == (pytest.approx(own.mean(), abs=1e-12) if own.size else None)


@pytest.mark.parametrize(("kind", "half"), [("bbox", False), ("bbox", True), ("segm", False), ("keypoints", False)])
def test_scores_equal_pycocotools_on_real_annotations(shared: Path, kind: Any, half: bool) -> None:
    name = "person_keypoints_val.json" if kind == "keypoints" else "instances_val.json"
    file = shared / "data" / "coco-mini" / "annotations" / name
    content = json.loads(file.read_text())
    results = disturbed(file, keypoints=kind == "keypoints")
    image_ids = sorted(image["id"] for image in content["images"])[:: 2 if half else 1]
    entries = results.to_dicts()
    for entry in entries if kind != "bbox" else ():
        del entry["bbox"]  # so that pycocotools takes areas from masks and keypoints
    judge = reference(file, entries, kind, image_ids if half else None)
    ours = coco_scores(
        file, results, kind, read_categories(content["categories"], file), image_ids=image_ids if half else None
    )
    assert 0.02 < ours["AP"] < 0.9
    require_equal(ours, judge, kind)


def truth_file(folder: Path, boxes: list[list[float]], **more: Any) -> Path:
    content: dict[str, Any] = {
        "images": [{"id": 5, "width": 100, "height": 100, "file_name": "a.png"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": i + 1, "image_id": 5, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        **more,
    }
    file = folder / "truth.json"
    file.write_text(json.dumps(content))
    return file


def boxes_found(boxes: list[list[float]], scores: list[float], category: int = 3) -> CocoResults:
    return CocoResults(
        image_ids=np.full(len(boxes), 5),
        category_ids=np.full(len(boxes), category),
        boxes=np.array(boxes, float).reshape(-1, 4),
        scores=np.array(scores),
    )


CATEGORIES = Categories(("cat", "dog"), (3, 9))


def test_one_of_two_objects_found_exactly_gives_half_the_recall(tmp_path: Path) -> None:
    file = truth_file(tmp_path, [[0, 0, 50, 50], [50, 50, 40, 40]])
    scores = coco_scores(file, boxes_found([[0, 0, 50, 50]], [0.9]), "bbox", CATEGORIES)
    assert scores["AR100"] == pytest.approx(0.5)
    assert scores["AP"] == pytest.approx(51 / 101)  # precision 1 at the recalls 0, 0.01, ..., 0.5
    assert scores["APs"] is None  # no object below 32² px
    assert scores["per_class"]["dog"] == {"AP": None, "AP50": None}


def test_no_detections_at_all_score_zero(tmp_path: Path) -> None:
    file = truth_file(tmp_path, [[0, 0, 50, 50]])
    for kind in ("bbox", "segm"):
        assert coco_scores(file, CocoResults.empty(), kind, CATEGORIES)["AP"] == 0.0  # type: ignore[arg-type]


def test_keypoints_of_two_skeletons_are_scored_each_with_its_own_sigmas(tmp_path: Path) -> None:
    point = {"keypoints": [10, 10, 2, 30, 30, 2], "num_keypoints": 2, "bbox": [0, 0, 50, 50], "area": 2500}
    annotations = [{"id": i, "image_id": 5, "category_id": c, "iscrowd": 0, **point} for i, c in ((1, 3), (2, 9))]
    file = truth_file(tmp_path, [], annotations=annotations)
    wide, narrow = Skeleton(("a", "b"), sigmas=(1.0, 1.0)), Skeleton(("a", "b"), sigmas=(0.01, 0.01))
    both = Categories(("cat", "dog"), (3, 9), (wide, narrow))
    found = CocoResults(
        image_ids=np.array([5, 5]),
        category_ids=np.array([3, 9]),
        boxes=np.array([[0.0, 0, 50, 50]] * 2),
        scores=np.array([0.9, 0.8]),
        keypoints=np.array([[[13.0, 10, 1], [33, 30, 1]]] * 2),  # 3 px off
    )
    per_class = coco_scores(file, found, "keypoints", both)["per_class"]
    assert per_class["cat"]["AP"] == pytest.approx(1.0)
    assert per_class["dog"]["AP"] == 0.0


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    file = truth_file(tmp_path, [[0, 0, 50, 50]])
    found = boxes_found([[0, 0, 50, 50]], [0.9])
    with pytest.raises(DataError, match="have no masks"):
        coco_scores(file, found, "segm", CATEGORIES)
    with pytest.raises(DataError, match="no keypoints"):
        coco_scores(file, found, "keypoints", CATEGORIES)
    with pytest.raises(DataError, match="no category has keypoints"):
        coco_scores(file, CocoResults.empty(), "keypoints", CATEGORIES)
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        coco_scores(tmp_path / "nowhere.json", found, "bbox", CATEGORIES)


def test_parts_join_and_become_entries_of_a_results_file() -> None:
    a = boxes_found([[1.00004, 2, 3, 4]], [0.25])
    joined = CocoResults.cat([a, CocoResults.empty(), boxes_found([[5, 6, 7, 8]], [0.5], category=9)])
    assert joined.to_dicts() == [
        {"image_id": 5, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.25},
        {"image_id": 5, "category_id": 9, "bbox": [5.0, 6.0, 7.0, 8.0], "score": 0.5},
    ]
    assert len(CocoResults.cat([])) == 0


def test_report_lists_classes_best_first() -> None:
    per_class = {"cat": {"AP": 0.25, "AP50": 0.5}, "dog": {"AP": None, "AP50": None}, "cow": {"AP": 0.5, "AP50": 1.0}}
    lines = report({"bbox": {"AP": 0.375, "APs": None, "per_class": per_class}}).splitlines()
    assert lines[0] == "bbox: AP 37.5  APs -"
    assert [line.split()[0] for line in lines[1:]] == ["cow", "cat", "dog"]
    assert percent(0.1234) == "12.3"
