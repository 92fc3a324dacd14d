"""Every defect of a data set, found in one pass: labels first, then each picture is opened."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from perpixel.data.categories import keypoint_counts
from perpixel.data.coco import missing_files
from perpixel.data.defects import Defect, Entry, annotation_defects, category_problems, image_problem, read_json
from perpixel.data.images import load_image, picture_size
from perpixel.data.loading import DataConfig, find_split
from perpixel.errors import DataError
from perpixel.structures import Size

SPLITS = ("train", "val", "test")
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
    files = _label_files(where)
    defects: list[Defect] = []
    categories: dict[Path, list[tuple[Any, Any]]] = {}
    for images, annotations in files:
        try:
            content = read_json(annotations)
        except DataError as error:
            defects.append(Defect(annotations, str(error).removeprefix(f"{annotations}: ")))
            continue
        defects += _check_file(images, annotations, content, pictures)
        categories[annotations] = sorted((str(c.get("id")), str(c.get("name"))) for c in content["categories"])
    return defects + list(_category_disagreements(categories))


def _label_files(where: str | Path | DataConfig) -> list[tuple[Path, Path]]:
    """Folder and annotation file of every split that is there, pose labels included.

    Raises:
        DataError: there is none at all.
    """
    found: list[tuple[Path, Path]] = []
    first_error: DataError | None = None
    for split in SPLITS:
        for needs in (frozenset[str](), frozenset({"keypoints"})):
            try:
                pair = find_split(where, split, needs)  # type: ignore[arg-type]  # a member of SPLITS
            except DataError as error:
                first_error = first_error or error
                continue
            if pair not in found:
                found.append(pair)
    if not found and first_error is not None:
        raise first_error
    return found


def _check_file(images: Path, file: Path, content: dict[str, list[Entry]], pictures: bool) -> Iterator[Defect]:
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
    missing = set(missing_files(images, [e["file_name"] for e in entries]))
    for i in sorted(missing):
        yield Defect(images / entries[i]["file_name"], "no such picture", entries[i]["id"])
    present = [e for i, e in enumerate(entries) if i not in missing]
    broken: list[Defect] = []
    sizes = {e["id"]: (e["height"], e["width"]) for e in entries if e.get("height")}
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        for entry, (size, defect) in zip(present, pool.map(lambda e: _look(images, e, pictures), present), strict=True):
            if size is not None:
                sizes.setdefault(entry["id"], size)
            broken += [defect] if defect is not None else []
    yield from _check_annotations(file, content, sizes, seen)
    yield from broken


def _look(images: Path, entry: Entry, decode: bool) -> tuple[Size | None, Defect | None]:
    """Size (H, W) of a picture, and what is wrong with it."""
    path = images / entry["file_name"]
    if not decode and entry.get("height"):
        return None, None
    try:
        height, width = load_image(path).shape[1:] if decode else picture_size(path)
    except DataError as error:
        return None, Defect(path, str(error).removeprefix(f"{path}: "), entry["id"])
    if entry.get("height") and (height, width) != (entry["height"], entry["width"]):
        listed = f"{entry['width']} x {entry['height']}"
        problem = f"has {width} x {height} px (EXIF orientation applied), its labels were made for {listed}"
        return (height, width), Defect(path, problem, entry["id"])
    return (height, width), None


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


def _category_disagreements(categories: dict[Path, list[tuple[Any, Any]]]) -> Iterator[Defect]:
    """Splits of one kind of labels whose lists of categories differ."""
    by_kind: dict[str, tuple[Path, list[tuple[Any, Any]]]] = {}
    for file, listed in categories.items():
        kind = "person_keypoints" if file.name.startswith("person_keypoints") else "instances"
        first, expected = by_kind.setdefault(kind, (file, listed))
        if listed != expected:
            mine, theirs = sorted(set(listed) - set(expected)), sorted(set(expected) - set(listed))
            yield Defect(file, f"its categories differ from those of {first}: only here {mine}, only there {theirs}")
