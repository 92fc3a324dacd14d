import pytest
import torch

from perpixel.errors import ShapeError
from perpixel.rle import decode
from perpixel.structures import Batch, Categories, Detections, Instances, Skeleton

PERSON = Skeleton(("nose", "left", "right"), pairs=((1, 2),), limbs=((0, 1), (0, 2)), sigmas=(0.1, 0.2, 0.2))
CATEGORIES = Categories(("cat", "person"), (7, 90), (None, PERSON))


def detections(n: int = 3, **fields) -> Detections:
    low = torch.rand(n, 2) * 10
    return Detections(
        size=(20, 30),
        boxes=torch.cat([low, low + 5], 1),
        scores=torch.rand(n),
        labels=torch.arange(n) % 2,
        categories=CATEGORIES,
        **fields,
    )


def test_rows_are_selected_by_index_slice_list_and_mask_alike() -> None:
    found = detections(4, masks=torch.rand(4, 20, 30) > 0.5, keypoints=torch.rand(4, 3, 3))
    for index in ([1, 3], torch.tensor([1, 3]), slice(1, None, 2), torch.tensor([False, True, False, True])):
        part = found[index]
        assert len(part) == 2
        assert torch.equal(part.boxes, found.boxes[1::2])
        assert torch.equal(part.masks, found.masks[1::2])
        assert part.categories is CATEGORIES
    assert torch.equal(found[2].scores, found.scores[2:3])


def test_rows_with_rle_masks_are_selected_too() -> None:
    found = detections(3, masks=[{"size": [20, 30], "counts": str(i)} for i in range(3)])
    kept = found[torch.tensor([True, False, True])]
    assert [m["counts"] for m in kept.masks] == ["0", "2"]
    assert len(Detections.cat([kept, kept]).masks) == 4


def test_joined_rows_must_share_frame_and_fields() -> None:
    a = detections(2)
    assert len(Detections.cat([a, a[[0]]])) == 3
    with pytest.raises(ShapeError, match="bring all parts to one frame"):
        Detections.cat([a, detections(2, keypoints=torch.zeros(2, 3, 3))])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boxes": torch.zeros(2, 5)}, r"Instances.boxes: expected torch.float32 \[N, 4\]"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.float64)}, "got torch.float64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"Instances.labels: expected torch.int64 \[2\]"),
        ({"labels": [0, 0]}, "got list"),
        ({"masks": torch.zeros(2, 4, 4)}, "Instances.masks: expected torch.bool"),
        ({"keypoints": torch.zeros(2, 4, 2)}, r"Instances.keypoints: expected torch.float32 \[2, ·, 3\]"),
        ({"centers": torch.zeros(1, 2)}, "Instances.centers"),
        ({"has_mask": torch.zeros(2)}, "Instances.has_mask"),
        ({"ignore": torch.zeros(2)}, "Instances.ignore"),
    ],
)
def test_wrong_shapes_say_expected_and_got(fields, message) -> None:
    good = {"size": (4, 4), "boxes": torch.zeros(2, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ShapeError, match=message):
        Instances(**{**good, **fields})


def test_nothing_is_ignored_unless_said() -> None:
    assert not Instances(size=(4, 4), boxes=torch.zeros(2, 4), labels=torch.zeros(2, dtype=torch.int64)).ignore.any()
    assert len(Instances.empty((4, 4))) == 0


def test_coco_entries_carry_original_ids_and_xywh() -> None:
    found = Detections(
        size=(20, 30),
        boxes=torch.tensor([[1.0, 2, 11, 7]]),
        scores=torch.tensor([0.5]),
        labels=torch.tensor([1]),
        masks=torch.eye(20, 30, dtype=torch.bool)[None],
        keypoints=torch.tensor([[[1.0, 2, 0.5]] * 3]),
        categories=CATEGORIES,
    )
    (entry,) = found.to_coco(image_id=42)
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (42, 90, [1.0, 2.0, 10.0, 5.0])
    assert entry["keypoints"] == [1.0, 2.0, 0.5] * 3
    assert torch.equal(torch.as_tensor(decode([entry["segmentation"]])).bool(), found.masks)
    assert found.names == ["person"]


def test_without_categories_labels_stand_for_themselves() -> None:
    found = Detections(size=(2, 2), boxes=torch.zeros(1, 4), scores=torch.ones(1), labels=torch.tensor([5]))
    assert found.names == ["class 5"]
    assert found.to_coco()[0]["category_id"] == 5


def test_categories_survive_json() -> None:
    assert Categories.from_dict(CATEGORIES.to_dict()) == CATEGORIES
    assert len(Categories.anonymous(3)) == 3


@pytest.mark.parametrize(("names", "ids"), [(("a",), (1, 2)), (("a", "b"), (1, 1))])
def test_categories_need_one_id_for_each_name(names, ids) -> None:
    with pytest.raises(ShapeError, match="Categories"):
        Categories(names, ids)


def test_a_batch_checks_its_parts_and_moves_only_pictures() -> None:
    with pytest.raises(ShapeError, match=r"Batch.images: expected \[B, 3, H, W\]"):
        Batch(images=torch.zeros(1, 1, 4, 4), sizes=[(4, 4)], targets=[Instances.empty((4, 4))])
    with pytest.raises(ShapeError, match=r"Batch.sizes: 2 entries for 1 images"):
        Batch(images=torch.zeros(1, 3, 4, 4), sizes=[(4, 4)] * 2, targets=[Instances.empty((4, 4))])
    batch = Batch(images=torch.zeros(1, 3, 4, 4), sizes=[(4, 4)], targets=[Instances.empty((4, 4))])
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert moved.targets[0].boxes.device.type == "cpu"
    assert len(moved) == 1
    assert batch.targets[0].to("meta").boxes.device.type == "meta"


def test_drawing_gives_a_picture_of_the_same_size() -> None:
    picture = detections(2).draw(torch.zeros(3, 20, 30, dtype=torch.uint8))
    assert picture.size == (30, 20)
