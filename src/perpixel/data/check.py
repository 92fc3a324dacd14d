"""Every defect of a data set, found in one pass: labels first, then each picture is opened."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from perpixel.data.categories import keypoint_counts
from perpixel.data.coco import missing_files, places
from perpixel.data.defects import Defect, Entry, annotation_defects, category_problems, image_problem, read_json
from perpixel.data.images import load_image, picture_size
from perpixel.data.loading import DataConfig, Split, find_split
from perpixel.errors import DataError
from perpixel.structures import Size

SPLITS: tuple[Split, ...] = ("train", "val", "test")
TOLERANCE = 2.0  # px that a box may reach over the frame of its picture; rounding in label tools does that
EVERYTHING = frozenset({"masks", "keypoints"})


def check(where: str | Path | DataConfig, *, pictures: bool = True) -> list[Defect]:
    """Everything that is wrong with a data set, in the order of files, then pictures.

    Args:
        where: folder with one or more splits in a known layout, or a config with explicit paths.
        pictures: also decode every picture; without, only their presence is checked.

    Returns:
        Defects; an empty list for a sound data set.

    Raises:
        DataError: the folder is not there, or holds no labels in a known layout.
    """
    defects: list[Defect] = []
    categories: dict[Path, list[tuple[str, str]]] = {}
    opened: dict[Path, Size | DataError] = {}  # pose and instance labels share pictures
    for images, annotations in _label_files(where):
        try:
            content = read_json(annotations)
        except DataError as error:
            defects.append(Defect(annotations, str(error).removeprefix(f"{annotations}: ")))
            continue
        defects += _check_file(images, annotations, content, opened, pictures)
        categories[annotations] = sorted((str(c.get("id")), str(c.get("name"))) for c in content["categories"])
    return defects + list(_category_disagreements(categories))


def _label_files(where: str | Path | DataConfig) -> list[tuple[Path, Path]]:
    """Folder of pictures and annotation file of every split that has one, pose labels included.

    Raises:
        DataError: there is none at all, or an explicit path is not there.
    """
    if isinstance(where, DataConfig) and where.root is None:
        explicit: list[tuple[Split, str | None]] = [("train", where.train_images), ("val", where.val_images)]
        return [find_split(where, split) for split, given in explicit if given] or [find_split(where, "train")]
    root = Path(where if not isinstance(where, DataConfig) else str(where.root))
    pairs = [pair for split in SPLITS for pair in sorted(places(root, split, EVERYTHING))]
    found = [(images, annotations) for images, annotations in pairs if annotations.is_file()]
    return found or [find_split(root, "train")]


def _check_file(
    images: Path, file: Path, content: dict[str, list[Entry]], opened: dict[Path, Size | DataError], pictures: bool
) -> Iterator[Defect]:
    for problem in category_problems(content["categories"]):
        yield Defect(file, problem)
    entries: list[Entry] = []
    seen: set[Any] = set()
    for entry in content["images"]:
        wrong = image_problem(entry, seen)
        if wrong is not None:
            yield Defect(file, wrong, entry.get("id"))
        else:
            entries.append(entry)
            seen.add(entry["id"])
    if images.is_dir():
        missing = set(missing_files(images, [e["file_name"] for e in entries]))
        for i in sorted(missing):
            yield Defect(images / entries[i]["file_name"], "no such picture", entries[i]["id"])
        present = [e for i, e in enumerate(entries) if i not in missing]
    else:
        yield Defect(file, f"the folder of its pictures, {images}, is not there")
        present = []
    _open_all([images / e["file_name"] for e in present if pictures or not e.get("height")], opened, pictures)
    sizes = {e["id"]: (e["height"], e["width"]) for e in entries if e.get("height")}
    for entry in present:
        measured = opened.get(images / entry["file_name"])
        if isinstance(measured, tuple):
            sizes.setdefault(entry["id"], measured)
    yield from _check_annotations(file, content, sizes, seen)
    for entry in present:
        if defect := _picture_defect(images / entry["file_name"], entry, opened):
            yield defect


def _open_all(paths: list[Path], opened: dict[Path, Size | DataError], decode: bool) -> None:
    """Adds the pictures that are not in `opened` yet."""
    wanted = sorted(set(paths) - opened.keys())
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        opened.update(zip(wanted, pool.map(_open if decode else _measure, wanted), strict=True))


def _open(path: Path) -> Size | DataError:
    """Size (H, W) of a picture that can be decoded to its end, or why it cannot."""
    try:
        height, width = load_image(path).shape[1:]
    except DataError as error:
        return error
    return height, width


def _measure(path: Path) -> Size | DataError:
    """Size (H, W) of a picture by its head, or why it has none."""
    try:
        return picture_size(path)
    except DataError as error:
        return error


def _picture_defect(path: Path, entry: Entry, opened: dict[Path, Size | DataError]) -> Defect | None:
    found = opened.get(path)
    if isinstance(found, DataError):
        return Defect(path, str(found).removeprefix(f"{path}: "), entry["id"])
    if found is None or not entry.get("height") or found == (entry["height"], entry["width"]):
        return None
    listed = f"{entry['width']} x {entry['height']}"
    problem = f"has {found[1]} x {found[0]} px (EXIF orientation applied), its labels were made for {listed}"
    return Defect(path, problem, entry["id"])


def _check_annotations(
    file: Path, content: dict[str, list[Entry]], sizes: dict[Any, Size], image_ids: set[Any]
) -> Iterator[Defect]:
    counts = {identity: n for identity, n in keypoint_counts(content["categories"]).items() if identity is not None}
    ids = Counter(a.get("id") for a in content["annotations"] if isinstance(a.get("id"), int))
    for annotation in content["annotations"]:
        image_id, identity = annotation.get("image_id"), annotation.get("id")
        if isinstance(image_id, int) and image_id in image_ids and image_id not in sizes:
            continue  # its picture cannot be read, which is reported there
        yield from annotation_defects(annotation, file, sizes, counts, EVERYTHING)
        if problem := _beyond(annotation.get("bbox"), sizes.get(image_id) if isinstance(image_id, int) else None):
            yield Defect(file, problem, image_id, identity)
    for identity, times in ids.items():
        if times > 1:
            owners = [a.get("image_id") for a in content["annotations"] if a.get("id") == identity]
            yield Defect(file, f"its id is used {times} times, in images {owners}", None, identity)


def _beyond(box: Any, size: Size | None) -> str | None:
    """How a box that is otherwise sound reaches over the frame of its picture."""
    if size is None or not isinstance(box, list) or len(box) != 4:
        return None
    try:
        x, y, width, height = (float(v) for v in box)
    except (TypeError, ValueError):
        return None
    over = max(-x, -y, x + width - size[1], y + height - size[0])
    overlaps = width > 0 and height > 0 and x < size[1] and y < size[0] and x + width > 0 and y + height > 0
    if overlaps and over > TOLERANCE:
        return f"bbox {box} reaches {over:g} px over the picture of {size[1]} x {size[0]} px"
    return None


def _category_disagreements(categories: dict[Path, list[tuple[str, str]]]) -> Iterator[Defect]:
    """Splits of one kind of labels whose lists of categories differ."""
    by_kind: dict[str, tuple[Path, list[tuple[str, str]]]] = {}
    for file, listed in categories.items():
        kind = "person_keypoints" if file.name.startswith("person_keypoints") else "instances"
        first, expected = by_kind.setdefault(kind, (file, listed))
        if listed != expected:
            mine, theirs = sorted(set(listed) - set(expected)), sorted(set(expected) - set(listed))
            yield Defect(file, f"its categories differ from those of {first}: only here {mine}, only there {theirs}")
