"""From weights and pictures to detections in the pixels of those pictures.

Pictures of one padded size share a batch and no others: group norms see the padding, so a picture's result must not
depend on its neighbors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from perpixel.data.categories import mirror_partners
from perpixel.data.images import Picture, load_image, resize_for_test
from perpixel.engine.checkpoint import load_into, load_weights_file, read_categories, read_run
from perpixel.errors import CheckpointError, ConfigError
from perpixel.hub import fetch, load_released
from perpixel.interop import adelaidet
from perpixel.ops.nms import batched_nms
from perpixel.optimize import choose_precision, find_device, prepare
from perpixel.recipe import Recipe, build, load_recipe, recipe_names
from perpixel.structures import Categories, Detections, Size

WINDOW = 8  # batches whose pictures are in memory at once, to be sorted by size
CLASSES_KEY = "head.logits.bias"  # its length is the number of classes
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")


class View(NamedTuple):
    """One way of looking at a picture.

    Args:
        short_side, max_size: px; of the network's input.
        mirrored: left and right exchanged.
    """

    short_side: int
    max_size: int
    mirrored: bool = False


class Predictor:
    """A trained detector that takes pictures as they come.

    Args:
        net: as built by the recipe, with its weights; a copy is prepared, the network itself stays as it is.
        recipe: gives the size of the network's input and the suppression threshold.
        categories: the classes of the labels.
        device: "auto", "cpu", "cuda", "cuda:1", …
        precision: "fp32", "bf16", or "auto": bf16 where the hardware multiplies it natively. In bf16 scores move by
            about 0.01 and boxes by less than a pixel.
        threshold: default of `__call__`.
        compile: run the network through `torch.compile` (slow start, needs a C++ compiler on CPUs).

    Attributes:
        recipe, categories, device, precision: see above.
        net: the prepared network.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        categories: Categories,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        threshold: float = 0.3,
        compile: bool = False,
    ) -> None:
        self.recipe = recipe
        self.categories = categories
        self.device = find_device(device)
        self.precision = choose_precision(precision, self.device)
        self.threshold = threshold
        self.net: Any = prepare(net, self.device, self.precision)
        if compile:
            self.net.compile()

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; `names[label]`."""
        return self.categories.names

    @overload
    def __call__(
        self,
        image: list[Picture] | tuple[Picture, ...],
        *,
        threshold: float | None = None,
        batch_size: int = 4,
        scales: Sequence[int] | None = None,
        flip: bool = False,
    ) -> list[Detections]: ...

    @overload
    def __call__(
        self,
        image: Picture,
        *,
        threshold: float | None = None,
        batch_size: int = 4,
        scales: Sequence[int] | None = None,
        flip: bool = False,
    ) -> Detections: ...

    def __call__(
        self,
        image: Any,
        *,
        threshold: float | None = None,
        batch_size: int = 4,
        scales: Sequence[int] | None = None,
        flip: bool = False,
    ) -> Any:
        """Detections of one picture, or a list of them for a list of pictures.

        Args:
            image: path, PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W], RGB; or a list of them.
            threshold: least score, 0..1. The recipe's own, lower threshold holds in any case.
            batch_size: pictures that go through the network together.
            scales: short sides in px, for test-time augmentation. Default: the recipe's one. Long sides are limited
                in proportion. The thesis uses 400, 500, …, 1200 with `flip` (section 3.3.3); results are merged by NMS.
            flip: also look at the mirrored picture.

        Returns:
            `Detections` in the pixels of the picture that was given, best first, on the CPU.

        Raises:
            DataError, ShapeError: something that is no picture.
        """
        pictures = image if isinstance(image, list | tuple) else [image]
        window = batch_size * WINDOW
        results = list(
            self.stream(pictures, threshold=threshold, batch_size=batch_size, scales=scales, flip=flip, window=window)
        )
        return results if isinstance(image, list | tuple) else results[0]

    def stream(
        self,
        images: Iterable[Picture],
        *,
        threshold: float | None = None,
        batch_size: int = 1,
        scales: Sequence[int] | None = None,
        flip: bool = False,
        window: int | None = None,
    ) -> Iterator[Detections]:
        """Detections of pictures as they arrive, in their order: frames of a video, files of a large folder.

        Args:
            images: any iterable; `window` pictures are taken from it at a time.
            window: pictures that are sorted by size and finished before the first of them is yielded. Default:
                `batch_size`.
            threshold, batch_size, scales, flip: as in `__call__`.
        """
        least = self.threshold if threshold is None else threshold
        if batch_size < 1 or not 0 <= least <= 1:
            raise ConfigError(f"expected batch_size >= 1 and threshold in 0..1, got {batch_size} and {least}")
        views = self._views(scales, flip)
        source = iter(images)
        while taken := [load_image(image) for image in islice(source, window or batch_size)]:
            by_view = [self._detect(taken, view, batch_size) for view in views]
            for parts in zip(*by_view, strict=True):
                merged = parts[0] if len(parts) == 1 else self._merge(parts)
                yield replace(merged[merged.scores > least], categories=self.categories)

    def _views(self, scales: Sequence[int] | None, flip: bool) -> list[View]:
        data = self.recipe.data
        sides = (data.test_short_side,) if scales is None else tuple(scales)
        if not sides or min(sides) < 1:
            raise ConfigError(f"scales: expected short sides in px such as [400, 600, 800], got {list(sides)}")
        limits = [round(data.test_max_size * side / data.test_short_side) for side in sides]
        mirrors = (False, True) if flip else (False,)
        return [View(side, limit, mirrored) for side, limit in zip(sides, limits, strict=True) for mirrored in mirrors]

    @torch.inference_mode()
    def _detect(self, pictures: list[Tensor], view: View, batch_size: int) -> list[Detections]:
        """Detections of every picture [3, H, W] seen in one way, in the picture's own pixels."""
        inputs = [resize_for_test(picture, view.short_side, view.max_size) for picture in pictures]
        if view.mirrored:
            inputs = [image.flip(-1) for image in inputs]
        found: dict[int, Detections] = {}
        for chosen in same_size_batches([_size(image) for image in inputs], self.net.divisor, batch_size):
            images, sizes = stack([inputs[i] for i in chosen])
            outputs = self.net(images.to(self.device), sizes)
            frames = [_size(pictures[i]) for i in chosen]
            for i, detections in zip(chosen, self.net.decode(outputs, sizes, frames), strict=True):
                found[i] = mirror(detections, self.categories) if view.mirrored else detections
        return [found[i].to("cpu") for i in range(len(pictures))]

    def _merge(self, parts: Sequence[Detections]) -> Detections:
        """What several looks at one picture found, each object once."""
        rows = Detections.cat(parts)
        kept = batched_nms(rows.boxes, rows.scores, rows.labels, self.recipe.decode.nms_threshold)
        return rows[kept[: self.recipe.decode.max_detections]]


def same_size_batches(sizes: Sequence[Size], divisor: int, batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size`, all of whose sizes (H, W) are equal once padded to `divisor` px."""
    groups: dict[Size, list[int]] = {}
    for index, (height, width) in enumerate(sizes):
        groups.setdefault((-(-height // divisor), -(-width // divisor)), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def stack(images: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """Pictures [3, H_i, W_i] as one batch [B, 3, H, W], zero at right and bottom, and their sizes."""
    sizes = [_size(image) for image in images]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    batch = torch.zeros((len(images), 3, height, width), dtype=images[0].dtype)
    batch = batch.contiguous(memory_format=torch.channels_last)
    for row, image, (h, w) in zip(batch, images, sizes, strict=True):
        row[:, :h, :w] = image
    return batch, sizes


def mirror(detections: Detections, categories: Categories) -> Detections:
    """The detections of a mirrored picture in the picture itself; left and right keypoints change places, too."""
    width = detections.size[1]
    left, top, right, bottom = detections.boxes.unbind(1)
    fields: dict[str, Any] = {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if isinstance(detections.masks, Tensor):
        fields["masks"] = detections.masks.flip(-1)
    if detections.keypoints is not None:
        points = detections.keypoints.clone()
        points[..., 0] = width - points[..., 0]
        partners = torch.from_numpy(mirror_partners(categories, points.shape[1])).to(points.device)
        order = partners[detections.labels]  # [N, K]
        fields["keypoints"] = points.gather(1, order[:, :, None].expand(-1, -1, 3))
    return replace(detections, **fields)


def _size(image: Tensor) -> Size:
    return int(image.shape[-2]), int(image.shape[-1])


def load(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    threshold: float = 0.3,
    compile: bool = False,
) -> Predictor:
    """A detector that is ready to use.

    Args:
        source: a run folder (of `perpixel.train` or `perpixel convert`), a file of weights in it, or a recipe's name:
            then the authors' released weights are fetched. Those are for non-commercial use only.
        weights: another file: of the release, or of a run of this recipe.
        device, precision, threshold, compile: as in `Predictor`.

    Raises:
        ConfigError: no such recipe or device.
        CheckpointError: the weights cannot be had, cannot be read, or belong to something else.
    """
    path = Path(source)
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES and (path.parent / "recipe.yaml").is_file():
        path, weights = path.parent, weights or path
    if path.is_dir():
        net, recipe, categories = _load_run(path, None if weights is None else Path(weights))
    else:
        recipe = load_recipe(_known_recipe(str(source)))
        net, categories = _load_weights(recipe, fetch(recipe) if weights is None else Path(weights))
    return Predictor(net, recipe, categories, device=device, precision=precision, threshold=threshold, compile=compile)


def _known_recipe(source: str) -> str:
    path = Path(source)
    if path.suffix in WEIGHT_SUFFIXES and path.is_file():
        raise CheckpointError(
            f"{source}: weights alone do not say what network they belong to; give the recipe and weights={source}"
        )
    if source in recipe_names() or path.suffix in (".yaml", ".yml"):
        return source
    raise ConfigError(
        f"{source}: is neither a run folder nor a recipe; recipes: {', '.join(recipe_names())}; "
        "a run folder is what perpixel train or perpixel convert leaves"
    )


def _load_run(folder: Path, weights: Path | None) -> tuple[nn.Module, Recipe, Categories]:
    info = read_run(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    net = build(recipe, len(info.categories))
    file = weights or info.weights
    load_into(net, load_weights_file(file), file)
    return net, recipe, info.categories


def _load_weights(recipe: Recipe, file: Path) -> tuple[nn.Module, Categories]:
    """A network of the recipe with the weights of a file: of the release, or our own."""
    state = load_weights_file(file)
    if adelaidet.is_release(state):
        return load_released(recipe, file)
    if CLASSES_KEY not in state:
        raise CheckpointError(f"{file}: has no {CLASSES_KEY}; expected weights of perpixel or of the authors' release")
    classes = len(state[CLASSES_KEY])
    net = build(recipe, classes)
    load_into(net, state, f"{file}: recipe {recipe.name}")
    beside = file.parent / "categories.json"
    return net, read_categories(beside) if beside.is_file() else Categories.anonymous(classes)
