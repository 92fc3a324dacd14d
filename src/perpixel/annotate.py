"""Detections for files: pictures, folders, patterns, videos and cameras in; annotated copies and one COCO file out.

`predictions.json` is a COCO data set: `images`, `categories`, and `annotations` with a score each, so that it can be
shown and corrected by labeling tools; `annotations` alone is COCO's result format. It is also written when something
stops the work halfway. A picture that cannot be read does not stop the others.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from perpixel import video
from perpixel.data.images import SUFFIXES, load_image
from perpixel.engine.checkpoint import write_text
from perpixel.errors import ConfigError, DataError, PerpixelError
from perpixel.predictor import Predictor
from perpixel.structures import Categories, Detections

WRITABLE = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
QUALITY = 92  # of annotated JPEG files
CHUNK = 32  # pictures that are in memory at once


@dataclass(slots=True)
class Options:
    """How to look and what to write.

    Args:
        threshold, batch_size, scales, flip: as in `Predictor.__call__`.
        pictures: write annotated copies, not the COCO file alone.
        frames: of a video or camera, at most; None: all (a camera: until Ctrl-C).
        style: as in `perpixel.drawing.Style`.
    """

    threshold: float | None = None
    batch_size: int = 4
    scales: Sequence[int] | None = None
    flip: bool = False
    pictures: bool = True
    frames: int | None = None
    style: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class CocoFile:
    """Images, and annotations with scores, as they are found."""

    categories: Categories
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, detections: Detections, **image: Any) -> None:
        """One picture and its rows, under the next free ids."""
        image_id = len(self.images) + 1
        height, width = detections.size
        self.images.append({"id": image_id, **image, "width": width, "height": height})
        for entry in detections.to_coco(image_id):
            area = round(entry["bbox"][2] * entry["bbox"][3], 3)
            self.annotations.append({"id": len(self.annotations) + 1, **entry, "area": area, "iscrowd": 0})

    def write(self, path: Path) -> None:
        """Replaces `path` in one step."""
        names = zip(self.categories.ids, self.categories.names, strict=True)
        categories = [{"id": number, "name": name} for number, name in names]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_text(path, json.dumps(content, ensure_ascii=False))


def annotate(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> CocoFile:
    """Runs a predictor over files.

    Args:
        predictor: what `perpixel.load` gives.
        source: a picture, a folder (searched with its subfolders), a pattern such as "trip/*.jpg", a video, "camera" or
            "camera:1".
        out: folder for `predictions.json` and the annotated copies, which keep their names.
        options: see `Options`.
        report: is told one line a picture, and one every 100 frames.

    Returns:
        what was written to `predictions.json`.

    Raises:
        DataError: nothing to look at; or pictures that cannot be read, at the end, after everything else is done.
        ConfigError: `out` is where the pictures are.
    """
    options = options or Options()
    folder = Path(out)
    coco = CocoFile(predictor.categories)
    is_video = video.is_camera(str(source)) or Path(source).suffix.lower() in video.SUFFIXES
    root, pictures = (Path(), []) if is_video else find_pictures(source)
    if not is_video and options.pictures and folder.resolve() == root.resolve():
        raise ConfigError(f"--out {folder}: is the folder of the pictures, which would be overwritten; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be created ({error.strerror}); choose another folder") from error
    try:
        if is_video:
            _annotate_video(predictor, str(source), folder, options, coco, report)
        else:
            _annotate_pictures(predictor, root, pictures, folder, options, coco, report)
    finally:
        coco.write(folder / "predictions.json")
    return coco


def find_pictures(source: str | Path) -> tuple[Path, list[Path]]:
    """The folder that a source speaks of and the pictures in it, sorted.

    Raises:
        DataError: there are none.
    """
    path = Path(source)
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        expected = f"pictures ({', '.join(SUFFIXES)})"
    elif path.is_file():
        return path.parent, [path]
    elif glob.has_magic(str(source)):
        fixed = path.parts[: next(i for i, p in enumerate(path.parts) if glob.has_magic(p))]
        root, found = Path(*fixed), [Path(p) for p in glob.glob(str(source), recursive=True) if Path(p).is_file()]
        expected = "files"
    else:
        raise DataError(f"{source}: no such file or folder; give a picture, a folder, a pattern in quotes, or a video")
    if not found:
        raise DataError(f"{source}: expected {expected}, found none")
    return root, sorted(found)


def _annotate_pictures(
    predictor: Predictor,
    root: Path,
    pictures: list[Path],
    out: Path,
    options: Options,
    coco: CocoFile,
    report: Callable[[str], None],
) -> None:
    failures: list[PerpixelError] = []
    names = iter(pictures)
    while chunk := list(islice(names, CHUNK)):
        loaded = list(_readable(chunk, failures, report))
        found = predictor(
            [image for _, image in loaded],
            threshold=options.threshold,
            batch_size=options.batch_size,
            scales=options.scales,
            flip=options.flip,
        )
        for (path, image), detections in zip(loaded, found, strict=True):
            name = path.relative_to(root)
            coco.add(detections, file_name=name.as_posix())
            if options.pictures:
                _save(detections.draw(image, **options.style), out / name)
            report(f"{path}: {summary(detections)}")
    if failures:
        many = f"{len(failures)} of {len(pictures)} pictures cannot be read; the first: " if len(pictures) > 1 else ""
        raise DataError(f"{many}{failures[0]}")


def _readable(
    paths: list[Path], failures: list[PerpixelError], report: Callable[[str], None]
) -> Iterator[tuple[Path, Any]]:
    for path in paths:
        try:
            yield path, load_image(path)
        except DataError as error:
            failures.append(error)
            report(f"skipped: {error}")


def _save(picture: Any, path: Path) -> None:
    if path.suffix.lower() not in WRITABLE:
        path = path.with_name(path.name + ".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=QUALITY)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error


def _annotate_video(
    predictor: Predictor, source: str, out: Path, options: Options, coco: CocoFile, report: Callable[[str], None]
) -> None:
    name = "camera.mp4" if video.is_camera(source) else Path(source).with_suffix(".mp4").name
    if not video.is_camera(source) and not Path(source).is_file():
        raise DataError(f"{source}: no such video; check the name and the folder")
    if Path(source).exists() and (out / name).resolve() == Path(source).resolve():
        raise ConfigError(f"--out {out}: the annotated video would replace its source; choose another folder")
    writer = video.VideoWriter(out / name) if options.pictures else None
    try:
        with closing(video.read_frames(source)) as frames:
            _write_frames(predictor, islice(frames, options.frames), name, writer, options, coco, report)
    finally:
        if writer is not None:
            writer.close()


def _write_frames(
    predictor: Predictor,
    frames: Iterator[video.Frame],
    name: str,
    writer: video.VideoWriter | None,
    options: Options,
    coco: CocoFile,
    report: Callable[[str], None],
) -> None:
    waiting: list[video.Frame] = []

    def images() -> Iterator[np.ndarray]:
        for frame in frames:
            waiting.append(frame)
            yield frame.image

    stream = predictor.stream(
        images(),
        threshold=options.threshold,
        batch_size=options.batch_size,
        scales=options.scales,
        flip=options.flip,
    )
    for index, detections in enumerate(stream):
        frame = waiting.pop(0)
        coco.add(detections, file_name=name, frame=index)
        if writer is not None:
            picture = detections.draw(frame.image, **options.style)
            writer.write(np.asarray(picture), frame.time, frame.time_base)
        if index % 100 == 0:
            report(f"{name}, frame {index}: {summary(detections)}")


def summary(detections: Detections) -> str:
    """Counts by class: "2 dog, 1 cat"."""
    counts: dict[str, int] = {}
    for name in detections.names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
