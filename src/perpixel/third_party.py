"""Results in the types of other packages, which are imported only when asked for."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from perpixel.errors import ConfigError

if TYPE_CHECKING:
    from perpixel.structures import Detections


def to_supervision(detections: Detections) -> Any:
    """The rows as `supervision.Detections`: xyxy px, confidence, class_id, mask (bool [N, H, W]).

    `data["class_name"]` holds the names. Keypoints, where there are any, are the float32 array [N, K, 3] (x, y, score)
    `data["keypoints"]`, which follows every filter; `to_supervision_keypoints` gives them as `supervision.KeyPoints`.

    Raises:
        ConfigError: the package supervision is not installed.
    """
    supervision = _supervision()
    data: dict[str, Any] = {"class_name": np.array(detections.names, dtype=str)}
    if detections.keypoints is not None:
        data["keypoints"] = detections.keypoints.numpy(force=True)
    return supervision.Detections(
        xyxy=detections.boxes.numpy(force=True),
        mask=_masks(detections),
        confidence=detections.scores.numpy(force=True),
        class_id=detections.labels.numpy(force=True),
        data=data,
    )


def to_supervision_keypoints(detections: Detections) -> Any:
    """The keypoints as `supervision.KeyPoints`; row i is row i of `to_supervision`.

    Raises:
        ConfigError: the package supervision is not installed, or the detector has no keypoints.
    """
    supervision = _supervision()
    if detections.keypoints is None:
        raise ConfigError(
            "to_supervision_keypoints: these detections have no keypoints; use a recipe that predicts them"
        )
    points = detections.keypoints.numpy(force=True)
    # The argument was renamed when detections got a confidence of their own.
    known = inspect.signature(supervision.KeyPoints).parameters
    confidence = "keypoint_confidence" if "keypoint_confidence" in known else "confidence"
    return supervision.KeyPoints(
        xy=points[:, :, :2],
        class_id=detections.labels.numpy(force=True),
        data={"class_name": np.array(detections.names, dtype=str)},
        **{confidence: points[:, :, 2]},
    )


def _masks(detections: Detections) -> np.ndarray | None:
    if detections.masks is None:
        return None
    if isinstance(detections.masks, list):
        from perpixel.rle import decode

        return decode(detections.masks, detections.size).numpy()
    return detections.masks.numpy(force=True)


def _supervision() -> ModuleType:
    try:
        import supervision
    except ImportError as error:
        raise ConfigError(
            "to_supervision: needs the package supervision; pip install 'perpixel[supervision]'"
        ) from error
    return supervision
