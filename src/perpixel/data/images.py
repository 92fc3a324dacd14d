"""Pictures from files, PIL, arrays or tensors as uint8 [3, H, W] RGB, the way a viewer would show them.

EXIF orientation is applied; grey, palette, CMYK, 16-bit and transparent pictures become 8-bit RGB (transparent parts
white). What cannot be a picture, is cut off, or would need absurd memory is a `DataError` that names the file.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from perpixel.errors import DataError, ShapeError
from perpixel.structures import Size

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor"

# Formats that PIL decodes by itself; PostScript and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "QOI")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
MAX_PIXELS = 150_000_000  # largest picture, px; 450 MB as RGB
ORIENTATION = 0x0112  # the EXIF tag
# What EXIF orientations 1 to 8 ask for: are rows and columns exchanged, and which axes of [3, H, W] are mirrored then.
TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()),
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


def load_image(source: Picture, at_least: Size | None = None) -> Tensor:
    """A picture as uint8 [3, H, W] RGB. Its rows lie in memory as H, W, 3, which resizing is fastest on.

    Args:
        source: path, PIL image, uint8 array [H, W], [H, W, 1 | 3 | 4], or uint8 tensor [1 | 3 | 4, H, W]. Arrays and
            tensors are RGB (not BGR) and are taken as they are, without a copy where possible.
        at_least: (H, W) px. A JPEG file may then be decoded at 1/2, 1/4 or 1/8 of its size as long as neither side
            falls below this; several times faster for photographs that are made small anyway.

    Raises:
        DataError: the file is missing, is not a picture, is cut off, or has more than `MAX_PIXELS` pixels.
        ShapeError: an array or tensor of another shape or dtype.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source, "uint8 tensor [3, H, W]", source.dtype, source.shape)
    if isinstance(source, np.ndarray):
        rows = np.ascontiguousarray(source)  # torch knows no negative strides, which array[..., ::-1] has
        planes = torch.from_numpy(rows) if rows.dtype == np.uint8 else torch.empty(0)
        planes = planes[None] if source.ndim == 2 else planes.movedim(-1, 0)
        return _from_tensor(planes, "uint8 array [H, W, 3]", source.dtype, source.shape)
    if isinstance(source, Image.Image):
        return _turn(_pixels(source, "picture"), _orientation(source))
    return _read(Path(source), at_least)


def picture_size(path: Path) -> Size:
    """(H, W) in px as `load_image` would give it, from the head of the file alone.

    Raises:
        DataError: as `load_image`, except for defects further on in the file.
    """
    try:
        with open(path, "rb") as file, _open(file, path) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except OSError as error:
        raise _unreadable(path, error) from error


def fit_size(size: Size, short_side: int, max_size: int) -> Size:
    """(H, W) that a picture of `size` is resized to: the shorter side becomes `short_side` px unless the longer one
    would pass `max_size` px; rounded to the nearest, as in the authors' release."""
    scale = min(short_side / min(size), max_size / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize(image: Tensor, size: Size) -> Tensor:
    """The picture [3, h, w] at `size` (H, W), bilinear with anti-aliasing; the very image if that is its size."""
    if tuple(image.shape[-2:]) == size:
        return image
    resized: Tensor = tvf.resize(image, list(size), antialias=True)
    return resized


def resize_for_test(image: Tensor, short_side: int, max_size: int) -> Tensor:
    """A picture [3, h, w] with its shorter side at `short_side` px and its longer side at most `max_size` px."""
    height, width = image.shape[-2:]
    return resize(image, fit_size((height, width), short_side, max_size))


def _from_tensor(value: Tensor, expected: str, dtype: Any, shape: Sequence[int]) -> Tensor:
    """Three color planes from `value`; `dtype` and `shape` are what the user gave, for the message."""
    if value.dtype != torch.uint8 or value.ndim != 3 or value.shape[0] not in (1, 3, 4) or 0 in value.shape:
        raise ShapeError(
            f"picture: expected a {expected} RGB, values 0 to 255, got {dtype} {list(shape)}; "
            "convert it, or give a path"
        )
    if value.shape[0] == 1:
        return value.expand(3, -1, -1)
    if value.shape[0] == 4:
        alpha = value[3:].int()
        return ((value[:3].int() * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    return value


def _read(path: Path, at_least: Size | None) -> Tensor:
    try:
        with open(path, "rb") as file, _open(file, path) as image:
            orientation = _orientation(image)
            whole = image.size
            if at_least is not None:
                height, width = at_least if orientation < 5 else at_least[::-1]
                image.draft(None, (width, height))
            # Twice as fast as PIL and equal to it, bit for bit. PIL accepts more, and says better what is wrong.
            fast = image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == whole
            pixels = _fast_jpeg(file) if fast else None
            return _turn(_pixels(image, path) if pixels is None else pixels, orientation)
    except OSError as error:
        raise _unreadable(path, error) from error


def _fast_jpeg(file: IO[bytes]) -> Tensor | None:
    """Pixels of a whole JPEG file, or None where this decoder refuses it."""
    file.seek(0)
    try:
        decoded: Tensor = decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None
    return decoded


def _open(file: IO[bytes], path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pixel counts (our own limit rules) and on broken EXIF
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise DataError(
            f"{path}: expected at most {MAX_PIXELS:,} pixels, got more than 178,000,000; make the picture smaller"
        ) from None
    except Exception as error:  # parsers of broken files raise almost anything
        raise _unreadable(path, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{path}: expected at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}; "
            "make the picture smaller"
        )
    return image


def _unreadable(path: Path | str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such picture; check the name and the folder")
    if isinstance(error, Image.UnidentifiedImageError):
        return DataError(f"{path}: expected a picture, got a file of another kind; remove or replace it")
    return DataError(f"{path}: cannot be read as a picture ({error or type(error).__name__}); replace the file")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where the tag is absent or the EXIF block is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # as in _open; a viewer shows such pictures unturned
        return 1
    return value if value in TURNS else 1


def _pixels(image: Image.Image, name: Path | str) -> Tensor:
    """uint8 [3, H, W] RGB of an opened picture, not turned."""
    try:
        return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
    except Exception as error:  # as in _open
        raise _unreadable(name, error) from error


def _turn(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels [3, h, w] as EXIF wants them shown: sides exchanged first, then mirrored along the named axes."""
    exchanged, mirrored = TURNS[orientation]
    if exchanged:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(mirrored) if mirrored else pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # no nominal range: from the darkest to the brightest pixel
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        span = max(float(np.ptp(values)), 1e-12)
        return Image.fromarray(((values - values.min()) / span * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
