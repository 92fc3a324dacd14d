"""Predictor: coordinates come back in the pixels of the picture that was given, whatever happens in between.

The truth is a made-up network that reports the bright rectangle that it sees; where that is, is known by hand.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from perpixel.config import dump
from perpixel.engine.checkpoint import save_run_header, save_weights
from perpixel.errors import CheckpointError, ConfigError, DataError, ShapeError
from perpixel.predictor import Predictor, load, mirror, same_size_batches, stack
from perpixel.structures import Categories, Detections, Size, Skeleton
from tiny_run import CATEGORIES, tiny_net, tiny_recipe, write_tiny_run

PERSON = Skeleton(names=("left_hand", "right_hand"), pairs=((0, 1),))
CLASSES = Categories(("person", "thing"), (1, 7), (PERSON, None))


class Finder(nn.Module):
    """Finds the bright rectangle; its hands are on its left and right side as seen, its mask is its box."""

    divisor = 32
    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[tuple[int, ...], list[Size]]] = []

    def forward(self, images: Tensor, sizes: list[Size] | None = None) -> tuple[Tensor]:
        if sizes is not None:
            self.seen.append((tuple(images.shape), sizes))
        return (images.float(),)

    def decode(self, outputs: tuple[Tensor], sizes: list[Size], frames: list[Size]) -> list[Detections]:
        return [self._find(x, *pair) for x, pair in zip(outputs[0], zip(sizes, frames, strict=True), strict=True)]

    def _find(self, image: Tensor, size: Size, frame: Size) -> Detections:
        bright = image[0, : size[0], : size[1]] > 128
        rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
        sy, sx = frame[0] / size[0], frame[1] / size[1]
        if not len(rows):
            return Detections(
                size=frame,
                boxes=torch.zeros(0, 4),
                scores=torch.zeros(0),
                labels=torch.zeros(0, dtype=torch.int64),
                masks=torch.zeros(0, *frame, dtype=torch.bool),
                keypoints=torch.zeros(0, 2, 3),
            )
        x0, x1 = float(columns[0] * sx), float((columns[-1] + 1) * sx)
        y0, y1 = float(rows[0] * sy), float((rows[-1] + 1) * sy)
        mask = torch.zeros(1, *frame, dtype=torch.bool)
        mask[:, round(y0) : round(y1), round(x0) : round(x1)] = True
        return Detections(
            size=frame,
            boxes=torch.tensor([[x0, y0, x1, y1]]),
            scores=torch.tensor([0.8]),
            labels=torch.tensor([0]),
            masks=mask,
            keypoints=torch.tensor([[[x0, y0, 0.9], [x1, y0, 0.4]]]),
        )


def picture(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def finder(**options: Any) -> Predictor:
    return Predictor(Finder(), tiny_recipe(), CLASSES, device="cpu", precision="fp32", **options)


@pytest.mark.parametrize("size", [(96, 96), (192, 320), (48, 60), (480, 300), (100, 400)])
def test_boxes_masks_and_keypoints_are_in_pixels_of_the_picture(size: Size) -> None:
    height, width = size
    box = (width // 4, height // 3, width // 2, 2 * height // 3)
    found = finder()(picture(height, width, box))
    pixel = max(1.0, min(size) / 96, max(size) / 160)  # one pixel of the network's input
    assert found.size == size
    assert found.boxes[0].tolist() == pytest.approx(box, abs=pixel)
    assert found.masks.shape == (1, *size)  # type: ignore[union-attr]
    assert found.keypoints[0, :, 0].tolist() == pytest.approx([box[0], box[2]], abs=pixel)  # type: ignore[index]
    assert found.names == ["person"]
    assert found.to_coco(5)[0]["category_id"] == 1


def test_flip_and_scales_find_the_same_object_once() -> None:
    image = picture(192, 320, (40, 30, 100, 90))
    plain = finder()(image)
    many = finder()(image, scales=[64, 96, 128], flip=True)
    assert len(many) == 1
    assert many.boxes[0].tolist() == pytest.approx(plain.boxes[0].tolist(), abs=3)
    predictor = finder()
    mirrored = predictor(image, flip=True)
    assert mirrored.keypoints[0].flatten().tolist() == pytest.approx(plain.keypoints[0].flatten().tolist())  # type: ignore[index]


def test_augmentation_looks_at_every_scale_and_its_mirror() -> None:
    predictor = finder()
    predictor(picture(96, 96, (10, 10, 20, 20)), scales=[64, 128], flip=True)
    assert [sizes for _, sizes in predictor.net.seen] == [[(64, 64)]] * 2 + [[(128, 128)]] * 2


def test_merging_keeps_two_objects_of_different_classes_on_one_place() -> None:
    rows = Detections(
        size=(10, 10),
        boxes=torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5], [0, 0, 5, 5.5]]),
        scores=torch.tensor([0.5, 0.9, 0.7]),
        labels=torch.tensor([0, 0, 1]),
    )
    merged = finder()._merge([rows[:1], rows[1:]])
    assert merged.scores.tolist() == pytest.approx([0.9, 0.7])
    assert merged.labels.tolist() == [0, 1]


def test_mirroring_exchanges_left_and_right() -> None:
    rows = Detections(
        size=(4, 10),
        boxes=torch.tensor([[1.0, 0, 4, 2], [0, 0, 2, 2]]),
        scores=torch.tensor([0.5, 0.4]),
        labels=torch.tensor([0, 1]),
        masks=torch.arange(10).expand(2, 4, 10) < 3,
        keypoints=torch.tensor([[[1.0, 1, 0.9], [4, 1, 0.3]], [[0, 0, 0.1], [2, 2, 0.2]]]),
    )
    seen = mirror(rows, CLASSES)
    assert seen.boxes.tolist() == [[6, 0, 9, 2], [8, 0, 10, 2]]
    assert seen.masks[0, 0].tolist() == [False] * 7 + [True] * 3  # type: ignore[index]
    expected = [6, 1, 0.3, 9, 1, 0.9]  # hands exchanged
    assert seen.keypoints[0].flatten().tolist() == pytest.approx(expected)  # type: ignore[index]
    expected = [10, 0, 0.1, 8, 2, 0.2]  # a class without pairs
    assert seen.keypoints[1].flatten().tolist() == pytest.approx(expected)  # type: ignore[index]
    bare = replace(rows, masks=None, keypoints=None)
    assert mirror(mirror(bare, CLASSES), CLASSES).boxes.tolist() == rows.boxes.tolist()


def test_results_keep_the_order_of_the_pictures() -> None:
    images = [picture(96, 96 + 32 * (i % 3), (5 * i, 10, 5 * i + 20, 30)) for i in range(10)]
    predictor = finder()
    found = predictor(images, batch_size=3)
    assert [round(float(d.boxes[0, 0])) for d in found] == [5 * i for i in range(10)]
    assert predictor(tuple(images[:2]))[1].size == images[1].shape[:2]
    assert predictor([]) == []


def test_a_batch_holds_pictures_of_one_padded_size() -> None:
    predictor = finder()
    predictor([picture(96, w, (0, 0, 9, 9)) for w in (96, 160, 90, 96, 159, 96)], batch_size=2)
    for shape, sizes in predictor.net.seen:
        assert len(sizes) <= 2
        assert len({(-(-h // 32), -(-w // 32)) for h, w in sizes}) == 1
        assert shape[2:] == tuple(max(side) for side in zip(*sizes, strict=True))
    assert sum(len(sizes) for _, sizes in predictor.net.seen) == 6


def test_batches_by_hand() -> None:
    assert same_size_batches([(32, 64), (33, 64), (1, 33), (32, 32)], 32, 8) == [[0, 2], [1], [3]]
    assert same_size_batches([(8, 8)] * 5, 32, 2) == [[0, 1], [2, 3], [4]]


def test_stacking_pads_right_and_bottom_with_zeros() -> None:
    batch, sizes = stack([torch.ones(3, 2, 4, dtype=torch.uint8), torch.ones(3, 3, 1, dtype=torch.uint8)])
    assert sizes == [(2, 4), (3, 1)]
    assert batch[:, 0].tolist() == [[[1, 1, 1, 1]] * 2 + [[0] * 4], [[1, 0, 0, 0]] * 3]


def test_path_pil_array_and_tensor_give_the_same_result(tmp_path: Path) -> None:
    array = picture(96, 120, (10, 20, 50, 60))
    Image.fromarray(array).save(tmp_path / "a.png")
    kinds = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    predictor = finder()
    assert all(torch.equal(predictor(kind).boxes, predictor(array).boxes) for kind in kinds)


def test_threshold_is_a_strict_limit_that_a_call_can_change() -> None:
    image = picture(96, 96, (10, 10, 50, 50))
    assert len(finder(threshold=0.9)(image)) == 0
    assert len(finder(threshold=0.9)(image, threshold=0.5)) == 1
    assert len(finder()(image, threshold=0.8)) == 0  # the score is 0.8
    assert len(finder()(np.zeros((96, 96, 3), np.uint8))) == 0


def test_a_stream_takes_no_more_than_it_needs() -> None:
    taken = 0

    def frames() -> Any:
        nonlocal taken
        for i in range(5):
            taken += 1
            yield picture(96, 96, (10 * i, 10, 10 * i + 20, 50))

    stream = finder().stream(frames(), batch_size=2)
    assert round(float(next(stream).boxes[0, 0])) == 0
    assert taken == 2
    assert [round(float(d.boxes[0, 0])) for d in stream] == [10, 20, 30, 40]


def test_wrong_options_and_pictures_are_refused(tmp_path: Path) -> None:
    predictor, image = finder(), picture(96, 96, (0, 0, 9, 9))
    with pytest.raises(ConfigError, match="batch_size"):
        predictor(image, batch_size=0)
    with pytest.raises(ConfigError, match="threshold"):
        predictor(image, threshold=1.5)
    with pytest.raises(ConfigError, match="scales"):
        predictor(image, scales=[])
    with pytest.raises(ShapeError, match="float32"):
        predictor(torch.zeros(3, 8, 8))
    with pytest.raises(DataError, match=r"none\.jpg"):
        predictor(tmp_path / "none.jpg")


def test_compile_is_asked_for_once() -> None:
    calls = []

    class Compiled(Finder):
        def compile(self, *args: Any, **kwargs: Any) -> None:
            calls.append(1)

    Predictor(Compiled(), tiny_recipe(), CLASSES, device="cpu", precision="fp32", compile=True)
    assert calls == [1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("tiny") / "run")


def test_a_real_network_gives_one_picture_the_same_result_alone_and_in_a_batch(run: Path) -> None:
    predictor = load(run, device="cpu", precision="fp32", threshold=0.0)
    images = [np.random.default_rng(i).integers(0, 255, (96, 90 + 3 * i, 3), dtype=np.uint8) for i in range(4)]
    together = predictor(images, batch_size=4)
    for image, batched in zip(images, together, strict=True):
        alone = predictor(image)
        assert len(alone) > 10
        assert torch.equal(alone.labels, batched.labels)
        assert torch.allclose(alone.boxes, batched.boxes, atol=1e-2)
        assert torch.allclose(alone.scores, batched.scores, atol=1e-4)
    assert predictor.names == CATEGORIES.names
    assert predictor.categories == CATEGORIES
    assert predictor.recipe.pyramid.channels == 48


def test_a_run_is_loaded_by_folder_by_file_and_by_recipe_with_weights(run: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    wanted = load(run, **options)(image, threshold=0.0)
    ways = [load(run / "best.safetensors", **options), load(run, weights=run / "best.safetensors", **options)]
    ways.append(load(run / "recipe.yaml", weights=run / "best.safetensors", **options))
    for way in ways:
        assert torch.equal(way(image, threshold=0.0).boxes, wanted.boxes)
        assert way.categories == CATEGORIES


def test_weights_without_a_run_get_nameless_classes(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "moved.safetensors"
    file.write_bytes((run / "best.safetensors").read_bytes())
    assert load(run / "recipe.yaml", weights=file, device="cpu").names == ("class 0", "class 1", "class 2")
    with pytest.raises(CheckpointError, match="weights alone do not say"):
        load(file)


def test_weights_of_another_recipe_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best.safetensors.*fit"):
        load("fcos/lite0", weights=run / "best.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"strange.pth: has no head.logits.bias"):
        load("fcos/lite0", weights=tmp_path / "strange.pth")
    save_run_header(tmp_path / "other", dump(tiny_recipe()), Categories.anonymous(5))
    save_weights(tmp_path / "other" / "best.safetensors", tiny_net())
    with pytest.raises(CheckpointError, match=r"head.logits"):
        load(tmp_path / "other")


def test_unknown_sources_list_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs/nope: is neither a run folder nor a recipe; recipes: .*fcos/r50_1x"):
        load("runs/nope")
    with pytest.raises(CheckpointError, match="expected a run folder"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="fcos/lite0: has no released weights; train it"):
        load("fcos/lite0")
