"""Predicting on files: what is found, what is written, and what survives when something is broken."""

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perpixel import video
from perpixel.annotate import Options, annotate, find_pictures, summary
from perpixel.errors import CheckpointError, ConfigError, DataError
from perpixel.structures import Categories, Detections

CLASSES = Categories(("ball", "box"), (3, 8))


class Stub:
    """Sees one box in every picture, as wide as the picture's brightness says, and remembers how it was asked."""

    categories = CLASSES

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, images: list[torch.Tensor], **options: Any) -> list[Detections]:
        self.asked.append(options)
        return [self._see(image) for image in images]

    def stream(self, images: Any, **options: Any) -> Any:
        self.asked.append(options)
        for image in images:
            yield self._see(torch.as_tensor(image).permute(2, 0, 1))

    def _see(self, image: torch.Tensor) -> Detections:
        height, width = image.shape[1:]
        right = float(image.float().mean()) / 255 * width
        return Detections(
            size=(height, width),
            boxes=torch.tensor([[0.0, 2, right, 12]]),
            scores=torch.tensor([0.75]),
            labels=torch.tensor([1]),
            categories=CLASSES,
        )


def write_picture(path: Path, value: int = 128, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return path


def read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "predictions.json").read_text())
    return content


def test_a_folder_gives_annotated_copies_and_one_coco_file(tmp_path: Path) -> None:
    write_picture(tmp_path / "in/a.jpg", 51)
    write_picture(tmp_path / "in/sub/b.PNG", 255)
    write_picture(tmp_path / "in/c.gif", 0)
    (tmp_path / "in/notes.txt").write_text("not a picture")
    stub, lines = Stub(), []
    annotate(stub, tmp_path / "in", tmp_path / "out", report=lines.append)  # type: ignore[arg-type]
    content = read(tmp_path / "out")
    assert [i["file_name"] for i in content["images"]] == ["a.jpg", "c.gif", "sub/b.PNG"]
    assert content["images"][0] == {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
    assert content["categories"] == [{"id": 3, "name": "ball"}, {"id": 8, "name": "box"}]
    first = content["annotations"][0]
    assert first["bbox"] == pytest.approx([0, 2, 8, 10], abs=0.2)
    assert first["area"] == pytest.approx(80, abs=2)
    assert (first["image_id"], first["category_id"], first["score"], first["iscrowd"]) == (1, 8, 0.75, 0)
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3]
    drawn = np.asarray(Image.open(tmp_path / "out/sub/b.PNG"))
    assert drawn.shape == (30, 40, 3)
    assert (drawn != 255).any()
    assert (tmp_path / "out/c.gif.png").is_file()  # a format that is not written
    assert lines[0] == f"{tmp_path}/in/a.jpg: 1 box"


def test_one_picture_and_a_pattern(tmp_path: Path) -> None:
    write_picture(tmp_path / "trip 1/a.jpg")
    write_picture(tmp_path / "trip 2/b.jpg")
    annotate(Stub(), tmp_path / "trip 1/a.jpg", tmp_path / "one")  # type: ignore[arg-type]
    assert (tmp_path / "one/a.jpg").is_file()
    annotate(Stub(), f"{tmp_path}/trip*/*.jpg", tmp_path / "two")  # type: ignore[arg-type]
    assert [i["file_name"] for i in read(tmp_path / "two")["images"]] == ["trip 1/a.jpg", "trip 2/b.jpg"]
    assert (tmp_path / "two/trip 2/b.jpg").is_file()


def test_options_reach_the_predictor_and_the_drawing(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    stub = Stub()
    options = Options(threshold=0.6, batch_size=2, scales=[100], flip=True, pictures=False)
    annotate(stub, tmp_path / "a.png", tmp_path / "out", options)  # type: ignore[arg-type]
    assert stub.asked == [{"threshold": 0.6, "batch_size": 2, "scales": [100], "flip": True}]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.json"]
    annotate(Stub(), tmp_path / "a.png", tmp_path / "plain", Options(style={"show_labels": False}))  # type: ignore[arg-type]
    annotate(Stub(), tmp_path / "a.png", tmp_path / "named")  # type: ignore[arg-type]
    assert (tmp_path / "plain/a.png").read_bytes() != (tmp_path / "named/a.png").read_bytes()


def test_a_broken_picture_does_not_stop_the_others(tmp_path: Path) -> None:
    write_picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/b.jpg").write_bytes((tmp_path / "in/a.jpg").read_bytes()[:200])
    write_picture(tmp_path / "in/c.jpg")
    with pytest.raises(DataError, match=r"1 of 3 pictures cannot be read; the first: .*b\.jpg"):
        annotate(Stub(), tmp_path / "in", tmp_path / "out")  # type: ignore[arg-type]
    assert [i["file_name"] for i in read(tmp_path / "out")["images"]] == ["a.jpg", "c.jpg"]
    with pytest.raises(DataError, match=r"^\S+b\.jpg"):
        annotate(Stub(), tmp_path / "in/b.jpg", tmp_path / "one")  # type: ignore[arg-type]


def test_what_was_found_is_written_when_work_stops_halfway(tmp_path: Path) -> None:
    for i in range(40):
        write_picture(tmp_path / f"in/{i:02}.png")

    class Tired(Stub):
        def __call__(self, images: list[torch.Tensor], **options: Any) -> list[Detections]:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(images, **options)

    with pytest.raises(KeyboardInterrupt):
        annotate(Tired(), tmp_path / "in", tmp_path / "out")  # type: ignore[arg-type]
    assert len(read(tmp_path / "out")["images"]) == 32


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    write_picture(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"a\.png: cannot be written \(No space left on device\)"):
        annotate(Stub(), tmp_path / "a.png", tmp_path / "out")  # type: ignore[arg-type]
    assert read(tmp_path / "out")["annotations"]
    (tmp_path / "out2/predictions.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        annotate(Stub(), tmp_path / "a.png", tmp_path / "out2")  # type: ignore[arg-type]


def test_sources_are_never_overwritten(tmp_path: Path) -> None:
    before = write_picture(tmp_path / "a.png").read_bytes()
    with pytest.raises(ConfigError, match="would be overwritten"):
        annotate(Stub(), tmp_path / "a.png", tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "a.png").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created"):
        annotate(Stub(), tmp_path / "a.png", tmp_path / "file")  # type: ignore[arg-type]


def test_sources_that_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jpg: no such file or folder"):
        find_pictures(tmp_path / "nope.jpg")
    with pytest.raises(DataError, match="expected pictures"):
        find_pictures(tmp_path)
    with pytest.raises(DataError, match=r"\*\.jpg: expected files, found none"):
        find_pictures(f"{tmp_path}/*.jpg")


def test_summary_counts_by_class() -> None:
    rows = Detections(
        size=(4, 4),
        boxes=torch.zeros(3, 4),
        scores=torch.ones(3),
        labels=torch.tensor([1, 0, 1]),
        categories=CLASSES,
    )
    assert summary(rows) == "2 box, 1 ball"
    assert summary(rows[:0]) == "nothing"


def write_video(path: Path, count: int = 6, size: tuple[int, int] = (48, 64)) -> Path:
    """Frames that grow brighter, 40 levels each."""
    writer = video.VideoWriter(path, rate=10)
    for i in range(count):
        writer.write(np.full((*size, 3), 40 * i % 256, np.uint8))
    writer.close()
    return path


def test_a_video_gives_an_annotated_video_and_a_row_a_frame(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4")
    lines: list[str] = []
    annotate(Stub(), tmp_path / "clip.mp4", tmp_path / "out", report=lines.append)  # type: ignore[arg-type]
    content = read(tmp_path / "out")
    assert [(i["file_name"], i["frame"]) for i in content["images"]] == [("clip.mp4", i) for i in range(6)]
    widths = [a["bbox"][2] for a in content["annotations"]]
    assert widths == pytest.approx([64 * 40 * i / 255 for i in range(6)], abs=1.5)
    original, drawn = (list(video.read_frames(p)) for p in (tmp_path / "clip.mp4", tmp_path / "out/clip.mp4"))
    assert [f.image.shape for f in drawn] == [(48, 64, 3)] * 6
    seconds = [[float(f.time * f.time_base) for f in frames] for frames in (original, drawn)]  # type: ignore[operator]
    assert seconds[0] == pytest.approx(seconds[1], abs=1e-3)
    assert np.abs(drawn[5].image.astype(int) - original[5].image).max() > 50  # the box
    assert lines == ["clip.mp4, frame 0: 1 box"]


def test_a_video_can_be_cut_short_and_left_undrawn(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4")
    annotate(Stub(), tmp_path / "clip.mp4", tmp_path / "out", Options(frames=2, pictures=False))  # type: ignore[arg-type]
    assert len(read(tmp_path / "out")["images"]) == 2
    assert not (tmp_path / "out/clip.mp4").exists()


def test_odd_sides_lose_their_last_row_and_times_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("av")
    writer = video.VideoWriter(tmp_path / "odd.mp4")
    for time in (0, 900, 4500):
        writer.write(np.zeros((33, 47, 3), np.uint8), time, Fraction(1, 9000))
    writer.close()
    frames = list(video.read_frames(tmp_path / "odd.mp4"))
    assert [f.image.shape for f in frames] == [(32, 46, 3)] * 3
    assert [float(f.time * f.time_base) for f in frames] == pytest.approx([0, 0.1, 0.5], abs=1e-3)  # type: ignore[operator]


def test_videos_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"broken\.mp4: cannot be opened as a video"):
        annotate(Stub(), tmp_path / "broken.mp4", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"gone\.mp4: no such video"):
        annotate(Stub(), tmp_path / "gone.mp4", tmp_path / "out")  # type: ignore[arg-type]
    write_video(tmp_path / "clip.mp4")
    with pytest.raises(ConfigError, match="would replace its source"):
        annotate(Stub(), tmp_path / "clip.mp4", tmp_path)  # type: ignore[arg-type]


def test_a_damaged_video_keeps_the_frames_before_the_damage(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "whole.ts", count=60)
    data = (tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[: len(data) // 2])
    annotate(Stub(), tmp_path / "cut.ts", tmp_path / "out")  # type: ignore[arg-type]
    assert 0 < len(read(tmp_path / "out")["images"]) < 60


def test_cameras_are_addressed_by_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert video.is_camera("camera")
    assert video.is_camera("camera:2")
    assert not video.is_camera("camera.mp4")
    monkeypatch.setattr(video.platform, "system", lambda: "Linux")
    assert video._address("camera:2") == ("/dev/video2", "v4l2")
    assert video._address("camera") == ("/dev/video0", "v4l2")
    monkeypatch.setattr(video.platform, "system", lambda: "Darwin")
    assert video._address("camera:1") == ("1", "avfoundation")
    pytest.importorskip("av")
    monkeypatch.setattr(video.platform, "system", lambda: "Linux")
    with pytest.raises(DataError, match="camera:99: cannot be opened"):
        annotate(Stub(), "camera:99", tmp_path / "out")  # type: ignore[arg-type]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'perpixel\[video\]'"):
        video.VideoWriter(tmp_path / "a.mp4")
