"""Frames of video files and cameras in, video files out, by PyAV (`pip install perpixel[video]`), imported on use."""

from __future__ import annotations

import platform
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from perpixel.errors import ConfigError, DataError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts")
CAMERAS = {"Linux": ("/dev/video{}", "v4l2"), "Darwin": ("{}", "avfoundation"), "Windows": ("video={}", "dshow")}


class Frame(NamedTuple):
    """One picture of a video.

    Args:
        image: uint8 [H, W, 3] RGB, upright.
        time: when it is shown, as a count of `time_base`; None where the file does not say.
        time_base: s.
    """

    image: np.ndarray
    time: int | None
    time_base: Fraction | None


def read_frames(source: str | Path) -> Generator[Frame, None, None]:
    """Frames of a video file, or of "camera:0", one after the other.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: the file or camera cannot be opened or has no picture track. Frames after a damaged place are lost.
    """
    av = _av()
    address, kind = _address(str(source))
    try:
        container = av.open(address, format=kind)
    except (OSError, ValueError, av.FFmpegError) as error:
        raise DataError(
            f"{source}: cannot be opened as a video ({error}); check the name, or convert it to MP4"
        ) from error
    with container:
        if not container.streams.video:
            raise DataError(f"{source}: has no pictures, only sound; give a video")
        try:
            for frame in container.decode(video=0):
                image = np.rot90(frame.to_ndarray(format="rgb24"), k=round(getattr(frame, "rotation", 0) / 90) % 4)
                yield Frame(np.ascontiguousarray(image), frame.pts, frame.time_base)
        except av.FFmpegError as error:
            raise DataError(f"{source}: is damaged ({error}); results end at the frame before") from error


class VideoWriter:
    """An MP4 file that takes pictures of one size; `close` finishes it.

    Args:
        path: of the file.
        rate: frames a second, for frames without a time of their own.
    """

    def __init__(self, path: Path, rate: float = 25.0) -> None:
        self._av = _av()
        self._rate = Fraction(rate).limit_denominator(1000)
        self._container = self._av.open(str(path), "w")
        self._stream: Any = None
        self._last = -1

    def write(self, image: np.ndarray, time: int | None = None, time_base: Fraction | None = None) -> None:
        """Appends a picture, uint8 [H, W, 3] RGB. H.264 wants even sides: an odd last row or column is left out."""
        height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
        if self._stream is None:
            self._stream = self._container.add_stream("h264", rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.codec_context.time_base = time_base or 1 / self._rate
            self._stream.options = {"crf": "20"}
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        frame.time_base = self._stream.codec_context.time_base
        self._last = max(self._last + 1, time if time is not None and time_base is not None else 0)
        frame.pts = self._last
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finishes the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def is_camera(source: str) -> bool:
    """Whether `source` is "camera" or "camera:N"."""
    name, _, number = source.partition(":")
    return name == "camera" and (number == "" or number.isdigit())


def _address(source: str) -> tuple[str, str | None]:
    if not is_camera(source):
        return source, None
    pattern, kind = CAMERAS.get(platform.system(), CAMERAS["Linux"])
    return pattern.format(source.partition(":")[2] or "0"), kind


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError("video: needs the package av; pip install 'perpixel[video]'") from error
    return av
