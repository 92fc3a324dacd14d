"""Conversion to `supervision`: by a stand-in with the same fields, and by the package itself where it is installed."""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from perpixel.errors import ConfigError
from perpixel.structures import Categories, Detections
from perpixel.third_party import to_supervision, to_supervision_keypoints


@dataclass
class _SvDetections:
    xyxy: Any
    mask: Any = None
    confidence: Any = None
    class_id: Any = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class _SvKeyPoints:
    xy: Any
    class_id: Any = None
    confidence: Any = None
    data: Any = None


@dataclass
class _RenamedKeyPoints:
    xy: Any
    class_id: Any = None
    keypoint_confidence: Any = None
    data: Any = None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("supervision")
    module.Detections, module.KeyPoints = _SvDetections, _SvKeyPoints
    monkeypatch.setitem(sys.modules, "supervision", module)
    return module


def detections(**more: Any) -> Detections:
    return Detections(
        size=(6, 8),
        boxes=torch.tensor([[0.0, 1, 2, 3], [1, 1, 5, 5]]),
        scores=torch.tensor([0.9, 0.5]),
        labels=torch.tensor([1, 0]),
        categories=Categories(("cat", "dog"), (3, 7)),
        **more,
    )


def test_rows_keep_their_order_names_and_masks(stand_in: Any) -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[1, 2, 3] = True
    result = detections(masks=masks).to_supervision()
    assert result.xyxy.tolist() == [[0, 1, 2, 3], [1, 1, 5, 5]]
    assert result.class_id.tolist() == [1, 0]
    assert result.confidence.tolist() == pytest.approx([0.9, 0.5])
    assert result.data["class_name"].tolist() == ["dog", "cat"]
    assert np.argwhere(result.mask).tolist() == [[1, 2, 3]]


def test_run_length_masks_are_decoded(stand_in: Any) -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    dense = detections(masks=masks)
    result = to_supervision(detections(masks=dense.rle()))
    assert (result.mask == masks.numpy()).all()


@pytest.mark.parametrize("renamed", [False, True])
def test_keypoints_come_as_an_array_and_as_their_own_type(stand_in: Any, renamed: bool) -> None:
    if renamed:
        stand_in.KeyPoints = _RenamedKeyPoints
    points = torch.arange(12.0).reshape(2, 2, 3)
    rows = detections(keypoints=points)
    assert (to_supervision(rows).data["keypoints"] == points.numpy()).all()
    result = to_supervision_keypoints(rows)
    assert (result.xy == points[:, :, :2].numpy()).all()
    confidence = result.keypoint_confidence if renamed else result.confidence
    assert (confidence == points[:, :, 2].numpy()).all()


def test_keypoints_of_a_box_detector_are_refused(stand_in: Any) -> None:
    with pytest.raises(ConfigError, match="no keypoints"):
        to_supervision_keypoints(detections())


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match=r"pip install 'perpixel\[supervision\]'"):
        to_supervision(detections())


def test_the_package_itself_accepts_all_of_it() -> None:
    supervision = pytest.importorskip("supervision")
    rows = detections(masks=torch.ones(2, 6, 8, dtype=torch.bool), keypoints=torch.ones(2, 3, 3))
    kept = to_supervision(rows)[np.array([False, True])]
    assert kept.data["class_name"].tolist() == ["cat"]
    assert kept.data["keypoints"].shape == (1, 3, 3)
    assert isinstance(to_supervision_keypoints(rows), supervision.KeyPoints)
    empty = to_supervision(rows[torch.zeros(2, dtype=torch.bool)])
    assert len(empty) == 0
