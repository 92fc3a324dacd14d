"""COCO files: where they lie in a folder, and how they become samples.

The whole annotation file is checked once, when it is opened, and kept in a few numpy arrays. Boxes come from the bbox
entry (not from the mask) and are cut at the picture's frame. A point is a place on the plane: x = 0 is the left edge.
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perpixel.data.categories import keypoint_counts, mirror_partners, read_categories
from perpixel.data.defects import Defect, Entry, annotation_defects, image_problem, read_json
from perpixel.data.images import load_image, picture_size
from perpixel.data.masks import Segmentations
from perpixel.data.transforms import View, clip_boxes, show_keypoints
from perpixel.errors import DataError
from perpixel.structures import Instances, Sample, Size

Crowd = Literal["ignore", "background"]

MIN_KEPT = 0.1  # an object of which a crop leaves less than this part of the box is ignored: neither reward nor punish


def find_in_folder(root: str | Path, split: str, needs: frozenset[str] = frozenset()) -> tuple[Path, Path]:
    """The folder of pictures and the annotation file of a split ("train", "val" or "test"); see `places`.

    Raises:
        DataError: no such folder, or none of the layouts; the message lists what was looked for.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the pictures and their COCO labels")
    pairs = places(root, split, needs)
    for images, annotations in pairs:
        if images.is_dir() and annotations.is_file():
            return images, annotations
    looked = "; ".join(f"{a.relative_to(root)} with {i.relative_to(root)}/" for i, a in pairs)
    raise DataError(f"{root}: found no COCO labels for the split {split!r}; expected one of: {looked}")


def places(root: Path, split: str, needs: frozenset[str] = frozenset()) -> list[tuple[Path, Path]]:
    """Where pictures and labels of a split may lie, the first choice first.

    Known layouts: `annotations/instances_val.json` with `val/` (or both with COCO's suffix 2017), and Roboflow's
    `valid/_annotations.coco.json`. Where keypoints are needed, `person_keypoints_val.json` comes first.
    """
    kinds = ("person_keypoints", "instances") if "keypoints" in needs else ("instances",)
    names = [split, f"{split}2017"]
    pairs = [(root / name, root / "annotations" / f"{kind}_{name}.json") for kind in kinds for name in names]
    folders = ("valid", "val") if split == "val" else (split,)
    return pairs + [(root / folder, root / folder / "_annotations.coco.json") for folder in folders]


@dataclass(slots=True)
class _Objects:
    """All annotations that are used, ordered by picture."""

    first: npt.NDArray[np.int64]  # [M + 1]: objects first[i]:first[i + 1] belong to picture i
    boxes: npt.NDArray[np.float32]  # [T, 4] xyxy, px
    labels: npt.NDArray[np.int64]  # [T]
    ignore: npt.NDArray[np.bool_]  # [T]
    keypoints: npt.NDArray[np.float32] | None  # [T, K, 3]
    outlines: Segmentations | None


class CocoDataset(Dataset[Sample]):
    """Pictures and truth of one COCO file; `dataset[i]` is a `Sample` in the frame of the stored picture.

    Args:
        images: folder of the pictures.
        annotations: COCO JSON file.
        needs: "masks" and "keypoints", where the samples should have them.
        crowd: "ignore": crowd regions neither reward nor punish; "background": they are not there at all, as in the
            authors' release.
        drop_degenerate: leave out annotations that are broken instead of raising an error.

    Attributes:
        categories: classes in the order of their ids.
        image_ids: ids of all pictures in the file's own numbers, those without objects included.
        sizes: int64 [M, 2], (H, W) px of every picture.

    Raises:
        DataError: whatever is wrong with the files, with the ids of picture and annotation.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        needs: frozenset[str] = frozenset(),
        crowd: Crowd = "ignore",
        drop_degenerate: bool = False,
    ) -> None:
        self.images_folder, self.annotation_file = Path(images), Path(annotations)
        self.needs = frozenset(needs)
        content = read_json(self.annotation_file)
        self.categories = read_categories(content["categories"], self.annotation_file)
        self._read_images(content["images"])
        kept = [a for a in content["annotations"] if not (crowd == "background" and a.get("iscrowd"))]
        sizes = dict(zip(self.image_ids, map(tuple, self.sizes.tolist()), strict=True))
        counts = keypoint_counts(content["categories"])
        self._refuse_duplicates(kept)
        rows = []
        for annotation in kept:
            defect = next(annotation_defects(annotation, self.annotation_file, sizes, counts, self.needs), None)
            if defect is None:
                rows.append(annotation)
            elif not (defect.droppable and drop_degenerate):
                advice = "fix it or set data.drop_degenerate=true" if defect.droppable else "fix it"
                raise DataError(f"{defect}; {advice}")
        self._objects = self._collect(rows, max(counts.values()))
        self._partners = mirror_partners(self.categories, max(counts.values()))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def path(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.images_folder / self._names[index]

    def size(self, index: int) -> Size:
        """(H, W) of picture `index` as stored, px."""
        height, width = self.sizes[index].tolist()
        return height, width

    def sample(self, index: int, view: View | None = None, *, mask_stride: int = 1, reduced: bool = False) -> Sample:
        """Picture `index` and its truth.

        Args:
            index: 0 to len - 1.
            view: what to show of it; None: everything, as stored.
            mask_stride: every how many px masks are sampled.
            reduced: a JPEG may be decoded at a fraction of its size where the view needs no more.

        Raises:
            DataError: the picture cannot be read, or has another size than the annotations say.
        """
        size = self.size(index)
        view = view or View.whole(size)
        image = load_image(self.path(index), view.source_size_needed if reduced else None)
        self._check_size(index, image, reduced)
        return Sample(
            image=view.image(image),
            instances=self.instances(index, view, mask_stride),
            image_id=self.image_ids[index],
            original_size=size,
        )

    def instances(self, index: int, view: View, mask_stride: int = 1) -> Instances:
        """Truth of picture `index` in the frame of a view. Objects that it does not show are left out; those that it
        shows less than `MIN_KEPT` of are ignored."""
        objects = self._objects
        rows = np.arange(objects.first[index], objects.first[index + 1])
        boxes, kept = clip_boxes(view.boxes(objects.boxes[rows]), view.size)
        shown = kept > 0
        rows, boxes, kept = rows[shown], boxes[shown], kept[shown]
        masks, centers, has_mask = self._masks(rows, boxes, view, mask_stride)
        keypoints = None
        if objects.keypoints is not None:
            labels = objects.labels[rows]
            keypoints = torch.from_numpy(show_keypoints(view, objects.keypoints[rows], self._partners[labels]))
        return Instances(
            size=view.size,
            boxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(objects.labels[rows]),
            ignore=torch.from_numpy(objects.ignore[rows] | (kept < MIN_KEPT)),
            masks=masks,
            mask_stride=mask_stride,
            centers=centers,
            has_mask=has_mask,
            keypoints=keypoints,
        )

    def _masks(
        self, rows: npt.NDArray[np.int64], boxes: npt.NDArray[Any], view: View, stride: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Masks, mass centers (box centers where no mask is known) and has_mask; all None where not needed."""
        outlines = self._objects.outlines
        if outlines is None:
            return None, None, None
        shape = (len(range(stride // 2, view.size[0], stride)), len(range(stride // 2, view.size[1], stride)))
        masks = np.zeros((len(rows), *shape), dtype=bool)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        known = np.array([outlines.known(row) for row in rows], dtype=bool)
        for i in np.flatnonzero(known):
            masks[i], center = outlines.draw(int(rows[i]), view, stride)
            centers[i] = centers[i] if center is None else center
        return torch.from_numpy(masks), torch.from_numpy(centers), torch.from_numpy(known)

    def _check_size(self, index: int, image: Tensor, reduced: bool) -> None:
        height, width = self.size(index)
        got = tuple(image.shape[1:])
        if got != (height, width) and reduced:
            got = picture_size(self.path(index))  # it may have been decoded at a fraction of its size
        if got != (height, width):
            raise DataError(
                f"{self.path(index)}: expected {width} x {height} px as {self.annotation_file.name} says for image "
                f"{self.image_ids[index]}, got {got[1]} x {got[0]} (EXIF orientation applied); label it again"
            )

    def _read_images(self, entries: list[Entry]) -> None:
        seen: set[Any] = set()
        for entry in entries:
            if problem := image_problem(entry, seen):
                raise DataError(f"{Defect(self.annotation_file, problem, entry.get('id'))}; fix the list of images")
            seen.add(entry["id"])
        if not entries:
            raise DataError(f"{self.annotation_file}: the list of images is empty; give a split with pictures")
        self.image_ids: list[int] = [entry["id"] for entry in entries]
        self._names: list[str] = [entry["file_name"] for entry in entries]
        self._refuse_missing()
        sizes = [
            (e["height"], e["width"]) if e.get("height") else picture_size(self.images_folder / e["file_name"])
            for e in entries
        ]
        self.sizes = np.array(sizes, dtype=np.int64)

    def _refuse_missing(self) -> None:
        missing = missing_files(self.images_folder, self._names)
        if missing:
            first = min(missing)
            raise DataError(
                f"{self.images_folder / self._names[first]}: no such picture, but {self.annotation_file.name} lists it "
                f"as image {self.image_ids[first]} ({len(missing)} of {len(self)} are missing); "
                "restore it or take it out of the file"
            )

    def _refuse_duplicates(self, annotations: list[Entry]) -> None:
        seen: set[Any] = set()
        for identity in (a.get("id") for a in annotations):
            if isinstance(identity, int) and identity in seen:
                raise DataError(
                    f"{self.annotation_file}: annotation {identity}: its id occurs more than once; number anew"
                )
            seen.add(identity)

    def _collect(self, annotations: list[Entry], keypoint_count: int) -> _Objects:
        position = {identity: i for i, identity in enumerate(self.image_ids)}
        label = {identity: c for c, identity in enumerate(self.categories.ids)}
        pictures = np.array([position[a["image_id"]] for a in annotations], dtype=np.int64)
        order = np.argsort(pictures, kind="stable")
        rows = [annotations[i] for i in order]
        owners = pictures[order]
        boxes = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        sizes = self.sizes[owners]
        boxes = np.clip(boxes, 0, sizes[:, [1, 0, 1, 0]])
        keypoints = outlines = None
        if "keypoints" in self.needs:
            keypoints = self._keypoints(rows, keypoint_count)
        if "masks" in self.needs:
            outlines = Segmentations([a.get("segmentation") for a in rows], list(map(tuple, sizes.tolist())))
        return _Objects(
            first=np.searchsorted(owners, np.arange(len(self) + 1)),
            boxes=boxes.astype(np.float32),
            labels=np.array([label[a["category_id"]] for a in rows], dtype=np.int64),
            ignore=np.array([bool(a.get("iscrowd")) for a in rows], dtype=bool),
            keypoints=keypoints,
            outlines=outlines,
        )

    def _keypoints(self, annotations: list[Entry], count: int) -> npt.NDArray[np.float32]:
        if not count:
            raise DataError(
                f"{self.annotation_file}: no category lists keypoints; give a file with keypoints, "
                "or a recipe without a keypoint branch"
            )
        unknown = [0] * (3 * count)
        return np.array([a.get("keypoints") or unknown for a in annotations], dtype=np.float32).reshape(-1, count, 3)


def missing_files(folder: Path, names: list[str]) -> list[int]:
    """Indices of the names that are no entry of their folder; each folder is listed once, which is much faster than
    asking for every file on a network drive."""
    by_folder: dict[Path, list[tuple[int, str]]] = defaultdict(list)
    for i, name in enumerate(names):
        path = folder / name
        by_folder[path.parent].append((i, path.name))
    missing: list[int] = []
    for parent, members in by_folder.items():
        present = set(os.listdir(parent)) if parent.is_dir() else set()
        missing += [i for i, name in members if name not in present]
    return missing
