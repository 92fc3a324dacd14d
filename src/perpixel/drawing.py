"""Boxes, masks, keypoints and labels drawn on a picture.

Every class has its own color. Lines carry a dark rim and labels a filled background, so that both can be read on light
and on dark ground; line width and letter height follow the size of the picture. Labels keep out of each other's way.
Imports nothing heavy: arrays and tensors are taken as they come, pictures are drawn by Pillow.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from perpixel.errors import DataError, ShapeError

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

RIM: Color = (16, 16, 16)
GOLDEN = 0.6180339887498949  # successive hues never cluster, however many classes there are
SHADES = (
    (0.95, 1.0),
    (0.62, 1.0),
    (0.9, 0.72),
    (0.42, 1.0),
)  # (saturation, value), changing with every turn of the hue
DARKEST = 0.14  # least relative luminance of a class color


@dataclass(frozen=True, slots=True)
class Style:
    """How things look. Lengths are px of the picture; None follows its size.

    Args:
        line_width: of box sides and limbs. Default: 1/320 of the picture's mean side, at least 1.
        font_size: letter height. Default: 1/42 of the picture's mean side, at least 11.
        mask_opacity: 0 (invisible) to 1 (opaque).
        show_labels: write names and scores.
        color_by: "class", or "object" to tell objects of one class apart.
        keypoint_threshold: keypoints whose third value (score or visibility) is not above it are left out.
        scale: the picture is enlarged by this factor before anything is drawn; for very small pictures.
    """

    line_width: int | None = None
    font_size: int | None = None
    mask_opacity: float = 0.4
    show_labels: bool = True
    color_by: str = "class"
    keypoint_threshold: float = 0.0
    scale: float = 1.0


def draw(
    image: Any,
    *,
    boxes: Any,
    labels: Any,
    names: Sequence[str],
    scores: Any = None,
    masks: Any = None,
    keypoints: Any = None,
    skeletons: Sequence[Any] | None = None,
    **style: Any,
) -> Image.Image:
    """A copy of the picture with its objects drawn on it.

    Args:
        image: path, PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W].
        boxes: [N, 4] xyxy, px of the picture.
        labels: [N] class indices; they choose the color.
        names: N class names, one a row.
        scores: [N] in 0..1, written behind the name.
        masks: bool [N, H, W], or a list of N COCO run-length dicts.
        keypoints: [N, K, 3]: x, y in px and a score (or COCO's visibility).
        skeletons: per class, something with `.limbs` (pairs of keypoint indices), or None.
        **style: fields of `Style`.

    Returns:
        An RGB picture of the same size (times `scale`).

    Raises:
        DataError: the picture cannot be read.
        ShapeError: rows or sizes do not agree.
    """
    look = _style(style)
    picture = as_picture(image)
    rows = _Rows.read(boxes, labels, names, scores, masks, keypoints, picture.size)
    if look.scale != 1.0:
        picture, rows = _enlarged(picture, rows, look.scale)
    side = (picture.width * picture.height) ** 0.5
    width = look.line_width or max(1, round(side / 320))
    colors = [color_of(key) for key in (rows.labels if look.color_by == "class" else range(len(rows)))]

    order = _largest_first(rows)
    if rows.masks is not None:
        picture = _paint_masks(picture, rows.masks, colors, order, look.mask_opacity, width)
    canvas = ImageDraw.Draw(picture)
    for i in order:
        _draw_box(canvas, rows.boxes[i], colors[i], width, picture.size)
    if rows.keypoints is not None:
        for i in order:
            limbs = _limbs(skeletons, rows.labels[i])
            _draw_keypoints(canvas, rows.keypoints[i], limbs, colors[i], width, look.keypoint_threshold)
    if look.show_labels:
        _draw_labels(canvas, rows, colors, width, look.font_size or max(11, round(side / 42)), picture.size)
    return picture


def color_of(index: int) -> Color:
    """The RGB color (0..255) of class `index`: neighbors in the list differ most, no two of the first 100 are equal,
    and none is so dark that it sinks into a black picture."""
    hue = (0.03 + index * GOLDEN) % 1.0
    saturation, value = SHADES[(index // 8) % len(SHADES)]
    rgb = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    while _luminance(rgb) < DARKEST:
        rgb += 0.05 * (1.0 - rgb)
    red, green, blue = (round(255 * float(c)) for c in rgb)
    return red, green, blue


def as_picture(image: Any) -> Image.Image:
    """A new RGB picture, upright, from a path, PIL image, uint8 array [H, W, 3] or [H, W], or uint8 tensor [3, H, W].

    Raises:
        DataError: the file is missing or is not a picture.
        ShapeError: an array or tensor of another shape or type.
    """
    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                return _rgb(opened)
        except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            raise DataError(f"{os.fspath(image)}: expected a picture, but it cannot be read ({error})") from error
    if isinstance(image, Image.Image):
        return _rgb(image)
    array = _array(image)
    if hasattr(image, "detach") and array.ndim == 3 and array.shape[0] in (1, 3):  # a tensor: channels come first
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise ShapeError(
            f"image: expected a path, a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], "
            f"got {array.dtype} {list(array.shape)}"
        )
    gray = array.ndim == 2 or array.shape[2] == 1
    rgb = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2) if gray else array
    return Image.fromarray(np.ascontiguousarray(rgb))


def _rgb(picture: Image.Image) -> Image.Image:
    """Upright RGB, by the rules that the network's input is made by: 16 bits are scaled, wider types stretched from
    their darkest to their brightest pixel, transparent parts are white."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8)).convert("RGB")
    if upright.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(upright, dtype=np.float64), posinf=0, neginf=0)
        span = max(float(np.ptp(values)), 1e-12)
        return Image.fromarray(((values - values.min()) / span * 255).round().astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright.convert("RGB") if upright.mode != "RGB" else upright.copy()


def _style(given: dict[str, Any]) -> Style:
    known = Style.__dataclass_fields__
    for name in given:
        if name not in known:
            raise ShapeError(f"draw: unknown style {name!r}; known: {', '.join(known)}")
    look = Style(**given)
    if look.color_by not in ("class", "object"):
        raise ShapeError(f"draw: color_by: expected 'class' or 'object', got {look.color_by!r}")
    return look


@dataclass(slots=True)
class _Rows:
    """The checked input as numpy arrays; row i is object i."""

    boxes: np.ndarray  # float64 [N, 4]
    labels: list[int]
    texts: list[str]
    scores: np.ndarray  # float64 [N], descending importance; ones without scores
    masks: list[np.ndarray] | None  # bool [H, W] each
    keypoints: np.ndarray | None  # float64 [N, K, 3]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def read(
        cls, boxes: Any, labels: Any, names: Any, scores: Any, masks: Any, keypoints: Any, size: tuple[int, int]
    ) -> _Rows:
        box_rows = _array(boxes).astype(np.float64).reshape(-1, 4)
        count = len(box_rows)
        given = {"labels": labels, "names": names, "scores": scores, "masks": masks, "keypoints": keypoints}
        for name, value in given.items():
            if value is not None and len(value) != count:
                raise ShapeError(f"draw: {name}: expected {count} rows, one for each box, got {len(value)}")
        values = np.ones(count) if scores is None else _array(scores).astype(np.float64)
        texts = [str(name) for name in names]
        if scores is not None:
            texts = [f"{text} {score:.2f}" for text, score in zip(texts, values, strict=True)]
        return cls(
            boxes=box_rows,
            labels=[int(label) for label in _array(labels)],
            texts=texts,
            scores=values,
            masks=None if masks is None else _mask_rows(masks, size),
            keypoints=None if keypoints is None else _array(keypoints).astype(np.float64).reshape(count, -1, 3),
        )


def _mask_rows(masks: Any, size: tuple[int, int]) -> list[np.ndarray]:
    if len(masks) and isinstance(masks[0], dict):
        from perpixel.rle import decode

        masks = decode(masks)
    rows = [_array(mask).astype(bool) for mask in masks]
    for i, mask in enumerate(rows):
        if mask.shape != (size[1], size[0]):
            raise ShapeError(
                f"draw: mask {i}: expected [{size[1]}, {size[0]}], the size of the picture, got {list(mask.shape)}"
            )
    return rows


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _enlarged(picture: Image.Image, rows: _Rows, factor: float) -> tuple[Image.Image, _Rows]:
    """Picture and coordinates times `factor`."""
    width, height = (max(1, round(side * factor)) for side in picture.size)
    sx, sy = width / picture.width, height / picture.height
    rows.boxes = rows.boxes * [sx, sy, sx, sy]
    if rows.keypoints is not None:
        rows.keypoints = rows.keypoints * [sx, sy, 1.0]
    if rows.masks is not None:
        nearest = Image.Resampling.NEAREST
        rows.masks = [np.asarray(Image.fromarray(m).resize((width, height), nearest)) for m in rows.masks]
    return picture.resize((width, height), Image.Resampling.BICUBIC), rows


def _largest_first(rows: _Rows) -> list[int]:
    """Drawable rows, so that small objects end up on top of large ones."""
    area = (rows.boxes[:, 2] - rows.boxes[:, 0]) * (rows.boxes[:, 3] - rows.boxes[:, 1])
    order = np.argsort(-np.nan_to_num(area), kind="stable")
    return [int(i) for i in order if np.isfinite(rows.boxes[i]).all()]


def _paint_masks(
    picture: Image.Image, masks: list[np.ndarray], colors: list[Color], order: list[int], opacity: float, width: int
) -> Image.Image:
    """Masks as a tint with an outline; the work is done in the window that each mask occupies."""
    pixels = np.array(picture)
    for i in order:
        ys, xs = np.flatnonzero(masks[i].any(1)), np.flatnonzero(masks[i].any(0))
        if not len(ys):
            continue
        window = np.s_[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        mask, part = masks[i][window], pixels[window]
        color = np.array(colors[i], dtype=np.float32)
        part[mask] = (part[mask] * (1 - opacity) + color * opacity).astype(np.uint8)
        inner = _eroded(mask, max(1, width // 2))
        part[mask & ~inner] = color.astype(np.uint8)
    return Image.fromarray(pixels)


def _eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of `mask` [H, W] that are more than `distance` px from everything outside, along rows and columns."""
    padded = np.pad(mask, distance)
    result = mask.copy()
    height, width = mask.shape
    for shift in range(1, distance + 1):
        for dy, dx in ((shift, 0), (-shift, 0), (0, shift), (0, -shift)):
            top, left = distance + dy, distance + dx
            result &= padded[top : top + height, left : left + width]
    return result


def _draw_box(canvas: ImageDraw.ImageDraw, box: np.ndarray, color: Color, width: int, size: tuple[int, int]) -> None:
    x0, y0, x1, y1 = _pixels(box, size)
    rim = max(1, width // 3)
    canvas.rectangle((x0 - rim, y0 - rim, x1 + rim, y1 + rim), outline=RIM, width=width + 2 * rim)
    canvas.rectangle((x0, y0, x1, y1), outline=color, width=width)


def _pixels(box: np.ndarray, size: tuple[int, int]) -> Box:
    """First and last pixel of a box in x and y, at least one of each, inside the picture."""
    width, height = size
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    left = min(max(round(x0), 0), width - 1)
    top = min(max(round(y0), 0), height - 1)
    return left, top, max(left, min(round(x1), width) - 1), max(top, min(round(y1), height) - 1)


def _limbs(skeletons: Sequence[Any] | None, label: int) -> Sequence[tuple[int, int]]:
    skeleton = skeletons[label] if skeletons is not None and label < len(skeletons) else None
    return skeleton.limbs if skeleton is not None else ()


def _draw_keypoints(
    canvas: ImageDraw.ImageDraw,
    points: np.ndarray,
    limbs: Sequence[tuple[int, int]],
    color: Color,
    width: int,
    threshold: float,
) -> None:
    seen = (points[:, 2] > threshold) & np.isfinite(points[:, :2]).all(1)
    spots = [(float(x), float(y)) for x, y in np.nan_to_num(points[:, :2])]
    connected = [(spots[a], spots[b]) for a, b in limbs if max(a, b) < len(spots) and seen[a] and seen[b]]
    for ends in connected:
        canvas.line(ends, fill=RIM, width=width + 2 * max(1, width // 3))
    for ends in connected:
        canvas.line(ends, fill=color, width=width)
    radius = width + 1
    for x, y in (spot for spot, shown in zip(spots, seen, strict=True) if shown):
        canvas.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=color, outline=RIM, width=max(1, width // 3)
        )


def _draw_labels(
    canvas: ImageDraw.ImageDraw, rows: _Rows, colors: list[Color], width: int, font_size: int, size: tuple[int, int]
) -> None:
    """Labels in order of score: the best object has the first choice of place."""
    drawn = [int(i) for i in np.argsort(-rows.scores, kind="stable") if np.isfinite(rows.boxes[i]).all()]
    boxes = np.array([_pixels(rows.boxes[i], size) for i in drawn]).reshape(-1, 4)
    taken = np.zeros((0, 4), dtype=int)
    for box, i in zip(boxes, drawn, strict=True):
        text, font = _fitting(rows.texts[i], font_size, size[0])
        pad = max(1, font_size // 6)
        ascent, descent = font.getmetrics()
        extent = (round(font.getlength(text)) + 2 * pad + 1, ascent + descent + pad)
        place = _free_place(box, extent, width, size, taken, boxes)
        taken = np.vstack([taken, place])
        canvas.rectangle(place, fill=colors[i], outline=RIM, width=max(1, width // 3))
        canvas.text((place[0] + pad, place[1] + pad // 2), text, fill=_ink(colors[i]), font=font)


def _fitting(text: str, font_size: int, room: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and the font that fit into `room` px: smaller letters first (not below 8 px), then fewer of them."""
    font = _font(font_size)
    while font_size > 8 and font.getlength(text) > room - 6:
        font_size -= 1
        font = _font(font_size)
    while len(text) > 1 and font.getlength(text) > room - 6:
        text = text[:-2] + "…"
    return text, font


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise DataError("draw: Pillow was built without FreeType, so it cannot write labels; pass show_labels=False")
    return font


def _free_place(
    box: np.ndarray, extent: tuple[int, int], width: int, size: tuple[int, int], taken: np.ndarray, boxes: np.ndarray
) -> Box:
    """Where a label of `extent` (w, h) px goes: on top of the box if there is room, else inside, below or beside it,
    wherever it hides the least of the labels that are there (`taken`) and of small objects (`boxes`)."""
    x0, y0, x1, y1 = box.tolist()
    w, h = extent
    above, below, inside, foot = y0 - h, y1 + 1, y0 + width, y1 - h + 1 - width
    spots = [(x, y) for y in (above, inside, below, foot, above - h, below + h) for x in (x0, x1 - w + 1)]
    spots += [(x1 + 1, y0), (x0 - w, y0)]
    wanted = np.array(spots)
    corner = np.maximum(np.minimum(wanted, np.array(size) - (w, h)), 0)
    places = np.hstack([corner, corner + np.array([w - 1, h - 1])])
    shifted = np.abs(corner - wanted) @ (h, w)  # pushed back into the picture: allowed, but a free place is better
    cost = 4 * _overlap(places, taken).sum(1) + shifted + np.arange(len(places)) * w * h / 50
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    cost = cost + (_overlap(places, boxes) * np.minimum(1, w * h / areas)).sum(1)
    left, top, right, bottom = places[int(cost.argmin())].tolist()
    return left, top, right, bottom


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Common pixels [N, M] of boxes a [N, 4] and b [M, 4] given by their first and last pixels."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low + 1).clip(0).prod(2)


def _ink(background: Color) -> Color:
    """Black or white, whichever stands out more."""
    luminance = _luminance(np.array(background) / 255)
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)


def _luminance(rgb: np.ndarray) -> float:
    """Relative luminance (0..1) of a color [3] in 0..1, as WCAG 2 defines it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
