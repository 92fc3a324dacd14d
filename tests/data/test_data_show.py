"""Sheets of samples: the right pictures, drawn on, in a file that opens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coco_entries import box_annotation
from PIL import Image

from perpixel.data.coco import CocoDataset
from perpixel.data.loading import DataConfig
from perpixel.data.show import contact_sheet, draw_sample, show
from perpixel.errors import DataError

Write = Callable[..., Path]


@pytest.fixture
def root(write_split: Write) -> Path:
    annotations = [box_annotation(i, i, 0, [10, 10, 40, 30], iscrowd=i % 2) for i in range(1, 4)]
    return write_split(dict.fromkeys(range(1, 6), (80, 120)), annotations)


def test_a_folder_gets_a_sheet_and_every_picture(root: Path, tmp_path: Path) -> None:
    assert show(root, tmp_path / "out", 3) == tmp_path / "out/samples.png"
    files = list((tmp_path / "out").glob("*.jpg"))
    assert len(files) == 3
    assert {f.stem for f in files} <= {"1", "2", "3", "4", "5"}
    assert all(Image.open(f).size == (120, 80) for f in files)


def test_a_single_sheet_through_the_transforms_of_training(root: Path, tmp_path: Path) -> None:
    config = DataConfig(root=str(root), short_side=(40,), flip=1.0)
    assert show(config, tmp_path / "sheet.png", 99, transformed=True) == tmp_path / "sheet.png"
    assert Image.open(tmp_path / "sheet.png").width > 3 * 480


def test_truth_is_drawn_where_it_is(root: Path) -> None:
    dataset = CocoDataset(root / "train", root / "annotations/instances_train.json", needs=frozenset({"masks"}))
    sample = dataset[1]
    before = sample.image.permute(1, 2, 0).numpy().astype(int)
    changed = np.abs(np.asarray(draw_sample(sample, dataset.categories)).astype(int) - before).sum(-1) > 0
    assert changed[12:38, 12:48].mean() > 0.9  # the mask
    assert not changed[60:, 70:].any()


def test_a_sheet_is_as_wide_as_high_and_shrinks_large_pictures() -> None:
    pictures = [Image.new("RGB", size, (200, 0, 0)) for size in ((1000, 500), (100, 50), (50, 100), (10, 10), (30, 30))]
    sheet = contact_sheet(pictures, cell=100)
    assert sheet.size == (3 * 106 + 6, (100 + 30) + 3 * 6)
    assert contact_sheet(pictures, cell=100, columns=5).size == (5 * 106 + 6, 100 + 2 * 6)
    red = (np.asarray(sheet)[..., 0] > 150).sum()
    assert red == pytest.approx(100 * 50 + 100 * 50 + 50 * 100 + 10 * 10 + 30 * 30, rel=0.01)


def test_a_place_that_cannot_be_written_is_an_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        show(root, tmp_path / "file" / "sheet.png", 1)
