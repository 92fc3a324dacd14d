"""The whole way in one call: make a data set, train on it, score on held-out pictures, draw what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from perpixel.data.loading import open_dataset
from perpixel.data.show import contact_sheet, draw_sample
from perpixel.data.synthetic import write_synthetic
from perpixel.engine.checkpoint import replacing
from perpixel.predictor import Predictor, load
from perpixel.runs import evaluate, train

RECIPE = "fcos/lite0"
SETTINGS = (
    "train.evaluate_every=0",  # all minutes go into training; the score is taken once, at the end
    "data.short_side=[288]", "data.max_size=384", "data.test_short_side=288", "data.test_max_size=384",  # as drawn
)  # fmt: skip
TRAIN_PICTURES = 600
DRAWN = 6  # held-out pictures on the sheet
THRESHOLD = 0.5  # score of what is drawn


def demo(
    out: str | Path, *, minutes: float = 7.0, pictures: int = 300, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Trains `fcos/lite0` on a synthetic set and shows how good it became.

    Args:
        out: folder for the data, the run and `found.png`. A run that is there already goes on.
        minutes: of training.
        pictures: held out, to score on.
        say: is told what happens.

    Returns:
        box AP and AP50, 0..1.
    """
    out = Path(out)
    say(f"drawing {TRAIN_PICTURES} pictures to learn from and {pictures} to be judged by: {out / 'data'}")
    data = write_synthetic(out / "data", train=TRAIN_PICTURES, val=pictures)
    train(RECIPE, data, out / "run", overrides=[f"train.minutes={minutes}", *SETTINGS], resume=True)
    scores = evaluate(out / "run", data)["bbox"]
    sheet = draw_side_by_side(load(out / "run"), out / "found.png")
    say(f"box AP {scores['AP']:.3f}, AP50 {scores['AP50']:.3f} on {pictures} held-out pictures")
    say(f"truth on the left, what was found on the right: {sheet}")
    return {"AP": scores["AP"], "AP50": scores["AP50"]}


def draw_side_by_side(predictor: Predictor, path: Path) -> Path:
    """Held-out pictures of the predictor's own data, truth beside detections, on one sheet."""
    dataset = open_dataset(predictor.recipe.data, "val")
    pairs = []
    for index in range(min(DRAWN, len(dataset))):
        sample = dataset[index]
        truth = draw_sample(sample, dataset.categories)
        found = predictor(sample.image, threshold=THRESHOLD).draw(sample.image)
        pair = Image.new("RGB", (2 * truth.width, truth.height))
        pair.paste(truth, (0, 0))
        pair.paste(found, (truth.width, 0))
        pairs.append(pair)
    with replacing(path) as file:
        contact_sheet(pairs, cell=770, columns=2).save(file, format="PNG")
    return path
