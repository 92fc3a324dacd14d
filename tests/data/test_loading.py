"""Batches are a pure function of seed and step, whatever the number of processes; nothing is lost or repeated."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_entries import box_annotation

from perpixel.config import parse
from perpixel.data.coco import CocoDataset
from perpixel.data.images import load_image, resize_for_test
from perpixel.data.loading import (
    DataConfig,
    TrainSteps,
    batches_per_epoch,
    collate,
    eval_batches,
    find_split,
    open_dataset,
    train_batches,
)
from perpixel.errors import ConfigError, DataError
from perpixel.structures import Batch

Write = Callable[..., Path]
SIZES = {i: ((24, 40) if i % 3 else (40, 24)) for i in range(10)}
AUGMENTED: dict[str, Any] = {
    "short_side": (32, 48),
    "max_size": 96,
    "crop": 0.7,
    "color_jitter": 0.3,
    "scale_jitter": (0.7, 1.4),
    "workers": 0,
}


@pytest.fixture
def root(write_split: Write) -> Path:
    annotations = [box_annotation(i, i, 3 * (i % 2), [3 + i, 4, 10, 12]) for i in range(9)]  # the last one is empty
    write_split(SIZES, annotations)
    return write_split({100: (24, 40), 101: (40, 24), 102: (24, 40)}, [], split="val")


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(root=str(root), **(AUGMENTED | options))


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(batches, count))


def same(a: Batch, b: Batch) -> bool:
    truths = zip(a.targets, b.targets, strict=True)
    return (
        torch.equal(a.images, b.images)
        and a.image_ids == b.image_ids
        and a.sizes == b.sizes
        and all(torch.equal(x.boxes, y.boxes) and torch.equal(x.ignore, y.ignore) for x, y in truths)
    )


def test_a_run_continued_at_any_step_sees_the_same_batches(root: Path) -> None:
    data = open_dataset(config(root), "train", frozenset({"masks"}))
    whole = take(train_batches(data, config(root), batch_size=3, seed=5), 9)
    for start in (1, 4, 7):
        resumed = take(train_batches(data, config(root), batch_size=3, seed=5, start_step=start), 9 - start)
        assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    other = take(train_batches(data, config(root), batch_size=3, seed=6), 9)
    assert not any(same(a, b) for a, b in zip(whole, other, strict=True))


def test_the_number_of_workers_changes_nothing(root: Path) -> None:
    data = open_dataset(config(root), "train", frozenset({"masks"}))
    alone = take(train_batches(data, config(root), batch_size=2, seed=5, start_step=2), 4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    helped = take(train_batches(data, config(root, workers=2), batch_size=2, seed=5, start_step=2), 4)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)  # the run's own random numbers are left alone


@pytest.mark.parametrize("grouping", [True, False])
def test_processes_share_the_batch_of_one(root: Path, grouping: bool) -> None:
    data = open_dataset(config(root), "train")
    options = config(root, aspect_grouping=grouping)
    whole = take(train_batches(data, options, batch_size=4, seed=1), 6)
    halves = [take(train_batches(data, options, batch_size=2, seed=1, rank=r, world_size=2), 6) for r in (0, 1)]
    for step, batch in enumerate(whole):
        parts = [half[step] for half in halves]
        assert batch.image_ids == parts[0].image_ids + parts[1].image_ids
        assert batch.sizes == parts[0].sizes + parts[1].sizes
        assert torch.equal(batch.images, torch.cat([p.images for p in parts]))  # padded alike, too


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 16])
def test_every_picture_comes_equally_often(root: Path, batch_size: int) -> None:
    data = open_dataset(config(root), "train")
    steps = TrainSteps(data, config(root), batch_size, seed=0)
    rounds = 10 * batches_per_epoch(data, batch_size)
    seen = Counter(index for step in range(rounds) for index in steps._indices(step).tolist())
    expected = rounds * batch_size / len(data)
    assert set(seen) == set(range(len(data)))
    assert all(expected - 1 <= n <= expected + 1 for n in seen.values())
    first = {index for step in range(batches_per_epoch(data, batch_size)) for index in steps._indices(step).tolist()}
    assert first == set(range(len(data)))  # an epoch misses nothing


def test_an_epoch_is_rounded_up_to_whole_batches(root: Path) -> None:
    data = open_dataset(config(root), "train")
    assert [batches_per_epoch(data, size) for size in (1, 3, 5, 10, 16)] == [10, 4, 2, 1, 1]


def test_batches_hold_pictures_of_one_orientation(write_split: Write) -> None:
    root = write_split({i: ((24, 40) if i % 2 else (40, 24)) for i in range(40)}, [])
    data = open_dataset(config(root), "train")

    def mixed(grouping: bool) -> int:
        steps = TrainSteps(data, config(root, aspect_grouping=grouping), 4, seed=0)
        upright = [data.sizes[steps._indices(s), 0] > data.sizes[steps._indices(s), 1] for s in range(10)]
        return sum(bool(u.any() and not u.all()) for u in upright)

    assert mixed(True) <= 1
    assert mixed(False) > 4


def test_targets_have_what_was_asked_for_in_the_frame_of_the_batch(root: Path) -> None:
    plain = config(root, crop=1.0, color_jitter=0.0, scale_jitter=None, flip=0.0, short_side=(48,), mask_stride=4)
    data = open_dataset(plain, "train", frozenset({"masks"}))
    batch = next(train_batches(data, plain, batch_size=10, seed=0, needs=frozenset({"masks"})))
    assert batch.images.shape == (10, 3, 96, 96)  # 80 px, up to a multiple of 32
    assert batch.images.dtype == torch.uint8
    for image_id, size, original, truth in zip(
        batch.image_ids, batch.sizes, batch.original_sizes, batch.targets, strict=True
    ):
        assert original == SIZES[image_id]
        assert size == truth.size == (original[0] * 2, original[1] * 2)
        assert truth.masks is not None
        assert truth.masks.shape[1:] == (size[0] // 4, size[1] // 4)
        if image_id < 9:
            width = min(3 + image_id + 10, original[1]) * 2
            assert truth.boxes.tolist() == [[6 + 2 * image_id, 8, width, 32]]
    with pytest.raises(DataError, match="opened without keypoints; pass needs to open_dataset"):
        next(train_batches(data, plain, batch_size=2, seed=0, needs=frozenset({"keypoints"})))


def test_a_mirror_follows_the_probability(root: Path) -> None:
    data = open_dataset(config(root), "train")
    plain = {"crop": 1.0, "color_jitter": 0.0, "scale_jitter": None, "short_side": (24,), "aspect_grouping": False}
    for flip, change in ((0.0, lambda x: x), (1.0, lambda x: x.flip(2))):
        batch = next(train_batches(data, config(root, flip=flip, **plain), batch_size=10, seed=0))
        for row, image_id, (height, width) in zip(batch.images, batch.image_ids, batch.sizes, strict=True):
            stored = load_image(root / "train" / f"{image_id}.png")
            assert torch.equal(row[:, :height, :width], change(stored))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_every_picture_once_and_whole(root: Path, workers: int) -> None:
    options = config(root, test_short_side=36, test_max_size=50, workers=workers)
    data = open_dataset(options, "train")
    batches = eval_batches(data, options, batch_size=4)
    assert len(batches) == 3
    seen = []
    for batch in batches:
        for row, image_id, (height, width) in zip(batch.images, batch.image_ids, batch.sizes, strict=True):
            expected = resize_for_test(load_image(root / "train" / f"{image_id}.png"), 36, 50)
            assert torch.equal(row[:, :height, :width], expected)
            seen.append(image_id)
        assert batch.original_sizes == [SIZES[i] for i in batch.image_ids]
    assert sorted(seen) == list(SIZES)
    parts = [eval_batches(data, options, batch_size=4, rank=r, world_size=2) for r in (0, 1)]
    assert sorted(i for part in parts for batch in part for i in batch.image_ids) == list(SIZES)
    assert len(parts[0]) + len(parts[1]) == 3


def test_evaluation_keeps_the_order_of_the_file_one_by_one(root: Path) -> None:
    data = open_dataset(config(root), "train")
    assert [b.image_ids[0] for b in eval_batches(data, config(root), batch_size=1)] == list(SIZES)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_clear_error_in_any_process(root: Path, workers: int) -> None:
    data = open_dataset(config(root), "train")
    (root / "train/4.png").write_bytes(b"no picture")
    batches = train_batches(data, config(root, workers=workers), batch_size=5, seed=0)
    with pytest.raises(DataError) as caught:
        take(batches, 4)
    assert str(caught.value).startswith(str(root / "train/4.png"))
    assert "\n" not in str(caught.value)


def test_explicit_paths_stand_in_for_a_folder(root: Path, tmp_path: Path) -> None:
    file = root / "annotations/instances_train.json"
    explicit = DataConfig(train_images=str(root / "train"), train_annotations=str(file))
    assert find_split(explicit, "train") == (root / "train", file)
    both = DataConfig(root=str(root), train_images=str(root / "train"), train_annotations=str(file))
    assert find_split(both, "val") == (root / "val", root / "annotations/instances_val.json")
    assert find_split(str(root), "val") == find_split(root, "val") == find_split(config(root), "val")
    cases = [
        (explicit, "val", "set data.root=DIR"),
        (DataConfig(), "train", "set data.root=DIR"),
        (DataConfig(train_images=str(root)), "train", "expected data.train_images and data.train_annotations, got one"),
        (DataConfig(val_images=str(tmp_path / "no"), val_annotations=str(file)), "val", "no: no such folder"),
        (DataConfig(val_images=str(root), val_annotations=str(tmp_path / "no.json")), "val", "no.json: no such file"),
        (DataConfig(root=str(tmp_path / "absent")), "train", "absent: no such folder"),
    ]
    for given, split, message in cases:
        with pytest.raises(DataError, match=message):
            find_split(given, split)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"short_side": []}, "at least one length"),
        ({"short_side": [0]}, "greater than or equal to 1"),
        ({"scale_jitter": [2.0, 0.5]}, "0 < low <= high"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"crop": 0}, "greater than 0"),
        ({"crowd": "drop"}, "'ignore' or 'background'"),
        ({"shortside": [800]}, "did you mean 'short_side'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DataConfig, wrong, "recipe")


def test_settings_reach_the_data_set(write_split: Write) -> None:
    crowd = box_annotation(1, 1, 0, [2, 2, 8, 8], iscrowd=1)
    root = write_split({1: (20, 30)}, [crowd, box_annotation(2, 1, 0, [2, 2, 0, 8])])
    with pytest.raises(DataError, match=r"data\.drop_degenerate=true"):
        open_dataset(DataConfig(root=str(root)), "train")
    data = open_dataset(DataConfig(root=str(root), drop_degenerate=True, crowd="background"), "train")
    assert isinstance(data, CocoDataset)
    assert len(data[0].instances) == 0


def test_collate_pads_to_32_and_to_the_sizes_of_absent_pictures(root: Path) -> None:
    data = open_dataset(config(root), "train")
    samples = [data[0], data[1]]
    assert collate(samples).images.shape == (2, 3, 64, 64)
    assert collate(samples, [(65, 20)]).images.shape == (2, 3, 96, 64)
    assert np.array_equal(collate(samples).images[0, :, :40, :24], samples[0].image)
