"""Entries of COCO files for tests."""

from typing import Any

Entry = dict[str, Any]


def box_annotation(identity: int, image: int, category: int, box: list[float], **more: Any) -> Entry:
    """An annotation whose polygon is its box."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    entry = {"id": identity, "image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": 0}
    return entry | {"segmentation": [polygon]} | more
