"""The types that travel between packages: truth, results, categories, batches and dense outputs.

Letters: B images, L locations (all levels, in the order level, row, column), N objects, C classes, K keypoints,
H W pixels. Boxes are xyxy in pixels of the frame `size` unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from perpixel.errors import ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # (H, W) in pixels


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Keypoints of one category: what they are called, which swap in a mirror, what a person would connect.

    Args:
        names: K keypoint names.
        pairs: index pairs (left, right) that change places when a picture is mirrored.
        limbs: index pairs that a drawing connects.
        sigmas: K per-keypoint constants of the OKS (object keypoint similarity), as COCO defines them.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    limbs: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Categories:
    """The classes of a data set: index c of a label is `names[c]`, whose id in the data set's own files is `ids[c]`.

    Args:
        names: C names.
        ids: C original category ids; any integers without repetition.
        skeletons: one per class where the data set has keypoints, else None.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    skeletons: tuple[Skeleton | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ids):
            raise ShapeError(f"Categories: {len(self.names)} names but {len(self.ids)} ids; give one id for each name")
        if len(set(self.ids)) != len(self.ids):
            raise ShapeError(f"Categories: ids {list(self.ids)} repeat; each class needs its own id")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def anonymous(cls, count: int) -> Categories:
        """`count` classes without names, with ids 0 to count - 1."""
        return cls(tuple(f"class {c}" for c in range(count)), tuple(range(count)))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, read back by `from_dict`."""
        skeletons = None
        if self.skeletons is not None:
            skeletons = [s and {f.name: getattr(s, f.name) for f in fields(Skeleton)} for s in self.skeletons]
        return {"names": list(self.names), "ids": list(self.ids), "skeletons": skeletons}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Categories:
        skeletons = data.get("skeletons")
        if skeletons is not None:
            skeletons = tuple(s and _skeleton_from_dict(s) for s in skeletons)
        return cls(tuple(data["names"]), tuple(data["ids"]), skeletons)


def _skeleton_from_dict(data: dict[str, Any]) -> Skeleton:
    return Skeleton(
        names=tuple(data["names"]),
        pairs=tuple((int(a), int(b)) for a, b in data["pairs"]),
        limbs=tuple((int(a), int(b)) for a, b in data["limbs"]),
        sigmas=tuple(float(s) for s in data["sigmas"]),
    )


class _Rows:
    """What `Instances` and `Detections` share: row i of every tensor field belongs to object i."""

    __slots__ = ()
    _shared = frozenset({"size", "mask_stride", "categories"})  # fields that speak of the whole image

    def __len__(self) -> int:
        return int(self.boxes.shape[0])  # type: ignore[attr-defined]

    def _row_fields(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self._shared}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value is not None}

    def __getitem__(self, index: Any) -> Self:
        """Rows selected by an integer, a slice, a list, an index tensor or a bool mask."""
        if isinstance(index, int):
            index = [index]
        if isinstance(index, Sequence):
            index = torch.as_tensor(index, dtype=torch.long)
        return replace(self, **{name: _take(value, index) for name, value in self._row_fields().items()})  # type: ignore[type-var]

    def to(self, device: torch.device | str) -> Self:
        """The same rows with every tensor on `device`."""
        moved = {n: v.to(device) for n, v in self._row_fields().items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]

    @classmethod
    def cat(cls, parts: Iterable[Self]) -> Self:
        """Rows of several objects of one frame, one after the other. A field must be present in all or in none."""
        parts = list(parts)
        names = parts[0]._row_fields().keys()
        for part in parts[1:]:
            if part.size != parts[0].size or part._row_fields().keys() != names:  # type: ignore[attr-defined]
                raise ShapeError(f"{cls.__name__}.cat: sizes or fields differ; bring all parts to one frame first")
        joined = {n: _join([getattr(p, n) for p in parts]) for n in names}
        return replace(parts[0], **joined)  # type: ignore[type-var]

    def _expect(self, name: str, dims: int, last: int | None, kind: torch.dtype) -> None:
        value = getattr(self, name)
        n = len(self)
        shape = f"[{n}" + ", ·" * (dims - 1 - (last is not None)) + (f", {last}]" if last is not None else "]")
        if not isinstance(value, Tensor):
            raise ShapeError(
                f"{type(self).__name__}.{name}: expected a {kind} tensor {shape}, got {type(value).__name__}"
            )
        wrong = value.ndim != dims or value.shape[0] != n or (last is not None and value.shape[-1] != last)
        if wrong or value.dtype != kind:
            got = f"{value.dtype} {list(value.shape)}"
            raise ShapeError(f"{type(self).__name__}.{name}: expected {kind} {shape}, got {got}")


def _take(value: Any, index: Any) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device) if isinstance(index, Tensor) else index]
    chosen = torch.arange(len(value))[index.cpu() if isinstance(index, Tensor) else index]
    return [value[i] for i in chosen.tolist()]


def _join(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def _require_boxes(rows: _Rows, boxes: Any) -> None:
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
        got = f"{boxes.dtype} {list(boxes.shape)}" if isinstance(boxes, Tensor) else type(boxes).__name__
        raise ShapeError(f"{type(rows).__name__}.boxes: expected torch.float32 [N, 4] xyxy in px, got {got}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances(_Rows):
    """Truth for one image; row i is object i.

    Args:
        size: (H, W) of the frame that all coordinates live in.
        boxes: float32 [N, 4] xyxy, px.
        labels: int64 [N], 0..C-1.
        ignore: bool [N]; a crowd or ignore region is neither positive nor negative. Default: none ignored.
        masks: bool [N, H/s, W/s], point-sampled at [s//2::s], s = `mask_stride`.
        mask_stride: s above, px.
        centers: float32 [N, 2] xy px, mass centers of the full masks. None: box centers.
        has_mask: bool [N]; False means that only the box of an object is known (mixed supervision).
        keypoints: float32 [N, K, 3]: x, y in px and COCO's visibility 0, 1 or 2.

    Raises:
        ShapeError: a field has another shape or dtype.
    """

    size: Size
    boxes: Tensor
    labels: Tensor
    ignore: Tensor = None  # type: ignore[assignment]  # filled in __post_init__
    masks: Tensor | None = None
    mask_stride: int = 1
    centers: Tensor | None = None
    has_mask: Tensor | None = None
    keypoints: Tensor | None = None

    def __post_init__(self) -> None:
        _require_boxes(self, self.boxes)
        if self.ignore is None:
            object.__setattr__(self, "ignore", torch.zeros(len(self), dtype=torch.bool, device=self.boxes.device))
        self._expect("labels", 1, None, torch.int64)
        self._expect("ignore", 1, None, torch.bool)
        if self.masks is not None:
            self._expect("masks", 3, None, torch.bool)
        if self.centers is not None:
            self._expect("centers", 2, 2, torch.float32)
        if self.has_mask is not None:
            self._expect("has_mask", 1, None, torch.bool)
        if self.keypoints is not None:
            self._expect("keypoints", 3, 3, torch.float32)

    @classmethod
    def empty(cls, size: Size) -> Instances:
        """A picture without objects."""
        return cls(size=size, boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections(_Rows):
    """Results for one image, best first; row i is object i.

    Args:
        size: (H, W) of the frame that all coordinates live in; for a predictor, the image that was given.
        boxes: float32 [N, 4] xyxy, px.
        scores: float32 [N] in 0..1.
        labels: int64 [N], 0..C-1.
        masks: bool [N, H, W], or a list of N compressed COCO RLE dicts where RLE was asked for.
        keypoints: float32 [N, K, 3]: x, y in px and a score.
        categories: the classes that `labels` speak of.

    Raises:
        ShapeError: a field has another shape or dtype.
    """

    size: Size
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | list[dict[str, Any]] | None = None
    keypoints: Tensor | None = None
    categories: Categories | None = None

    def __post_init__(self) -> None:
        _require_boxes(self, self.boxes)
        self._expect("scores", 1, None, torch.float32)
        self._expect("labels", 1, None, torch.int64)
        if isinstance(self.masks, Tensor):
            self._expect("masks", 3, None, torch.bool)
        if self.keypoints is not None:
            self._expect("keypoints", 3, 3, torch.float32)

    @property
    def names(self) -> list[str]:
        """The class name of every row."""
        categories = self.categories
        if categories is None:
            return [f"class {c}" for c in self.labels.tolist()]
        return [categories.names[c] for c in self.labels.tolist()]

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO result entries with the data set's own category ids; bbox is xywh in px, masks are compressed RLE."""
        boxes = self.boxes.tolist()
        ids = self.categories.ids if self.categories is not None else None
        entries: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": ids[label] if ids is not None else label,
                "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 6),
            }
            for (x0, y0, x1, y1), score, label in zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        ]
        if self.masks is not None:
            for entry, rle in zip(entries, self.rle(), strict=True):
                entry["segmentation"] = rle
        if self.keypoints is not None:
            for entry, points in zip(entries, self.keypoints.flatten(1).tolist(), strict=True):
                entry["keypoints"] = [round(v, 3) for v in points]
        return entries

    def rle(self) -> list[dict[str, Any]]:
        """Masks as compressed COCO run-length dicts ({"size": [H, W], "counts": str}), one a row."""
        if not isinstance(self.masks, Tensor):
            return self.masks or []
        from perpixel.rle import encode

        return encode(self.masks)

    def to_supervision(self) -> Any:
        """The same rows as `supervision.Detections`, keypoints as the array data["keypoints"] (see `third_party`)."""
        from perpixel.third_party import to_supervision

        return to_supervision(self)

    def draw(self, image: Any, **style: Any) -> Image:
        """The image (path, PIL, uint8 HWC array or CHW tensor) with boxes, names, masks and keypoints drawn on it."""
        from perpixel.drawing import draw

        return draw(
            image,
            boxes=self.boxes,
            labels=self.labels,
            names=self.names,
            scores=self.scores,
            masks=self.masks,
            keypoints=self.keypoints,
            skeletons=self.categories.skeletons if self.categories is not None else None,
            **style,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training or validation picture as the data set gives it.

    Args:
        image: uint8 [3, H, W] RGB.
        instances: truth in the frame of `image`.
        image_id: id in the data set's own file.
        original_size: (H, W) of the stored picture, before any resizing.
    """

    image: Tensor
    instances: Instances
    image_id: int
    original_size: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples padded at right and bottom to one size.

    Args:
        images: uint8 or float32 [B, 3, H, W] RGB, 0..255, zero beyond `sizes`.
        sizes: (H, W) of the valid part of each image, px.
        original_sizes: (H, W) of each stored picture, px.
        targets: truth of each image in the frame of `images`.
        image_ids: ids in the data set's own file.
    """

    images: Tensor
    sizes: list[Size]
    original_sizes: list[Size] = field(default_factory=list)
    targets: list[Instances]
    image_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ShapeError(f"Batch.images: expected [B, 3, H, W] RGB, got {list(self.images.shape)}")
        for name in ("sizes", "targets"):
            if len(getattr(self, name)) != len(self.images):
                raise ShapeError(f"Batch.{name}: {len(getattr(self, name))} entries for {len(self.images)} images")

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """Images on `device`. Targets stay where they are: assignment runs on the host while the device works,
        and each loss moves the rows that it needs."""
        return replace(self, images=self.images.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Images in page-locked memory, for asynchronous copies to a GPU."""
        return replace(self, images=self.images.pin_memory())


class Progress(NamedTuple):
    """How far training is: the absolute step, and the fraction of the schedule that is done (0..1)."""

    step: int = 0
    fraction: float = 0.0


class Outputs(NamedTuple):
    """Dense predictions of a detector, all levels one after the other (P3 first; rows, then columns).

    Args:
        logits: float32 [B, L, C], before the sigmoid.
        centerness: float32 [B, L], before the sigmoid; the IoU where the recipe predicts that. None: no such branch.
        ltrb: float32 [B, L, 4], distances to the box's sides in strides of the level. None: no box branch.
        keypoints: float32 [B, L, K, 2] xy, px of the network's input.
        controller: [B, L, parameters of the mask head].
        mask_features: [B, channels, H/8, W/8].
        auxiliary: dense outputs that only training uses, by name.
        points: float32 [L, 2] xy, px: the place in the network's input that a location stands for.
        level: int64 [L], 0 for P3.
        shapes: (H, W) of the map of every level.
    """

    logits: Tensor
    centerness: Tensor | None
    ltrb: Tensor | None
    points: Tensor
    level: Tensor
    keypoints: Tensor | None = None
    controller: Tensor | None = None
    mask_features: Tensor | None = None
    auxiliary: dict[str, Tensor] = {}
    shapes: tuple[Size, ...] = ()
