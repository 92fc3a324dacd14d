"""Samples of a data set with their truth drawn on them, on one sheet."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from perpixel.data.coco import CocoDataset
from perpixel.data.loading import DataConfig, Split, TrainSteps, open_dataset
from perpixel.drawing import draw
from perpixel.errors import DataError
from perpixel.structures import Categories, Sample

SHEETS = (".png", ".jpg", ".jpeg")
GAP = 6  # px between the pictures of a sheet
GROUND = (24, 24, 24)


def show(
    where: str | Path | DataConfig,
    out: str | Path,
    count: int = 12,
    *,
    split: Split = "train",
    needs: frozenset[str] = frozenset({"masks"}),
    transformed: bool = False,
    seed: int = 0,
) -> Path:
    """Draws pictures of a split with boxes, names, masks and keypoints, as training would get them.

    Args:
        where: folder of the data set, or a config.
        out: name of a sheet (.png, .jpg) for all; or a folder, for a sheet `samples.png` and every picture in full
            size, named after its id.
        count: number of pictures; they are drawn by lot.
        split: "train", "val" or "test".
        needs: "masks" and "keypoints", where they should be drawn.
        transformed: through the transforms of training (resizing, mirror, crop, jitter) instead of as stored.
        seed: of the lot.

    Returns:
        The sheet.

    Raises:
        DataError: the data set cannot be read, or the sheet cannot be written.
    """
    config = where if isinstance(where, DataConfig) else DataConfig(root=str(where))
    config = config.model_copy(update={"mask_stride": 1})  # masks are drawn in full
    dataset = open_dataset(config, split, needs)
    count = max(1, min(count, len(dataset)))
    samples = _transformed(dataset, config, count, seed) if transformed else _stored(dataset, count, seed)
    pictures = [draw_sample(sample, dataset.categories) for sample in samples]
    out = Path(out)
    single = out.suffix.lower() in SHEETS
    sheet = out if single else out / "samples.png"
    files = [(sheet, contact_sheet(pictures))]
    if not single:
        files += [(out / f"{s.image_id}.jpg", p) for s, p in zip(samples, pictures, strict=True)]
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        for path, picture in files:
            picture.save(path)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); give another place") from error
    return sheet


def _stored(dataset: CocoDataset, count: int, seed: int) -> list[Sample]:
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return [dataset[int(index)] for index in chosen]


def _transformed(dataset: CocoDataset, config: DataConfig, count: int, seed: int) -> list[Sample]:
    steps = TrainSteps(dataset, config, batch_size=1, seed=seed)
    samples = []
    for step in range(count):
        batch = steps[step]
        height, width = batch.sizes[0]
        samples.append(
            Sample(
                image=batch.images[0, :, :height, :width],
                instances=batch.targets[0],
                image_id=batch.image_ids[0],
                original_size=batch.original_sizes[0],
            )
        )
    return samples


def draw_sample(sample: Sample, categories: Categories) -> Image.Image:
    """The picture of a sample with its truth; ignore regions are marked as such."""
    truth = sample.instances
    names = [
        categories.names[label] + (" (ignored)" if ignored else "")
        for label, ignored in zip(truth.labels.tolist(), truth.ignore.tolist(), strict=True)
    ]
    return draw(
        sample.image,
        boxes=truth.boxes,
        labels=truth.labels,
        names=names,
        masks=truth.masks if truth.mask_stride == 1 else None,
        keypoints=truth.keypoints,
        skeletons=categories.skeletons,
    )


def contact_sheet(pictures: Sequence[Image.Image], *, cell: int = 480, columns: int = 0) -> Image.Image:
    """Pictures side by side on one sheet, each shrunk into a square of `cell` px; by default as wide as it is high."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    cells = [picture.copy() for picture in pictures]
    for picture in cells:
        picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = columns * (cell + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1)), GROUND)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = GAP + column * (cell + GAP) + (cell - picture.width) // 2
            sheet.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + GAP
    return sheet
