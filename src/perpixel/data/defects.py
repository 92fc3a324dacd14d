"""What is wrong with a COCO file: the rules that reading enforces one by one and `data.check` lists in full.

The functions look at one entry and say what is wrong with it, in words that follow "annotation 3 of image 7: ".
"""

import gc
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco.mask

from perpixel.errors import DataError
from perpixel.structures import Size

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong with a data set.

    Args:
        file: where it is wrong.
        problem: what is wrong.
        image_id: id of the picture concerned, in the file's own numbers.
        annotation_id: id of the annotation concerned.
        droppable: whether training can go on without the annotation (`data.drop_degenerate`).
    """

    file: Path
    problem: str
    image_id: Any = None
    annotation_id: Any = None
    droppable: bool = False

    def __str__(self) -> str:
        image = f"image {self.image_id}" if self.image_id is not None else ""
        annotation = f"annotation {self.annotation_id}" if self.annotation_id is not None else ""
        place = " of ".join(part for part in (annotation, image) if part)
        return f"{self.file}: {place}: {self.problem}" if place else f"{self.file}: {self.problem}"


def read_json(path: Path) -> dict[str, list[Entry]]:
    """The three lists of a COCO file.

    Raises:
        DataError: no such file, not JSON, or not of COCO's form.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects, none of them garbage: looking for it would double the time
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the annotations") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); write the annotations again") from error
    finally:
        if collecting:
            gc.enable()
    lists: dict[str, list[Entry]] = {}
    for key in ("images", "annotations", "categories"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise DataError(
                f"{path}: expected a COCO file with a list of objects {key!r}, got "
                f"{type(value if isinstance(content, dict) else content).__name__}; export the labels as COCO JSON"
            )
        lists[key] = value
    return lists


def category_problems(categories: list[Entry]) -> Iterator[str]:
    """What is wrong with the list of categories."""
    seen: set[Any] = set()
    for category in categories:
        identity, name = category.get("id"), category.get("name")
        if not isinstance(identity, int):
            yield f"category {name!r} has the id {identity!r}, expected an integer"
        elif identity in seen:
            yield f"category id {identity} occurs more than once"
        if not isinstance(name, str) or not name:
            yield f"category {identity} has the name {name!r}, expected text"
        seen.add(identity)
    if not categories:
        yield "the list of categories is empty"
    counts = {len(c["keypoints"]) for c in categories if isinstance(c.get("keypoints"), list)} - {0}
    if len(counts) > 1:
        yield f"categories have different numbers of keypoints, {sorted(counts)}; expected one number for all"


def image_problem(image: Entry, seen: set[Any]) -> str | None:
    """What is wrong with an entry of the list of images; `seen` holds the ids before it."""
    identity, name = image.get("id"), image.get("file_name")
    if not isinstance(identity, int):
        return f"image id {identity!r} is not an integer"
    if identity in seen:
        return "its id occurs more than once"
    if not isinstance(name, str) or not name:
        return f"file_name is {name!r}, expected the name of a picture"
    size = (image.get("height"), image.get("width"))
    if size != (None, None) and not all(isinstance(side, int) and side > 0 for side in size):
        return f"height and width are {size[0]!r} and {size[1]!r}, expected positive integers"
    return None


def annotation_defects(
    annotation: Entry,
    file: Path,
    sizes: Mapping[Any, Size],
    keypoint_counts: Mapping[Any, int],
    needs: frozenset[str],
) -> Iterator[Defect]:
    """What is wrong with one annotation.

    Args:
        annotation: an entry of the list of annotations.
        file: for the message.
        sizes: (H, W) in px of every picture, by image id.
        keypoint_counts: number of keypoints of every category, by category id.
        needs: which of "masks" and "keypoints" to look at, besides the box.
    """
    identity, image_id, category = annotation.get("id"), annotation.get("image_id"), annotation.get("category_id")

    def defect(problem: str, droppable: bool) -> Defect:
        return Defect(file, problem, image_id, identity if identity is not None else "without id", droppable)

    if not isinstance(identity, int):
        yield defect(f"its id is {identity!r}, expected an integer", False)
    if not _known(image_id, sizes):
        yield defect(f"image id {image_id!r} is not in the list of images", False)
        return
    if not _known(category, keypoint_counts):
        yield defect(f"category id {category!r} is not in the list of categories", False)
        return
    if problem := box_problem(annotation.get("bbox"), sizes[image_id]):
        yield defect(problem, True)
    if "masks" in needs and (problem := mask_problem(annotation.get("segmentation"), sizes[image_id])):
        yield defect(problem, True)
    if "keypoints" in needs:
        expected = keypoint_counts[category]
        if problem := keypoints_problem(annotation.get("keypoints"), expected):
            yield defect(problem, True)


def _known(key: Any, table: Mapping[Any, Any]) -> bool:
    return isinstance(key, int) and key in table


def _numbers(values: Any) -> bool:
    """Whether this is a list of finite numbers."""
    return isinstance(values, list) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def box_problem(box: Any, size: Size) -> str | None:
    """What is wrong with a box [x, y, width, height] px in a picture of `size` (H, W)."""
    if not isinstance(box, list) or len(box) != 4:
        return f"bbox is {_short(box)}, expected [x, y, width, height]"
    if not _numbers(box):
        return f"bbox {box} has a value that is not a finite number"
    x, y, width, height = box
    for name, value in (("width", width), ("height", height)):
        if value <= 0:
            return f"bbox {box} has {name} {value}"
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        return f"bbox {box} lies outside the picture of {size[1]} x {size[0]} px"
    return None


def mask_problem(segmentation: Any, size: Size) -> str | None:
    """What is wrong with polygons or run lengths; none at all is fine (mixed supervision)."""
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not _numbers(polygon):
                return f"a polygon is {_short(polygon)}, expected a list of finite numbers"
            if len(polygon) < 6 or len(polygon) % 2:
                return f"a polygon has {len(polygon)} numbers, expected an even count of 6 or more (x, y, x, y, ...)"
        return None
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        return f"segmentation is {_short(segmentation)}, expected polygons or a run-length code"
    if segmentation.get("size") != list(size):
        return f"run-length code of size {segmentation.get('size')} in a picture of size {list(size)} [height, width]"
    try:
        hotcoco.mask.decode(hotcoco.mask.frPyObjects(segmentation, *size))
    except (ValueError, TypeError, OverflowError) as error:
        return f"run-length code cannot be decoded ({error})"
    return None


def keypoints_problem(keypoints: Any, count: int) -> str | None:
    """What is wrong with keypoints [x, y, v, x, y, v, ...]; none at all is fine."""
    if keypoints is None or (keypoints == [] and count == 0):
        return None
    if not _numbers(keypoints) or len(keypoints) != 3 * count:
        got = f"{len(keypoints)} values" if isinstance(keypoints, list) else _short(keypoints)
        return f"keypoints have {got}, expected 3 finite numbers for each of {count} points"
    if any(v not in (0, 1, 2) for v in keypoints[2::3]):
        return "a keypoint has a visibility other than 0, 1 and 2"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
