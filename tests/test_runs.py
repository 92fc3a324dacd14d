"""Training and evaluating by recipe: what comes out, what may go on, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perpixel import runs
from perpixel.data.synthetic import write_synthetic
from perpixel.engine.checkpoint import load_weights_file, read_run
from perpixel.errors import CheckpointError, ConfigError, DataError
from perpixel.recipe import load_recipe
from perpixel.runs import evaluate, montage, train

SMALL = [
    "train.steps=2",
    "train.batch_size=2",
    "train.precision=fp32",
    "train.device=cpu",
    "train.evaluate_every=0",
    "decode.score_threshold=0.001",
    "backbone.weights=none",
    "pyramid.channels=32",
    "data.short_side=[64]",
    "data.test_short_side=64",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data"), train=5, val=4, seed=1, size=128)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "a"
    train("fcos/lite0", data=data, output=output, overrides=SMALL)
    return output


def renamed(data: Path, folder: Path, change: dict[str, str], splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A copy of a data set with other category names."""
    shutil.copytree(data, folder)
    for split in splits:
        file = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] = change.get(category["name"], category["name"])
            category["id"] += 40
        for annotation in content["annotations"]:
            annotation["category_id"] += 40
        file.write_text(json.dumps(content))
    return folder


def test_the_run_folder_holds_everything(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert names == {
        "recipe.yaml", "categories.json", "state.pt", "best.safetensors", "last.safetensors", "metrics.csv",
        "scores.json", "curves.png", "samples.png",
    }  # fmt: skip
    info = read_run(trained)
    assert info.categories.names == ("disc", "triangle", "square", "star", "crescent")
    stored = load_recipe(trained / "recipe.yaml")
    assert (stored.train.steps, stored.train.minutes, stored.data.short_side) == (2, None, (64,))
    sheet = Image.open(trained / "samples.png")
    assert sheet.height == 2 * runs.SAMPLE_HEIGHT


def test_the_recipe_is_printed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train("fcos/lite0", data=data, output=tmp_path / "a", overrides=SMALL)
    text = capsys.readouterr().out
    assert "name: tf_efficientnet_lite0" in text
    assert "finished after 2 steps" in text
    assert "crescent" in text
    assert result.scores is not None
    assert result.best == result.scores["bbox"]["AP"]


def test_evaluate_repeats_the_score_of_the_run(trained: Path, data: Path, tmp_path: Path) -> None:
    recorded = json.loads((trained / "scores.json").read_text())["bbox"]
    scores = evaluate(trained, results_file=tmp_path / "results.json")["bbox"]
    assert scores["AR100"] == pytest.approx(recorded["AR100"], abs=1e-3)
    assert scores["AP"] == pytest.approx(recorded["AP"], abs=1e-3)
    entries = json.loads((tmp_path / "results.json").read_text())
    assert {e["image_id"] for e in entries} <= {
        i["id"] for i in json.loads((data / "annotations/instances_val.json").read_text())["images"]
    }
    pair = (data / "train", data / "annotations" / "instances_train.json")
    assert evaluate(trained, data=pair, split="train") == evaluate(trained, data=data, split="train")


def test_evaluate_sees_other_sizes_and_mirrors(trained: Path) -> None:
    plain = evaluate(trained, overrides=["data.test_short_side=64"])
    larger = evaluate(trained, overrides=["data.test_short_side=96"])
    several = evaluate(trained, scales=[64, 96], flip=True)
    assert len({scores["bbox"]["AR100"] for scores in (plain, larger, several)}) > 1


def test_ids_may_differ_but_names_may_not(trained: Path, data: Path, tmp_path: Path) -> None:
    moved = renamed(data, tmp_path / "moved", {})
    assert evaluate(trained, data=moved) == evaluate(trained, data=data)
    other = renamed(data, tmp_path / "other", {"star": "galaxy"})
    with pytest.raises(CheckpointError) as caught:
        evaluate(trained, data=other)
    assert "['disc', 'triangle', 'square', 'star', 'crescent']" in str(caught.value)
    assert "['disc', 'triangle', 'square', 'galaxy', 'crescent']" in str(caught.value)


def test_splits_that_disagree_are_refused(data: Path, tmp_path: Path) -> None:
    other = renamed(data, tmp_path / "other", {"star": "galaxy"}, splits=("val",))
    with pytest.raises(CheckpointError, match="the training set has 5"):
        train("fcos/lite0", data=other, output=tmp_path / "a", overrides=SMALL)


def test_a_used_folder_is_not_overwritten(trained: Path, data: Path) -> None:
    before = (trained / "last.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run \(state\.pt\); set resume=true"):
        train("fcos/lite0", data=data, output=trained, overrides=SMALL)
    assert (trained / "last.safetensors").read_bytes() == before


def test_a_run_resumes_as_itself_or_not_at_all(trained: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    more = [*SMALL, "train.steps=3", "data.workers=1"]
    with pytest.raises(CheckpointError, match=r"another recipe \(box\.loss: giou → iou; train\.lr: 0\.001 → 0\.5\)"):
        train("fcos/lite0", data=data, output=copy, overrides=[*more, "box.loss=iou", "train.lr=0.5"], resume=True)
    other = renamed(data, tmp_path / "other", {"star": "galaxy"})
    with pytest.raises(CheckpointError, match="categories differ"):
        train("fcos/lite0", data=other, output=copy, overrides=more, resume=True)
    assert train("fcos/lite0", data=data, output=copy, overrides=more, resume=True).step == 3
    assert load_recipe(copy / "recipe.yaml").train.steps == 3


def test_without_a_validation_split_the_last_weights_are_the_best(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = (data / "train", data / "annotations" / "instances_train.json")
    result = train("fcos/lite0", data=pair, output=tmp_path / "a", overrides=SMALL)
    assert "training without validation" in capsys.readouterr().out
    assert (result.best, result.scores) == (None, None)
    assert read_run(tmp_path / "a").weights.name == "last.safetensors"
    assert (tmp_path / "a" / "samples.png").exists()


def test_a_validation_set_that_is_named_must_be_there(data: Path, tmp_path: Path) -> None:
    wrong = [f"data.root={data}", f"data.val_images={data}/nowhere", f"data.val_annotations={data}/nowhere.json"]
    with pytest.raises(DataError, match="nowhere: no such folder"):
        train("fcos/lite0", output=tmp_path / "a", overrides=[*SMALL, *wrong])


def test_a_batch_must_divide_among_its_parts(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 pictures cannot be shared by 1 processes x 3 micro-batches"):
        train("fcos/lite0", data=data, output=tmp_path / "a", overrides=[*SMALL, "train.accumulate=3"])


def test_evaluate_refuses_what_it_cannot_do(trained: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="split: expected train, val or test, got 'all'"):
        evaluate(trained, data=data, split="all")
    with pytest.raises(ConfigError, match="overrides need a run folder"):
        evaluate("fcos/r50_1x", data=data, overrides=["data.test_short_side=64"])


def test_a_recipe_by_name_is_scored_with_its_released_weights(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = runs.load(trained, threshold=0.0, precision="fp32")
    asked: list[Any] = []
    monkeypatch.setattr(runs, "load", lambda name, **options: asked.append(name) or ours)
    assert evaluate("fcos/lite0", data=data) == evaluate(trained, data=data)
    assert asked == ["fcos/lite0"]


def test_fresh_weights_depend_on_the_seed_alone(data: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        train(
            "fcos/lite0", data=data, output=tmp_path / name, overrides=[*SMALL, "train.steps=1", f"train.seed={seed}"]
        )
        weights.append(load_weights_file(tmp_path / name / "last.safetensors")["head.logits.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_montage_keeps_shapes() -> None:
    sheet = montage([Image.new("RGB", size, "red") for size in ((40, 20), (10, 20), (20, 20))], 10, columns=2)
    assert sheet.size == (25, 20)
    assert sheet.getpixel((24, 9)) == (255, 0, 0)
    assert sheet.getpixel((24, 19)) == (255, 255, 255)
