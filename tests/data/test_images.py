"""Every kind of picture becomes the RGB that a viewer shows; broken ones are one clear error, at little cost."""

import io
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from perpixel.data.images import MAX_PIXELS, fit_size, load_image, picture_size, resize_for_test
from perpixel.errors import DataError, ShapeError


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((80, 60), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_jpeg_equals_pil_bit_for_bit(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.jpg", quality=80)
    assert torch.equal(load_image(tmp_path / "a.jpg"), as_tensor(Image.open(tmp_path / "a.jpg")))


def test_real_pictures_equal_pil(shared: Path) -> None:
    for path in sorted((shared / "data/coco-mini/val").glob("*.jpg"))[:12]:  # grey ones among them
        assert torch.equal(load_image(path), as_tensor(ImageOps.exif_transpose(Image.open(path))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(photo: Image.Image, tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    photo.save(path, exif=exif)
    expected = as_tensor(ImageOps.exif_transpose(Image.open(path)))
    assert torch.equal(load_image(path), expected)
    assert torch.equal(load_image(Image.open(path)), expected)
    assert picture_size(path) == tuple(expected.shape[1:])


def test_grey_palette_and_bilevel_become_rgb(photo: Image.Image, tmp_path: Path) -> None:
    for mode in ("L", "P", "1"):
        photo.convert(mode).save(tmp_path / "a.png")
        assert torch.equal(load_image(tmp_path / "a.png"), as_tensor(photo.convert(mode)))


def test_cmyk_jpeg_has_the_colors_of_the_original(photo: Image.Image, tmp_path: Path) -> None:
    photo.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    difference = (load_image(tmp_path / "a.jpg").int() - as_tensor(photo).int()).abs().float().mean()
    assert difference < 8


def test_16_bit_grey_keeps_its_gradation(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(values).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert torch.equal(loaded[0, 0].int(), torch.arange(256, dtype=torch.int32))
    assert torch.equal(loaded[0], loaded[2])


def test_float_picture_spans_black_to_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-2.0, 0.0, 2.0]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif")[1].tolist() == [[0, 128, 255]]


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    from_file = load_image(tmp_path / "a.png").permute(1, 2, 0)[0].tolist()
    assert from_file[:2] == [[200, 0, 0], [255, 255, 255]]
    assert from_file[2] == pytest.approx([227, 127, 127], abs=1)
    from_array = load_image(pixels).permute(1, 2, 0)[0].tolist()
    assert from_array[:2] == from_file[:2]
    assert from_array[2] == pytest.approx(from_file[2], abs=1)


def test_arrays_tensors_and_pil_give_the_same_picture(photo: Image.Image) -> None:
    expected = as_tensor(photo)
    array = np.array(photo)
    for source in (photo, array, expected, array[:, ::-1][:, ::-1]):
        assert torch.equal(load_image(source), expected)
    grey = np.array(photo.convert("L"))
    for source in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert torch.equal(load_image(source), as_tensor(photo.convert("L")))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(4, 4, 3, 1, dtype=torch.uint8),
        torch.zeros(5, 4, 4, dtype=torch.uint8),
    ],
)
def test_wrong_arrays_are_refused_with_what_came(wrong: object) -> None:
    with pytest.raises(ShapeError, match=r"picture: expected a uint8 (array \[H, W, 3\]|tensor \[3, H, W\]) RGB.*got"):
        load_image(wrong)  # type: ignore[arg-type]


def test_reduced_decoding_keeps_the_size_asked_for_and_the_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    small.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    reduced = load_image(tmp_path / "a.jpg", at_least=(250, 333))
    assert reduced.shape == (3, 300, 400)
    whole = resize_for_test(load_image(tmp_path / "a.jpg"), 240, 1000)
    again = resize_for_test(reduced, 240, 1000)
    assert (whole.int() - again.int()).abs().float().mean() < 1.0
    assert load_image(tmp_path / "a.jpg", at_least=(700, 900)).shape == (3, 1200, 1600)


def bomb(path: Path, side: int = 30000) -> Path:
    """A valid black PNG of side x side pixels in about 100 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_a_png_bomb_is_refused_fast_and_in_little_memory(tmp_path: Path) -> None:
    for side in (30000, 12500):  # the second one is below the limit at which PIL itself refuses
        path = bomb(tmp_path / "bomb.png", side)
        memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with pytest.raises(DataError, match=rf"bomb.png: expected at most {MAX_PIXELS:,} pixels"):
            load_image(path)
        assert time.perf_counter() - start < 0.5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # kB


def test_broken_files_name_themselves(photo: Image.Image, tmp_path: Path) -> None:
    whole = io.BytesIO()
    photo.save(whole, "JPEG")
    png = io.BytesIO()
    photo.save(png, "PNG")
    cases = {
        "text.jpg": b"not a picture at all",
        "empty.png": b"",
        "cut.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "cut.png": png.getvalue()[: len(png.getvalue()) // 2],
        "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(DataError, match="no such picture"):
        load_image(tmp_path / "absent.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(DataError, match="kind"):
        picture_size(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="no such picture"):
        picture_size(tmp_path / "absent.jpg")


def test_a_picture_with_broken_exif_is_shown_unturned(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert load_image(tmp_path / "a.jpg").shape == (3, 60, 80)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((300, 1000), 800, 1333, (400, 1333)),  # the cap rules: 300 * 1.333 = 399.9
        ((640, 480), 320, 1333, (427, 320)),  # 426.67
        ((1, 5000), 320, 640, (1, 640)),  # never an empty side
    ],
)
def test_short_side_rules_unless_the_long_one_passes_the_cap(
    size: tuple[int, int], short: int, longest: int, expected: tuple[int, int]
) -> None:
    assert fit_size(size, short, longest) == expected
    image = torch.zeros(3, *size, dtype=torch.uint8)
    assert tuple(resize_for_test(image, short, longest).shape) == (3, *expected)
