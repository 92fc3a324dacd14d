"""COCO folders become samples: every form of label, every layout, and an error that names the culprit for the rest."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_entries import box_annotation
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO

from perpixel.data.categories import mirror_pairs, mirror_partners, read_categories
from perpixel.data.coco import CocoDataset, find_in_folder
from perpixel.data.images import load_image
from perpixel.data.transforms import View
from perpixel.errors import DataError

Write = Callable[..., Path]
Change = Callable[[Path, Callable[[dict[str, Any]], object]], None]
MASKS, POSE = frozenset({"masks"}), frozenset({"keypoints"})
PERSON = [{"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]]}]


def opened(root: Path, split: str = "train", **options: Any) -> CocoDataset:
    return CocoDataset(root / split, root / "annotations" / f"instances_{split}.json", **options)


def test_ids_with_gaps_and_zero_become_contiguous_labels_in_the_order_of_ids(write_split: Write) -> None:
    annotations = [box_annotation(7, 0, 3, [1, 2, 3, 4]), box_annotation(5, 44, 0, [0, 0, 10, 10])]
    dataset = opened(write_split({44: (20, 30), 0: (20, 30)}, annotations))
    assert dataset.categories.names == ("dog", "cat")
    assert dataset.categories.ids == (0, 3)
    assert dataset.image_ids == [44, 0]
    assert dataset[0].instances.labels.tolist() == [0]
    assert dataset[1].instances.labels.tolist() == [1]
    assert dataset[1].instances.boxes.tolist() == [[1, 2, 4, 6]]
    assert dataset[1].image_id == 0


def test_pictures_without_objects_stay(write_split: Write) -> None:
    dataset = opened(write_split({1: (20, 30), 2: (10, 12)}, []), needs=MASKS)
    assert len(dataset) == 2
    sample = dataset[1]
    assert len(sample.instances) == 0
    assert sample.instances.masks is not None
    assert sample.instances.masks.shape == (0, 10, 12)
    assert sample.image.shape == (3, 10, 12)
    assert sample.original_size == (10, 12)


def test_boxes_are_cut_at_the_frame(write_split: Write) -> None:
    dataset = opened(write_split({1: (20, 30)}, [box_annotation(1, 1, 0, [-5, 15, 40, 10])]))
    assert dataset[0].instances.boxes.tolist() == [[0, 15, 30, 20]]


def test_crowds_are_ignored_or_not_there(write_split: Write) -> None:
    annotations = [box_annotation(1, 1, 0, [1, 1, 5, 5], iscrowd=1), box_annotation(2, 1, 0, [2, 2, 6, 6])]
    root = write_split({1: (20, 30)}, annotations)
    assert opened(root)[0].instances.ignore.tolist() == [True, False]
    background = opened(root, crowd="background")[0].instances
    assert background.ignore.tolist() == [False]
    assert background.boxes.tolist() == [[2, 2, 8, 8]]


def test_masks_of_every_form_equal_the_reference(shared: Path) -> None:
    """Polygons, compressed and uncompressed run lengths of real labels, decoded by pycocotools."""
    root = shared / "data/coco-mini"
    truth = COCO(str(root / "annotations/instances_val.json"))
    dataset = opened(root, "val", needs=MASKS)
    forms = set()
    for index in range(0, len(dataset), 9):
        sample = dataset[index]
        annotations = truth.loadAnns(truth.getAnnIds(dataset.image_ids[index]))
        assert sample.instances.masks is not None
        assert len(annotations) == len(sample.instances)
        for annotation, mask in zip(annotations, sample.instances.masks.numpy(), strict=True):
            assert np.array_equal(truth.annToMask(annotation).astype(bool), mask)
            forms.add(type(annotation["segmentation"]))
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        height, width = sample.original_size
        limits = np.array([width, height, width, height])
        assert sample.instances.boxes.numpy() == pytest.approx(np.clip(np.reshape(expected, (-1, 4)), 0, limits))
    assert forms == {list, dict}


def test_objects_without_a_mask_are_marked_as_such(write_split: Write) -> None:
    annotations = [
        box_annotation(1, 1, 0, [4, 4, 8, 8]),
        box_annotation(2, 1, 0, [10, 2, 6, 4], segmentation=[]),
        box_annotation(3, 1, 0, [10, 2, 6, 4]),
    ]
    del annotations[2]["segmentation"]
    truth = opened(write_split({1: (20, 30)}, annotations), needs=MASKS)[0].instances
    assert truth.has_mask is not None
    assert truth.masks is not None
    assert truth.centers is not None
    assert truth.has_mask.tolist() == [True, False, False]
    assert truth.masks.sum((1, 2)).tolist() == [64, 0, 0]
    assert truth.centers.tolist() == [[8, 8], [13, 4], [13, 4]]


def test_masks_are_sampled_in_the_frame_of_the_view(write_split: Write) -> None:
    dataset = opened(write_split({1: (20, 30)}, [box_annotation(1, 1, 0, [4, 4, 8, 8])]), needs=MASKS)
    truth = dataset.sample(0, View.whole((20, 30), (80, 120)), mask_stride=4).instances
    assert truth.size == (80, 120)
    assert truth.mask_stride == 4
    assert truth.masks is not None
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[4:12, 4:12] = True  # pixel 2 + 4 i lies in the object for 16 <= 2 + 4 i < 48
    assert torch.equal(truth.masks[0], expected)


def test_a_crop_drops_what_it_hides_and_ignores_what_it_nearly_hides(write_split: Write) -> None:
    annotations = [
        box_annotation(1, 1, 0, [0, 0, 10, 10]),  # gone
        box_annotation(2, 1, 0, [0, 0, 21, 20]),  # 1/21 of it remains
        box_annotation(3, 1, 3, [15, 5, 10, 10]),  # half of it
    ]
    dataset = opened(write_split({1: (20, 30)}, annotations))
    truth = dataset.sample(0, View((20, 30), (0, 20, 20, 10), (40, 20))).instances
    assert truth.boxes.tolist() == [[0, 0, 2, 40], [0, 10, 10, 30]]
    assert truth.ignore.tolist() == [True, False]
    assert truth.labels.tolist() == [0, 1]


def test_keypoints_travel_with_names_pairs_limbs_and_sigmas(write_split: Write) -> None:
    annotations = [
        box_annotation(1, 1, 1, [2, 2, 20, 15], keypoints=[5, 5, 2, 4, 4, 1, 9, 4, 2]),
        box_annotation(2, 1, 1, [2, 2, 20, 15]),  # keypoints not labelled
    ]
    root = write_split({1: (20, 30)}, annotations, PERSON)
    dataset = opened(root, needs=POSE)
    assert dataset.categories.skeletons is not None
    skeleton = dataset.categories.skeletons[0]
    assert skeleton is not None
    assert skeleton.names == ("nose", "left_eye", "right_eye")
    assert skeleton.pairs == ((1, 2),)
    assert skeleton.limbs == ((0, 1), (0, 2))
    assert skeleton.sigmas == pytest.approx((1 / 3,) * 3)
    truth = dataset[0].instances
    assert truth.keypoints is not None
    assert truth.keypoints.tolist() == [[[5, 5, 2], [4, 4, 1], [9, 4, 2]], [[0, 0, 0]] * 3]
    mirrored = dataset.sample(0, View((20, 30), (0, 0, 20, 30), (20, 30), True)).instances
    assert mirrored.keypoints is not None
    assert mirrored.keypoints[0].tolist() == [[25, 5, 2], [21, 4, 2], [26, 4, 1]]
    assert opened(root)[0].instances.keypoints is None


def test_coco_persons_have_the_official_sigmas_and_eight_pairs(shared: Path) -> None:
    content = json.loads((shared / "data/coco-mini/annotations/person_keypoints_val.json").read_text())
    categories = read_categories(content["categories"], Path("val.json"))
    assert categories.skeletons is not None
    skeleton = categories.skeletons[0]
    assert skeleton is not None
    official = [0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]
    assert skeleton.sigmas == pytest.approx([s / 10 for s in official])
    assert len(skeleton.pairs) == 8
    assert all(b == a + 1 for a, b in skeleton.pairs)
    assert mirror_partners(categories, 17)[0].tolist() == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def test_mirror_pairs_understand_common_spellings() -> None:
    assert mirror_pairs(("tail", "l_ear", "r_ear")) == ((1, 2),)
    assert mirror_pairs(("Right-Hand", "Left-Hand", "left foot")) == ((1, 0),)
    assert mirror_pairs(("leftover", "right")) == ()


def test_sigmas_of_a_category_win_over_the_default(write_split: Write) -> None:
    categories = [PERSON[0] | {"sigmas": [0.1, 0.2, 0.3]}]
    dataset = opened(write_split({1: (20, 30)}, [], categories))
    assert dataset.categories.skeletons is not None
    assert dataset.categories.skeletons[0] is not None
    assert dataset.categories.skeletons[0].sigmas == (0.1, 0.2, 0.3)


def test_both_layouts_and_cocos_own_names_are_found(tmp_path: Path) -> None:
    def touch(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        return path

    roboflow = touch("valid/_annotations.coco.json")
    assert find_in_folder(tmp_path, "val") == (tmp_path / "valid", roboflow)
    (tmp_path / "val2017").mkdir()
    year = touch("annotations/instances_val2017.json")
    assert find_in_folder(tmp_path, "val") == (tmp_path / "val2017", year)
    (tmp_path / "val").mkdir()
    plain = touch("annotations/instances_val.json")
    assert find_in_folder(str(tmp_path), "val") == (tmp_path / "val", plain)
    assert find_in_folder(tmp_path, "val", POSE) == (tmp_path / "val", plain)  # it may hold keypoints too
    pose = touch("annotations/person_keypoints_val.json")
    assert find_in_folder(tmp_path, "val", POSE) == (tmp_path / "val", pose)
    assert find_in_folder(tmp_path, "val") == (tmp_path / "val", plain)
    test = touch("test/_annotations.coco.json")
    assert find_in_folder(tmp_path, "test") == (tmp_path / "test", test)
    with pytest.raises(DataError, match=r"no COCO labels for the split 'train'.*annotations/instances_train.json"):
        find_in_folder(tmp_path, "train")
    with pytest.raises(DataError, match="no such folder"):
        find_in_folder(tmp_path / "absent", "train")


DEGENERATE = [
    ({"bbox": [12, 14, 0, 3]}, r"annotation 5 of image 1: bbox \[12, 14, 0, 3\] has width 0; fix it or set data\.drop"),
    ({"bbox": [2, 4, 3, -1]}, r"has height -1"),
    ({"bbox": [math.nan, 4, 3, 1]}, "not a finite number"),
    ({"bbox": [2, 4, math.inf, 1]}, "not a finite number"),
    ({"bbox": [2, 4, 3]}, r"expected \[x, y, width, height\]"),
    ({"bbox": None}, r"bbox is None"),
    ({"bbox": ["1", 4, 3, 2]}, "not a finite number"),
    ({"bbox": [30, 4, 3, 1]}, r"lies outside the picture of 30 x 20 px"),
    ({"segmentation": [[1, 1, 5, 5]]}, "a polygon has 4 numbers"),
    ({"segmentation": [[1, 1, 5, 5, 6, 6, 7]]}, "a polygon has 7 numbers"),
    ({"segmentation": [[1, 1, 5, 5, 6, math.nan]]}, "finite numbers"),
    ({"segmentation": [None]}, "a polygon is None"),
    ({"segmentation": "polygon"}, "expected polygons or a run-length code"),
    ({"segmentation": {"size": [20, 30]}}, "expected polygons or a run-length code"),
    ({"segmentation": {"size": [30, 20], "counts": [600]}}, r"size \[30, 20\] in a picture of size \[20, 30\]"),
    ({"segmentation": {"size": [20, 30], "counts": [5, 9999]}}, "cannot be decoded"),
    ({"segmentation": {"size": [20, 30], "counts": "!!"}}, "cannot be decoded"),
    ({"segmentation": {"size": [20, 30], "counts": [5, -3]}}, "cannot be decoded"),
    ({"segmentation": {"size": [20, 30], "counts": None}}, "cannot be decoded"),
    ({"keypoints": [1, 2, 2]}, "keypoints have 3 values, expected 3 finite numbers for each of 3 points"),
    ({"keypoints": [1, 2, 2] * 2 + [1, 2, 5]}, "visibility other than 0, 1 and 2"),
    ({"keypoints": 5}, "keypoints have 5, expected"),
]


@pytest.mark.parametrize(("wrong", "message"), DEGENERATE)
def test_degenerate_annotations_stop_reading_or_are_dropped(write_split: Write, wrong: dict, message: str) -> None:
    good = box_annotation(4, 1, 1, [2, 2, 8, 8], keypoints=[1, 2, 2] * 3)
    root = write_split({1: (20, 30)}, [good, good | {"id": 5} | wrong], PERSON)
    with pytest.raises(DataError, match=message) as caught:
        opened(root, needs=MASKS | POSE)
    assert str(caught.value).startswith(str(root / "annotations/instances_train.json") + ": annotation 5 of image 1: ")
    kept = opened(root, needs=MASKS | POSE, drop_degenerate=True)[0].instances
    assert kept.boxes.tolist() == [[2, 2, 10, 10]]


def test_masks_and_keypoints_are_not_judged_where_nobody_needs_them(write_split: Write) -> None:
    wrong = box_annotation(1, 1, 0, [2, 2, 8, 8], segmentation=[[1, 1]], keypoints="none")
    assert len(opened(write_split({1: (20, 30)}, [wrong]))[0].instances) == 1


BROKEN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 of image 99: image id 99 is not in the list"),
    (lambda c: c["annotations"][0].update(image_id=[1]), r"image id \[1\] is not in the list"),
    (lambda c: c["annotations"][0].update(category_id=2), "category id 2 is not in the list of categories"),
    (lambda c: c["annotations"][0].pop("id"), "annotation without id of image 1: its id is None"),
    (lambda c: c["annotations"].append(c["annotations"][0]), "annotation 1: its id occurs more than once"),
    (lambda c: c["images"].append(c["images"][0]), "image 1: its id occurs more than once"),
    (lambda c: c["images"][0].update(id="one"), "image id 'one' is not an integer"),
    (lambda c: c["images"][0].update(file_name=None), "file_name is None"),
    (lambda c: c["images"][0].update(height=-3), "height and width are -3 and 30"),
    (lambda c: c["images"].clear(), "the list of images is empty"),
    (lambda c: c["categories"].append(c["categories"][0]), "category id 3 occurs more than once"),
    (lambda c: c["categories"][0].update(id="3"), "has the id '3', expected an integer"),
    (lambda c: c["categories"][0].update(name=""), "has the name '', expected text"),
    (lambda c: c["categories"].clear(), "the list of categories is empty"),
    (
        lambda c: [c["categories"][i].update(keypoints=["a"] * (i + 1)) for i in (0, 1)],
        "different numbers of keypoints",
    ),
    (lambda c: c.pop("images"), "expected a COCO file with a list of objects 'images', got NoneType"),
    (lambda c: c.update(annotations=[1]), "expected a COCO file with a list of objects 'annotations'"),
    (
        lambda c: c["images"][0].update(file_name="gone.png"),
        "gone.png: no such picture, but instances_train.json lists",
    ),
]


@pytest.mark.parametrize(("how", "message"), BROKEN)
def test_a_broken_file_is_never_read_in_part(write_split: Write, change: Change, how: Any, message: str) -> None:
    root = write_split({1: (20, 30)}, [box_annotation(1, 1, 0, [2, 2, 8, 8])])
    change(root / "annotations/instances_train.json", how)
    for drop in (False, True):
        with pytest.raises(DataError, match=message):
            opened(root, drop_degenerate=drop)


def test_files_that_are_not_json_say_so(tmp_path: Path) -> None:
    for name, content in (("broken.json", b'{"images": ['), ("binary.json", b"\xff\xfe\x00"), ("list.json", b"[]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: (is not valid JSON|expected a COCO file)"):
            CocoDataset(tmp_path, tmp_path / name)
    with pytest.raises(DataError, match=r"absent.json: cannot be read \(No such file"):
        CocoDataset(tmp_path, tmp_path / "absent.json")


def test_a_file_without_keypoints_is_refused_for_pose(write_split: Write) -> None:
    with pytest.raises(DataError, match="no category lists keypoints"):
        opened(write_split({1: (20, 30)}, []), needs=POSE)


def test_a_picture_of_another_size_than_its_labels_is_refused(write_split: Write, change: Change) -> None:
    root = write_split({1: (20, 30)}, [])
    Image.new("RGB", (20, 30)).save(root / "train/1.png")
    with pytest.raises(DataError, match=r"1.png: expected 30 x 20 px as .* says for image 1, got 20 x 30"):
        opened(root)[0]


def test_sizes_that_the_file_leaves_out_come_from_the_pictures(write_split: Write, change: Change) -> None:
    root = write_split({1: (20, 30), 2: (10, 40)}, [])
    change(
        root / "annotations/instances_train.json",
        lambda c: [i.pop(k) for i in c["images"] for k in ("height", "width")],
    )
    assert opened(root).sizes.tolist() == [[20, 30], [10, 40]]


def test_pictures_in_subfolders_and_with_exif_orientation(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "a/b/c.jpg", exif=exif)
    content = {
        "images": [{"id": 1, "file_name": "a/b/c.jpg", "height": 40, "width": 20}],  # as a viewer shows it
        "annotations": [box_annotation(1, 1, 1, [5, 30, 10, 10])],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    sample = CocoDataset(tmp_path, tmp_path / "labels.json")[0]
    assert sample.image.shape == (3, 40, 20)
    assert sample.instances.boxes.tolist() == [[5, 30, 15, 40]]


def test_large_photographs_are_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    small.resize((1203, 901), Image.Resampling.BICUBIC).save(tmp_path / "big.jpg", quality=95)
    content = {
        "images": [{"id": 1, "file_name": "big.jpg", "height": 901, "width": 1203}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    dataset = CocoDataset(tmp_path, tmp_path / "labels.json")
    view = View.whole((901, 1203), (150, 200))
    assert load_image(tmp_path / "big.jpg", view.source_size_needed).shape == (3, 226, 301)
    reduced, exact = dataset.sample(0, view, reduced=True).image, dataset.sample(0, view).image
    assert (reduced.int() - exact.int()).abs().float().mean() < 2


def test_uncompressed_run_lengths_of_a_crowd_are_read(write_split: Write) -> None:
    counts = [20 * 4 + 2, 5, 15, 5, 600 - 107]  # two columns of five pixels
    code = {"size": [20, 30], "counts": counts}
    root = write_split({1: (20, 30)}, [box_annotation(1, 1, 0, [4, 2, 2, 5], iscrowd=1, segmentation=code)])
    truth = opened(root, needs=MASKS)[0].instances
    assert truth.masks is not None
    expected = reference.decode(reference.frPyObjects(code, 20, 30)).astype(bool)
    assert np.array_equal(truth.masks[0].numpy(), expected)
    assert expected[2:7, 4:6].all()
    assert expected.sum() == 10
