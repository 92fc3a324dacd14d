"""Drawing: where the pixels land, that everything given is accepted and everything wrong is refused."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from perpixel.drawing import Style, _ink, as_picture, color_of, draw
from perpixel.errors import DataError, ShapeError


def gray(height: int = 120, width: int = 160, value: int = 128) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def drawn(image: object = None, **given: object) -> np.ndarray:
    rows = {"boxes": [[40, 30, 100, 90]], "labels": [0], "names": ["dog"], **given}
    return pixels(draw(gray() if image is None else image, **rows))  # type: ignore[arg-type]


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Contrast ratio of WCAG 2, written out."""

    def luminance(color: tuple[int, int, int]) -> float:
        parts = [(c / 255) / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_first_and_last_pixels_of_a_box_have_the_color_of_its_class() -> None:
    result = drawn(labels=[3], line_width=1)
    color = color_of(3)
    assert tuple(result[60, 40]) == color  # left side: pixel 40 is the first inside
    assert tuple(result[60, 99]) == color  # right side: pixel 99 is the last inside
    assert tuple(result[89, 70]) == color
    assert (result[60, 50:90] == 128).all()  # the inside stays


def test_the_picture_that_is_given_stays_as_it_is() -> None:
    image = gray()
    drawn(image)
    assert (image == 128).all()


def test_path_pil_array_and_tensor_give_the_same_drawing(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array]
    kinds.append(torch.from_numpy(array).permute(2, 0, 1))
    results = [drawn(kind) for kind in kinds]
    assert all((result == results[0]).all() for result in results[1:])


def test_tensors_and_lists_of_rows_give_the_same_drawing() -> None:
    rows = {"boxes": torch.tensor([[40.0, 30, 100, 90]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    assert (drawn(**rows) == drawn(labels=[2], scores=[0.5])).all()


def test_class_colors_are_distinct_and_seen_on_black_and_on_white() -> None:
    colors = [color_of(i) for i in range(100)]
    assert len(set(colors)) == 100
    steps = [np.abs(np.subtract(a, b)).sum() for a, b in pairwise(colors)]
    assert min(steps) > 120  # neighbors in a list of classes
    assert all(contrast(color, (0, 0, 0)) >= 3 for color in colors)  # WCAG's least for graphics
    on_white = drawn(gray(value=255), line_width=2, labels=[4])
    assert (on_white[60, 36:46].min(axis=0) < 40).all()  # the dark rim


def test_text_stands_out_from_every_label_background() -> None:
    assert all(contrast(color_of(i), _ink(color_of(i))) >= 4.5 for i in range(100))


def test_mask_tints_its_pixels_and_no_others() -> None:
    masks = torch.zeros(1, 120, 160, dtype=torch.bool)
    masks[0, 50:70, 60:80] = True
    result = drawn(masks=masks, mask_opacity=0.5, line_width=1)
    expected = [int(128 * 0.5 + c * 0.5) for c in color_of(0)]
    assert np.abs(result[60, 70] - expected).max() <= 1
    assert tuple(result[50, 60]) == color_of(0)  # outline
    assert (result[75, 70] == 128).all()


def test_run_length_masks_draw_like_bool_masks() -> None:
    pycocotools = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((120, 160), np.uint8)
    mask[50:70, 60:80] = 1
    rle = pycocotools.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    assert (drawn(masks=[rle]) == drawn(masks=mask[None].astype(bool))).all()


def test_an_empty_mask_draws_nothing() -> None:
    assert (drawn(masks=np.zeros((1, 120, 160), bool)) == drawn()).all()


def test_limbs_join_keypoints_that_are_seen() -> None:
    points = [[[50, 50, 2.0], [90, 50, 2.0], [70, 80, 0.0]]]
    skeletons = [SimpleNamespace(limbs=[(0, 1), (0, 2)])]
    result = drawn(keypoints=points, skeletons=skeletons, line_width=1)
    assert tuple(result[50, 70]) == color_of(0)  # middle of the limb between the two that are seen
    assert (result[65, 60] == 128).all()  # middle of the limb to the hidden one
    without = drawn(keypoints=points, skeletons=[None], line_width=1)
    assert tuple(without[50, 50]) == color_of(0)
    assert (without[50, 70] == 128).all()


def test_keypoints_below_the_threshold_are_left_out() -> None:
    points = [[[50, 60, 0.2]]]
    assert (drawn(keypoints=points, keypoint_threshold=0.3) == drawn()).all()


def test_small_objects_are_drawn_on_top_of_large_ones() -> None:
    boxes = [[40, 40, 60, 60], [0, 40, 160, 120]]
    result = drawn(boxes=boxes, labels=[0, 1], names=["a", "b"], line_width=1)
    assert tuple(result[40, 50]) == color_of(0)


def test_color_by_object_tells_objects_of_one_class_apart() -> None:
    boxes = [[10, 40, 50, 80], [100, 40, 140, 80]]
    result = drawn(boxes=boxes, labels=[0, 0], names=["a", "a"], color_by="object", line_width=1)
    assert tuple(result[60, 10]) == color_of(0)
    assert tuple(result[60, 100]) == color_of(1)


@pytest.mark.parametrize("size", [(24, 32), (64, 64), (480, 640), (1200, 1600)])
def test_labels_can_be_read_at_any_size(size: tuple[int, int]) -> None:
    height, width = size
    rows = {"boxes": [[width * 0.3, height * 0.4, width * 0.9, height * 0.9]], "names": ["umbrella"], "scores": [0.9]}
    with_label = drawn(gray(height, width), **rows)
    changed = (with_label != drawn(gray(height, width), show_labels=False, **rows)).any(2)
    lines = np.flatnonzero(changed.any(1))
    label_height = lines[-1] - lines[0] + 1
    assert with_label.shape == (height, width, 3)
    assert label_height >= min(11, height)
    assert label_height <= max(16, 0.08 * np.sqrt(height * width))  # it does not swamp the picture either


def test_labels_of_neighboring_objects_do_not_hide_each_other() -> None:
    boxes = [[100, 100, 180, 180], [104, 104, 184, 184], [108, 98, 190, 186]]
    colors = [color_of(i) for i in range(3)]
    result = drawn(gray(400, 400), boxes=boxes, labels=[0, 1, 2], names=["alpha", "beta", "gamma"], line_width=1)
    areas = [(result == color).all(2).sum() for color in colors]
    alone = [
        (drawn(gray(400, 400), boxes=[box], labels=[i], names=[name], line_width=1) == colors[i]).all(2).sum()
        for i, (box, name) in enumerate(zip(boxes, ["alpha", "beta", "gamma"], strict=True))
    ]
    assert all(together > 0.8 * single for together, single in zip(areas, alone, strict=True))


@pytest.mark.parametrize(
    "box", [[-50, -40, 300, 400], [150, 110, 150, 110], [90, 80, 20, 10], [np.nan, 0, 10, 10], [500, 500, 600, 600]]
)
def test_odd_boxes_are_drawn_or_left_out_but_never_fail(box: list[float]) -> None:
    assert drawn(boxes=[box]).shape == (120, 160, 3)


def test_no_objects_give_the_picture_back() -> None:
    assert (drawn(boxes=np.zeros((0, 4)), labels=[], names=[]) == 128).all()


def test_scale_enlarges_picture_boxes_masks_and_keypoints() -> None:
    masks = np.zeros((1, 20, 20), bool)
    masks[0, 5:10, 5:10] = True
    result = draw(
        gray(20, 20),
        boxes=[[4, 4, 12, 12]],
        labels=[0],
        names=["a"],
        masks=masks,
        keypoints=[[[15, 15, 1.0]]],
        scale=8,
        line_width=1,
        mask_opacity=1.0,
    )
    assert result.size == (160, 160)
    array = pixels(result)
    assert tuple(array[80, 32]) == color_of(0)  # left side of the box
    assert tuple(array[60, 60]) == color_of(0)  # mask
    assert tuple(array[120, 120]) == color_of(0)  # keypoint


def test_exif_rotation_is_applied() -> None:
    image = Image.fromarray(gray(20, 40))
    image.getexif()[0x0112] = 6  # turn by 90 degrees
    assert as_picture(image).size == (20, 40)


def test_gray_palette_alpha_and_16_bit_pictures_become_rgb() -> None:
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    assert pixels(as_picture(deep)).min() == 255
    wide = Image.fromarray(np.array([[-5, 0], [5, 15]], np.int32))
    assert pixels(as_picture(wide))[..., 0].tolist() == [[0, 64], [128, 255]]
    glass = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert pixels(as_picture(glass)).min() == 255
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert as_picture(Image.new(mode, (8, 6))).mode == "RGB"
    assert as_picture(np.zeros((8, 6), np.uint8)).size == (6, 8)
    assert as_picture(torch.zeros(1, 8, 6, dtype=torch.uint8)).size == (6, 8)


def test_a_file_that_is_not_a_picture_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a.jpg"))):
        as_picture(tmp_path / "a.jpg")
    with pytest.raises(DataError):
        as_picture(tmp_path / "missing.jpg")


def test_wrong_shapes_and_unknown_styles_are_named() -> None:
    with pytest.raises(ShapeError, match=r"labels: expected 1 rows, one for each box, got 2"):
        drawn(labels=[0, 1])
    with pytest.raises(ShapeError, match=r"mask 0: expected \[120, 160\].*got \[160, 120\]"):
        drawn(masks=np.zeros((1, 160, 120), bool))
    with pytest.raises(ShapeError, match=r"unknown style 'colour'.*line_width"):
        drawn(colour="red")
    with pytest.raises(ShapeError, match="color_by"):
        drawn(color_by="size")
    with pytest.raises(ShapeError, match="float32"):
        as_picture(np.zeros((4, 4, 3), np.float32))


def test_style_defaults_are_what_draw_uses() -> None:
    assert (drawn() == drawn(**{name: getattr(Style(), name) for name in Style.__dataclass_fields__})).all()
