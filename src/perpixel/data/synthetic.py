"""A data set made from a seed: textured shapes that hide each other on textured ground, with exact boxes and masks.

It needs no download and is not easy: shape alone tells the classes apart (colors and textures are shared by all of
them and by the ground), sizes run from 16 to 256 px, and about half of the objects touch another one. Every mask is
what can be seen of the object, to the pixel; the box is the tight box of that mask.

A picture depends on nothing but (seed, split, its number), so a longer set starts with the pictures of a shorter one.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco.mask
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from perpixel.errors import DataError

CLASSES = ("disc", "triangle", "square", "star", "crescent")
SMALLEST, LARGEST = 16, 256  # px, longer side of the box of an object before anything hides it
OBJECTS = (5, 15)  # fewest and most objects of a picture
MIN_VISIBLE = 0.4  # an object of which less than this part would be seen is not drawn
AIM = 0.2  # part of the objects that is put on top of another one on purpose

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Generator = np.random.Generator
Window = tuple[slice, slice]  # rows, columns


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture and its truth.

    Args:
        image: uint8 [H, W, 3] RGB.
        labels: N indices into `CLASSES`.
        masks: bool [N, H, W], the visible part of every object; they never overlap.
        full_areas: N areas in px before anything hid the objects.
        touching: N flags: the object hides a part of another one, or is hidden by it.
    """

    image: npt.NDArray[np.uint8]
    labels: list[int]
    masks: Bools
    full_areas: list[int]
    touching: list[bool]


def write_synthetic(root: str | Path, *, train: int = 600, val: int = 300, seed: int = 0, size: int = 384) -> Path:
    """Writes `annotations/instances_{train,val}.json`, `train/` and `val/` in COCO format.

    Args:
        root: folder to create or to write into.
        train: number of training pictures.
        val: number of held-out pictures; their random numbers have nothing in common with the training ones.
        seed: any integer >= 0.
        size: longer side of a picture, px; the shorter one is 3/4 of it.

    Returns:
        `root` as a path.

    Raises:
        DataError: `size` is too small for the objects, or the folder cannot be written.
    """
    if size < 128:
        raise DataError(f"synthetic data: expected a size of at least 128 px, got {size}; objects need the room")
    root = Path(root)
    try:
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        for number, (split, count) in enumerate({"train": train, "val": val}.items()):
            _write_split(root, split, number, count, seed, size)
    except OSError as error:
        raise DataError(f"{root}: cannot write the synthetic data ({error}); give a folder with free space") from error
    return root


def _write_split(root: Path, split: str, number: int, count: int, seed: int, size: int) -> None:
    folder = root / split
    folder.mkdir(exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(count):
        scene = draw_scene(np.random.default_rng([seed, number, index]), size)
        name = f"{index:06d}.jpg"
        Image.fromarray(scene.image).save(folder / name, quality=92)
        height, width = scene.image.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        annotations += _annotations(scene, index + 1, first_id=len(annotations) + 1)
    content = {
        "info": {"description": f"perpixel synthetic set, split {split}, seed {seed}, size {size}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c + 1, "name": name, "supercategory": "shape"} for c, name in enumerate(CLASSES)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, object]]:
    raster = np.asfortranarray(scene.masks.transpose(1, 2, 0), dtype=np.uint8)  # [H, W, N], the layout of COCO's RLE
    rles: Any = hotcoco.mask.encode(raster)
    boxes = hotcoco.mask.to_bbox(rles)
    areas = hotcoco.mask.area(rles)
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": [int(v) for v in boxes[i]],
            "area": int(areas[i]),
            "iscrowd": 0,
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
        }
        for i, (label, rle) in enumerate(zip(scene.labels, rles, strict=True))
    ]


def draw_scene(rng: Generator, size: int = 384) -> Scene:
    """One random picture with 5 to 15 objects, `size` px on its longer side."""
    shape = (size * 3 // 4, size) if rng.random() < 0.7 else (size, size * 3 // 4)
    ground = rng.uniform(50, 205, 3)
    canvas = _texture(*shape, ground, rng.normal(0, 14, 3), rng) + _blotches(*shape, 28, rng)
    canvas += rng.integers(-7, 8, canvas.shape, dtype=np.int8)  # grain
    owner = np.full(shape, -1, np.int16)  # which object each pixel shows
    drawn: list[_Drawn] = []
    for side in _sides(rng, size):
        label = int(rng.integers(len(CLASSES)))
        mask = SHAPES[label](int(side), rng)
        window = _find_spot(mask, owner, drawn, rng)
        if window is None:
            continue
        hidden = np.bincount(owner[window][mask] + 1, minlength=len(drawn) + 1)[1:]
        for index in np.flatnonzero(hidden):
            drawn[index].visible -= int(hidden[index])
            drawn[index].touching = True
        canvas[window][mask] = _paint(mask, ground, rng)
        owner[window][mask] = len(drawn)
        area = int(np.count_nonzero(mask))
        drawn.append(_Drawn(label, area, area, bool(hidden.any()), window))
    masks = owner[None] == np.arange(len(drawn), dtype=np.int16)[:, None, None]
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, [d.label for d in drawn], masks, [d.area for d in drawn], [d.touching for d in drawn])


@dataclass(slots=True)
class _Drawn:
    """What later objects need to know of an earlier one; areas in px."""

    label: int
    area: int
    visible: int
    touching: bool
    window: Window


def _sides(rng: Generator, size: int) -> npt.NDArray[np.int64]:
    """Longer sides of the objects, px, log-uniform; mostly large ones first, so that small ones lie in front."""
    count = rng.integers(OBJECTS[0], OBJECTS[1] + 1)
    largest = min(LARGEST, int(0.6 * size))
    sides = np.exp(rng.uniform(math.log(SMALLEST), math.log(largest), count))
    order = np.argsort(-sides * rng.uniform(0.4, 2.5, count))
    return np.rint(sides[order]).astype(np.int64)


def _find_spot(mask: Bools, owner: npt.NDArray[np.int16], drawn: list[_Drawn], rng: Generator) -> Window | None:
    """Where the shape fits and leaves enough of every other object to see; None: nowhere.

    Some of the objects try to meet one that is already there, so that overlaps are common.
    """
    height, width = mask.shape
    free = np.array([owner.shape[0] - height, owner.shape[1] - width])
    needed = np.array([d.visible - MIN_VISIBLE * d.area for d in drawn])
    aim = bool(drawn) and rng.random() < AIM
    for attempt in range(12):
        corner = rng.integers(free + 1)
        if aim and attempt < 6:
            target = drawn[rng.integers(len(drawn))].window
            meeting = np.array([rng.uniform(axis.start, axis.stop) for axis in target])
            corner = np.clip(np.rint(meeting - mask.shape * rng.uniform(0, 1, 2)), 0, free).astype(np.int64)
        top, left = corner.tolist()
        window = (slice(top, top + height), slice(left, left + width))
        hidden = np.bincount(owner[window][mask] + 1, minlength=len(drawn) + 1)[1:]
        if ((hidden <= needed) | (hidden == 0)).all():
            return window
    return None


# Shapes: bool [h, w] rasters, tight, with the longer side `side` px.


def _polygon(points: npt.NDArray[np.float64], side: int) -> Bools:
    """Raster of a closed polygon that is scaled so that its longer side is `side` px."""
    points = points - points.min(0)
    points = points * ((side - 1) / points.max())
    width, height = np.floor(points.max(0)).astype(int) + 1
    image = Image.new("L", (int(width), int(height)))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=1)
    return np.asarray(image, dtype=bool)


def _corners(radii: npt.NDArray[np.float64], rng: Generator) -> npt.NDArray[np.float64]:
    angles = rng.uniform(0, 2 * math.pi) + np.arange(len(radii)) * (2 * math.pi / len(radii))
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _triangle(side: int, rng: Generator) -> Bools:
    return _polygon(_corners(rng.uniform(0.85, 1.15, 3), rng), side)


def _square(side: int, rng: Generator) -> Bools:
    corners = _corners(np.ones(4), rng)
    return _polygon(corners, side)


def _star(side: int, rng: Generator) -> Bools:
    return _polygon(_corners(np.tile([1.0, rng.uniform(0.38, 0.48)], 5), rng), side)


def _disc(side: int, rng: Generator) -> Bools:
    rows, columns = np.ogrid[:side, :side]
    center, radius = (side - 1) / 2, side / 2
    return np.asarray((rows - center) ** 2 + (columns - center) ** 2 <= radius**2)


def _crescent(side: int, rng: Generator) -> Bools:
    disc = _disc(side, rng)
    angle, shift = rng.uniform(0, 2 * math.pi), rng.uniform(0.42, 0.55) * side / 2
    rows, columns = np.ogrid[:side, :side]
    y, x = (side - 1) / 2 + shift * math.sin(angle), (side - 1) / 2 + shift * math.cos(angle)
    disc &= (rows - y) ** 2 + (columns - x) ** 2 > (0.8 * side / 2) ** 2
    rows_used, columns_used = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
    return disc[rows_used[0] : rows_used[-1] + 1, columns_used[0] : columns_used[-1] + 1]


SHAPES: tuple[Callable[[int, Generator], Bools], ...] = (_disc, _triangle, _square, _star, _crescent)


# Colors and textures: float32 [h, w, 3].


def _paint(mask: Bools, ground: npt.NDArray[np.float64], rng: Generator) -> Floats:
    """Colors [number of pixels of the mask, 3]: two-color texture, lit from one side, darker along the rim."""
    color = rng.uniform(20, 235, 3)
    while np.abs(color - ground).max() < 55:  # an object of the ground's own color could not be found
        color = rng.uniform(20, 235, 3)
    height, width = mask.shape
    texture = _texture(height, width, color, rng.normal(0, 32, 3), rng)
    angle = rng.uniform(0, 2 * math.pi)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * math.sin(angle)
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None] * math.cos(angle)
    light = 22 * (rows + columns)
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    light -= 18 * ~inner
    return np.asarray((texture + light[..., None])[mask])


def _texture(
    height: int, width: int, color: npt.NDArray[np.float64], contrast: npt.NDArray[np.float64], rng: Generator
) -> Floats:
    """`color` plus and minus `contrast` in a random pattern."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))](height, width, rng)
    texture = pattern[..., None] * contrast.astype(np.float32)
    texture += color.astype(np.float32)
    return texture


def _waves(height: int, width: int, rng: Generator) -> tuple[Floats, Floats]:
    """Sines along two perpendicular directions, -1..1, [h, w] each. Periods of 5 to 40 px."""
    angle = rng.uniform(0, math.pi)
    frequency = 2 * math.pi / math.exp(rng.uniform(math.log(5), math.log(40)))
    rows = np.arange(height, dtype=np.float32)[:, None] * np.float32(frequency)
    columns = np.arange(width, dtype=np.float32)[None] * np.float32(frequency)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return np.sin(c * columns + s * rows), np.sin(c * rows - s * columns)


def _stripes(height: int, width: int, rng: Generator) -> Floats:
    return _waves(height, width, rng)[0]


def _checks(height: int, width: int, rng: Generator) -> Floats:
    along, across = _waves(height, width, rng)
    return np.sign(along * across)


def _dots(height: int, width: int, rng: Generator) -> Floats:
    along, across = _waves(height, width, rng)
    return (along + across > 0.9).astype(np.float32) * 2 - 1


def _cloud(height: int, width: int, rng: Generator) -> Floats:
    return _blotches(height, width, 1.0, rng, channels=1, cell=8)[..., 0]


PATTERNS: tuple[Callable[[int, int, Generator], Floats], ...] = (_stripes, _checks, _dots, _cloud)


def _blotches(height: int, width: int, strength: float, rng: Generator, *, channels: int = 3, cell: int = 48) -> Floats:
    """Smooth noise [h, w, channels] with standard deviation of about `strength`; one random value every `cell` px."""
    small = (rng.standard_normal((channels, height // cell + 2, width // cell + 2)) * strength).astype(np.float32)
    layers = [Image.fromarray(s).resize((width, height), Image.Resampling.BILINEAR) for s in small]
    return np.stack([np.asarray(layer) for layer in layers], -1)
