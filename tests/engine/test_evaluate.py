"""From batches to scores, alone and with other processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_detector import TinyDetector, batch_of

from perpixel.engine import evaluate as module
from perpixel.engine.evaluate import detect, gather, score, to_columns
from perpixel.metrics import CocoResults
from perpixel.structures import Categories, Detections

CATEGORIES = Categories(("cat", "dog"), (3, 9))


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Every picture of two batches has a dog where TinyDetector always sees one."""
    ids = [i for step in (0, 1) for i in batch_of(step).image_ids]
    content = {
        "images": [{"id": i, "width": 16, "height": 16, "file_name": f"{i}.png"} for i in ids],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": 9, "bbox": [0, 0, 8, 8], "area": 64, "iscrowd": 0}
            for n, i in enumerate(ids)
        ],
    }
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    return file


def test_what_is_always_found_scores_one_and_is_written_with_original_ids(truth: Path, tmp_path: Path) -> None:
    batches = [batch_of(0), batch_of(1)]
    net = TinyDetector().train()
    found = detect(net, batches, CATEGORIES, precision="bf16")
    assert not net.training
    ids = [i for b in batches for i in b.image_ids]
    scores = score(found, CATEGORIES, ids, truth, results_file=tmp_path / "results.json")
    assert scores["bbox"]["AP"] == pytest.approx(1.0)
    assert scores["bbox"]["per_class"] == {"cat": {"AP": None, "AP50": None}, "dog": {"AP": 1.0, "AP50": 1.0}}
    entries = json.loads((tmp_path / "results.json").read_text())
    assert entries[5] == {"image_id": 101, "category_id": 9, "bbox": [0, 0, 8, 8], "score": 0.5}
    assert len(entries) == 8


def test_half_the_pictures_undetected_is_half_the_recall(truth: Path) -> None:
    found = detect(TinyDetector(), [batch_of(0)], CATEGORIES)
    ids = [i for step in (0, 1) for i in batch_of(step).image_ids]
    assert score(found, CATEGORIES, ids, truth)["bbox"]["AR100"] == 0.5
    assert score(found, CATEGORIES, batch_of(0).image_ids, truth)["bbox"]["AR100"] == 1.0


def test_columns_carry_masks_keypoints_and_widths() -> None:
    detections = Detections(
        size=(4, 6),
        boxes=torch.tensor([[1.0, 2.0, 4.0, 3.5]]),
        scores=torch.tensor([0.75]),
        labels=torch.tensor([0]),
        masks=torch.ones(1, 4, 6, dtype=torch.bool),
        keypoints=torch.ones(1, 2, 3),
    )
    columns = to_columns(detections, 12, CATEGORIES)
    assert columns.boxes.tolist() == [[1.0, 2.0, 3.0, 1.5]]
    assert (columns.image_ids.tolist(), columns.category_ids.tolist()) == ([12], [3])
    assert columns.masks == [{"size": [4, 6], "counts": "0h0"}]
    assert columns.keypoints is not None
    assert columns.keypoints.shape == (1, 2, 3)
    assert detections.boxes.tolist() == [[1.0, 2.0, 4.0, 3.5]]  # not changed in place


def test_parts_of_all_processes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    own = to_columns(TinyDetector().decode(None, [(16, 16)])[0], 1, CATEGORIES)  # type: ignore[arg-type]
    other = to_columns(TinyDetector().decode(None, [(16, 16)])[0], 2, CATEGORIES)  # type: ignore[arg-type]

    def all_gather_object(parts: list[CocoResults], mine: CocoResults) -> None:
        parts[:] = [mine, other]

    monkeypatch.setattr(module.distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(module.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "all_gather_object", all_gather_object)
    assert gather(own).image_ids.tolist() == [1, 2]
    assert np.array_equal(gather(own).scores, [0.5, 0.5])
