"""`data check` lists every planted defect with file, picture and annotation, and nothing else."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_entries import box_annotation
from PIL import Image

from perpixel.data.check import check
from perpixel.data.loading import DataConfig
from perpixel.errors import DataError

Write = Callable[..., Path]
Change = Callable[[Path, Callable[[dict[str, Any]], object]], None]
SIZES = dict.fromkeys(range(1, 6), (20, 30))


def test_sound_data_has_no_defects(write_split: Write, shared: Path) -> None:
    root = write_split(SIZES, [box_annotation(1, 1, 0, [-1.5, 2, 8, 8])])  # a little over the frame is rounding
    assert check(root) == []
    for name in ("balloon", "nuts", "coco-mini"):
        assert check(shared / "data" / name, pictures=name != "coco-mini") == []


def test_every_defect_is_listed_with_file_picture_and_annotation(write_split: Write, change: Change) -> None:
    annotations = [
        box_annotation(1, 1, 0, [2, 2, 0, 8]),
        box_annotation(2, 1, 0, [2, 2, 5, -8]),
        box_annotation(3, 2, 0, [math.nan, 2, 5, 8], segmentation=[]),
        box_annotation(4, 2, 0, [40, 2, 5, 8]),
        box_annotation(5, 2, 0, [20, 2, 15, 8]),
        box_annotation(6, 77, 0, [2, 2, 5, 8]),
        box_annotation(7, 2, 9, [2, 2, 5, 8]),
        box_annotation(8, 3, 0, [2, 2, 5, 8], segmentation=[[1, 2, 3, 4]]),
        box_annotation(9, 3, 0, [2, 2, 5, 8], segmentation={"size": [20, 30], "counts": [9999]}),
        box_annotation(10, 3, 0, [2, 2, 0, 8], segmentation=[[1, 2]]),  # two defects in one
        box_annotation(11, 3, 0, [2, 2, 5, 8]),
        box_annotation(11, 4, 0, [2, 2, 5, 8]),
        box_annotation(12, 4, 0, [2, 2, 5, 8], keypoints=[1, 2, 3]),
    ]
    root = write_split(SIZES, annotations)
    (root / "train/4.png").unlink()
    (root / "train/5.png").write_bytes(b"not a picture")
    Image.new("RGB", (31, 20)).save(root / "train/3.png")
    file = root / "annotations/instances_train.json"
    change(file, lambda c: c["images"].append(dict(c["images"][0])))
    change(file, lambda c: c["categories"].append({"id": 0, "name": "again"}))
    lines = [str(defect) for defect in check(root)]
    even = "expected an even count of 6 or more (x, y, x, y, ...)"
    expected = [
        f"{file}: category id 0 occurs more than once",
        f"{file}: image 1: its id occurs more than once",
        f"{root / 'train/4.png'}: image 4: no such picture",
        f"{file}: annotation 1 of image 1: bbox [2, 2, 0, 8] has width 0",
        f"{file}: annotation 2 of image 1: bbox [2, 2, 5, -8] has height -8",
        f"{file}: annotation 3 of image 2: bbox [nan, 2, 5, 8] has a value that is not a finite number",
        f"{file}: annotation 4 of image 2: bbox [40, 2, 5, 8] lies outside the picture of 30 x 20 px",
        f"{file}: annotation 5 of image 2: bbox [20, 2, 15, 8] reaches 5 px over the picture of 30 x 20 px",
        f"{file}: annotation 6 of image 77: image id 77 is not in the list of images",
        f"{file}: annotation 7 of image 2: category id 9 is not in the list of categories",
        f"{file}: annotation 8 of image 3: a polygon has 4 numbers, {even}",
        f"{file}: annotation 10 of image 3: bbox [2, 2, 0, 8] has width 0",
        f"{file}: annotation 10 of image 3: a polygon has 2 numbers, {even}",
        f"{file}: annotation 12 of image 4: keypoints have 3 values, expected 3 finite numbers for each of 0 points",
        f"{file}: annotation 11: its id is used 2 times, in images [3, 4]",
        f"{root / 'train/3.png'}: image 3: has 31 x 20 px (EXIF orientation applied), its labels were made for 30 x 20",
        f"{root / 'train/5.png'}: image 5: expected a picture, got a file of another kind; remove or replace it",
    ]
    unlisted = [line for line in lines if line not in expected]
    assert len(unlisted) == 1
    assert unlisted[0].startswith(f"{file}: annotation 9 of image 3: run-length code cannot be decoded")
    assert [line for line in lines if line in expected] == expected


def test_files_of_all_splits_and_kinds_are_checked(write_split: Write, change: Change) -> None:
    write_split(SIZES, [box_annotation(1, 1, 0, [2, 2, 0, 8])])
    write_split(SIZES, [box_annotation(1, 1, 0, [2, 2, 0, 8])], kind="person_keypoints")
    root = write_split(SIZES, [], [{"id": 0, "name": "dog"}, {"id": 3, "name": "lion"}], split="val")
    (root / "test").mkdir()
    (root / "test/_annotations.coco.json").write_text("{ broken")
    lines = [str(defect) for defect in check(root)]
    assert len(lines) == 4
    assert sum("has width 0" in line for line in lines) == 2
    assert any("_annotations.coco.json: is not valid JSON" in line for line in lines)
    assert any("only here [('3', 'lion')], only there [('3', 'cat')]" in line for line in lines)


def test_labels_without_their_folder_are_a_defect(write_split: Write) -> None:
    root = write_split(SIZES, [box_annotation(1, 1, 0, [2, 2, 0, 8])])
    (root / "train").rename(root / "elsewhere")
    lines = [str(defect) for defect in check(root)]
    assert len(lines) == 2
    assert lines[0].endswith("train, is not there")
    assert lines[1].endswith("has width 0")


def test_pictures_are_only_looked_for_where_opening_is_not_wanted(write_split: Write, change: Change) -> None:
    root = write_split(SIZES, [])
    (root / "train/5.png").write_bytes(b"not a picture")
    (root / "train/4.png").unlink()
    assert [d.image_id for d in check(root, pictures=False)] == [4]
    assert [d.image_id for d in check(root)] == [4, 5]
    file = root / "annotations/instances_train.json"
    change(file, lambda c: [i.pop(k) for i in c["images"] for k in ("height", "width")])
    change(file, lambda c: c["annotations"].append(box_annotation(1, 5, 0, [99, 0, 4, 4])))
    change(file, lambda c: c["annotations"].append(box_annotation(2, 1, 0, [99, 0, 4, 4])))
    assert [(d.image_id, d.annotation_id) for d in check(root, pictures=False)] == [(4, None), (1, 2), (5, None)]


def test_explicit_paths_are_checked_and_absent_data_is_an_error(write_split: Write, tmp_path: Path) -> None:
    root = write_split(SIZES, [box_annotation(1, 1, 0, [2, 2, 0, 8])])
    file = root / "annotations/instances_train.json"
    explicit = DataConfig(val_images=str(root / "train"), val_annotations=str(file))
    assert [d.annotation_id for d in check(explicit)] == [1]
    assert [d.annotation_id for d in check(DataConfig(root=str(root)))] == [1]
    with pytest.raises(DataError, match="no such folder"):
        check(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no COCO labels"):
        check(tmp_path / "empty")
    with pytest.raises(DataError, match=r"data\.root=DIR"):
        check(DataConfig())


@pytest.mark.parametrize("box", [None, "box", [1, 2], ["a", 1, 2, 3], [1, 2, None, 4]])
def test_nonsense_in_place_of_a_box_is_one_defect(write_split: Write, box: Any) -> None:
    root = write_split(SIZES, [box_annotation(1, 1, 0, [1, 1, 1, 1]) | {"bbox": box}])
    assert len(check(root)) == 1
    assert json.loads((root / "annotations/instances_train.json").read_text())["annotations"][0]["bbox"] == box
