"""Training and evaluating by recipe: what `perpixel.train`, `perpixel.evaluate` and the command line call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import nn

from perpixel import distributed
from perpixel.config import dump
from perpixel.data.coco import CocoDataset
from perpixel.data.images import Picture, load_image
from perpixel.data.loading import (
    EvalBatches,
    batches_per_epoch,
    eval_batches,
    find_split,
    open_dataset,
    train_batches,
)
from perpixel.engine.checkpoint import (
    RunFolder,
    load_into,
    load_weights_file,
    read_run,
    replacing,
    save_run_header,
)
from perpixel.engine.evaluate import detect, score, to_columns
from perpixel.engine.processes import choose_device, process_group
from perpixel.engine.train import Scores, TrainResult
from perpixel.engine.train import train as run_steps
from perpixel.errors import CheckpointError, ConfigError, DataError
from perpixel.metrics import CocoResults, Kind, report
from perpixel.predictor import Predictor, load
from perpixel.recipe import Recipe, build, load_recipe
from perpixel.structures import Batch, Categories

Data = str | Path | tuple[str | Path, str | Path]

# What may change between the parts of a resumed run, because the rest of the run does not depend on it.
FREE_ON_RESUME = frozenset(
    {"name", "description", "data.root", "data.workers", "backbone.weights"}
    | {f"data.{split}_{what}" for split in ("train", "val") for what in ("images", "annotations")}
    | {f"train.{k}" for k in ("steps", "epochs", "minutes", "evaluate_every", "save_every", "log_every", "early_stop")}
    | {f"train.{k}" for k in ("device", "profile", "tensorboard", "accumulate")}
)
EVAL_BATCH = 8  # pictures, on a GPU
SAMPLE_COUNT, SAMPLE_HEIGHT, SAMPLE_THRESHOLD = 6, 320, 0.5  # pictures, px, score: of samples.png


def train(
    recipe: str | Path | Recipe,
    data: Data | None = None,
    output: str | Path = "runs/train",
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> TrainResult:
    """Trains a recipe on a data set; the run folder holds everything that came of it.

    Under `torchrun` the processes share the work.

    Args:
        recipe: name, path or `Recipe`.
        data: folder with COCO labels, or (pictures, annotation file) of the training set; None: as the recipe says.
        output: run folder.
        overrides: `a.b=c` changes to the recipe.
        resume: continue the run in `output`; where it has not saved anything yet, start it.

    Raises:
        ConfigError, DataError, CheckpointError: recipe, data, or output cannot be used.
        NonFiniteLossError: training broke down; the last good files are kept.
    """
    chosen = _with_data(load_recipe(recipe, overrides), data, "train")
    device = choose_device(chosen.train.device)
    with process_group(device):
        console = Console() if distributed.rank() == 0 else None
        return _train(chosen, Path(output), resume, device, console)


def _train(recipe: Recipe, output: Path, resume: bool, device: torch.device, console: Console | None) -> TrainResult:
    config = recipe.train
    per_process = _share(config.batch_size, config.accumulate)
    dataset = open_dataset(recipe.data, "train", recipe.needs)
    validation = _validation_set(recipe, dataset.categories, console)
    _check_output(RunFolder(output), recipe, dataset.categories, resume)
    if console is not None:
        console.print(dump(recipe), markup=False, highlight=False, soft_wrap=True)
        save_run_header(output, dump(recipe), dataset.categories)
    run = RunFolder(output)
    torch.manual_seed(config.seed)
    net = build(recipe, len(dataset.categories), imagenet=True)

    def make_batches(start: int) -> Iterator[Batch]:
        return train_batches(
            dataset,
            recipe.data,
            batch_size=per_process,
            seed=config.seed,
            start_step=start,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            needs=recipe.needs,
        )

    result = run_steps(
        net,
        config,
        make_batches=make_batches,
        steps_per_epoch=batches_per_epoch(dataset, config.batch_size),
        run=run,
        validate=None if validation is None else _validator(recipe, validation, device),
        metric=config.metric or f"{_kinds(recipe)[-1]}.AP",
        resume=resume,
        console=console,
    )
    if console is not None and result.reason != "interrupted":  # who asked to stop wants no more work
        _draw_samples(net, recipe, dataset if validation is None else validation, run, device)
        if result.scores is not None:
            console.print(report(result.scores), markup=False, highlight=False, soft_wrap=True)
    return result


def evaluate(
    run: str | Path,
    data: Data | None = None,
    split: str = "val",
    overrides: Sequence[str] = (),
    *,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 1,
    scales: Sequence[int] | None = None,
    flip: bool = False,
    results_file: str | Path | None = None,
) -> Scores:
    """COCO scores of a trained run, or of a recipe's released weights.

    Args:
        run: run folder, or the name of a recipe.
        data: folder with COCO labels, or (pictures, annotation file); None: the data that it was trained with.
        split: "train", "val" or "test".
        overrides: `a.b=c` changes to its recipe, such as `data.test_short_side=600`.
        device: "auto" takes the GPU where there is one.
        precision: "fp32", "bf16", or "auto" for the fastest of them on this machine.
        batch_size: pictures at a time in every process.
        scales, flip: test-time augmentation, as in `Predictor` (section 3.3.3).
        results_file: detections are written here as COCO results, with the data set's own ids.

    Returns:
        {"bbox": {"AP": 0.41, "AP50": ..., "per_class": {...}}, ...}; in 0..1, None where there was nothing to score.

    Raises:
        CheckpointError: no run, or a run with other categories than the data.
    """
    if split not in ("train", "val", "test"):
        raise ConfigError(f"split: expected train, val or test, got {split!r}")
    where: Any = split
    opened = _open(run, overrides, choose_device(device), precision)
    recipe = _with_data(opened.recipe, data, split)
    with process_group(opened.device):
        dataset = open_dataset(recipe.data, where, recipe.needs)
        _same_categories(opened.categories, dataset.categories, str(run), str(dataset.annotation_file))
        if scales is None and not flip:
            found = detect(opened.net, _eval_batches(recipe, dataset, batch_size), dataset.categories)
        else:
            found = _detect_augmented(opened, dataset, scales, flip)
        return score(
            found,
            dataset.categories,
            dataset.image_ids,
            dataset.annotation_file,
            kinds=_kinds(recipe),
            results_file=None if results_file is None else Path(results_file),
        )


def _open(run: str | Path, overrides: Sequence[str], device: torch.device, precision: str) -> Predictor:
    """What is to be scored, with nothing left out for a low score but what the recipe leaves out."""
    if not Path(run).is_dir():
        if overrides:
            raise ConfigError(f"{run}: overrides need a run folder; make one with `perpixel convert`")
        return load(run, device=device, precision=precision, threshold=0.0)
    info = read_run(run)
    recipe = load_recipe(Path(run) / "recipe.yaml", overrides)
    net = build(recipe, len(info.categories), ["backbone.weights=none"])
    load_into(net, load_weights_file(info.weights), info.weights)
    return Predictor(net, recipe, info.categories, device=device, precision=precision, threshold=0.0)


def _detect_augmented(
    predictor: Predictor, dataset: CocoDataset, scales: Sequence[int] | None, flip: bool
) -> CocoResults:
    """This process's share of the pictures, seen at several sizes and mirrored."""
    mine = range(distributed.rank(), len(dataset), distributed.world_size())
    found = predictor.stream((dataset.path(i) for i in mine), scales=scales, flip=flip)
    ids = [int(dataset.image_ids[i]) for i in mine]
    return CocoResults.cat([to_columns(d, i, dataset.categories) for i, d in zip(ids, found, strict=True)])


def _eval_batches(recipe: Recipe, dataset: CocoDataset, batch_size: int) -> EvalBatches:
    """This process's share of the pictures."""
    return eval_batches(
        dataset,
        recipe.data,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _validator(recipe: Recipe, dataset: CocoDataset, device: torch.device) -> Callable[[nn.Module], Scores]:
    """Scores of a network on a data set, over all processes."""

    # On a CPU nothing is gained from several at a time, and group norms see the padding of pictures of unlike sizes.
    batch_size = 1 if device.type == "cpu" else EVAL_BATCH

    def validate(net: nn.Module) -> Scores:
        batches = _eval_batches(recipe, dataset, batch_size)
        found = detect(net, batches, dataset.categories, precision=recipe.train.precision)
        return score(found, dataset.categories, dataset.image_ids, dataset.annotation_file, kinds=_kinds(recipe))

    return validate


def _kinds(recipe: Recipe) -> list[Kind]:
    """What a recipe's detections are scored on; the last one is what it is for."""
    kinds: list[Kind] = ["bbox"]
    if "masks" in recipe.needs:
        kinds.append("segm")
    if "keypoints" in recipe.needs:
        kinds.append("keypoints")
    return kinds


def _share(batch_size: int, accumulate: int) -> int:
    """Pictures of one micro-batch of one process."""
    parts = distributed.world_size() * accumulate
    if batch_size % parts:
        raise ConfigError(
            f"train.batch_size: {batch_size} pictures cannot be shared by {distributed.world_size()} processes x "
            f"{accumulate} micro-batches; make it a multiple of {parts}"
        )
    return batch_size // parts


def _with_data(recipe: Recipe, data: Data | None, split: str) -> Recipe:
    """The recipe reading from `data`, in place of the data that it names."""
    if data is None:
        return recipe
    change: dict[str, str | None] = {f"{s}_{w}": None for s in ("train", "val") for w in ("images", "annotations")}
    if isinstance(data, tuple):
        change |= {f"{split}_images": str(data[0]), f"{split}_annotations": str(data[1]), "root": None}
    else:
        change["root"] = str(data)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=change)})


def _validation_set(recipe: Recipe, categories: Categories, console: Console | None) -> CocoDataset | None:
    """The validation split; None where the data has none."""
    try:
        find_split(recipe.data, "val", recipe.needs)
    except DataError as error:
        if recipe.data.val_images or recipe.data.val_annotations:
            raise
        if console is not None:
            console.print(f"training without validation: {error}", highlight=False, markup=False, soft_wrap=True)
        return None
    dataset = open_dataset(recipe.data, "val", recipe.needs)
    _same_categories(categories, dataset.categories, "the training set", str(dataset.annotation_file))
    return dataset


def _same_categories(trained: Categories, found: Categories, source: str, place: str) -> None:
    """Labels must mean the same; ids may differ, results use the data set's own.

    Raises:
        CheckpointError: the names are others, or in another order.
    """
    if trained.names != found.names:
        raise CheckpointError(
            f"categories differ: {source} has {len(trained)}: {list(trained.names)}; {place} has {len(found)}: "
            f"{list(found.names)}; use data with the same categories in the same order of ids, or train anew"
        )


def _check_output(run: RunFolder, recipe: Recipe, categories: Categories, resume: bool) -> None:
    """Nothing of an earlier run is overwritten by accident, and a resumed run is the same run."""
    used = [path for path in (run.state, run.best, run.last) if path.exists()]
    if used and not resume:
        raise ConfigError(
            f"output {run.path}: already holds a run ({used[0].name}); set resume=true to continue "
            "it, or name another folder"
        )
    if resume and run.state.exists():
        info = read_run(run.path)
        _same_categories(info.categories, categories, str(run.path), "the training set")
        stored = load_recipe(run.recipe)
        changed = _differences(stored.model_dump(mode="json"), recipe.model_dump(mode="json"))
        kept = [f"{key}: {old} → {new}" for key, (old, new) in changed.items() if key not in FREE_ON_RESUME]
        if kept:
            raise CheckpointError(
                f"{run.path}: the run was started with another recipe ({'; '.join(kept[:5])}); resume with the "
                "same, or name another output"
            )
    if distributed.is_distributed():
        torch.distributed.barrier()  # all have looked before the first one writes


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Values that differ between two nested mappings, by dotted key."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def _draw_samples(net: nn.Module, recipe: Recipe, dataset: CocoDataset, run: RunFolder, device: torch.device) -> None:
    """samples.png: a few pictures of the data set with the detections of the run's best weights."""
    weights = read_run(run.path).weights
    load_into(net, load_weights_file(weights), weights)
    predictor = Predictor(net, recipe, dataset.categories, device=device, precision="fp32", threshold=SAMPLE_THRESHOLD)
    count = min(SAMPLE_COUNT, len(dataset))
    pictures: list[Picture] = [load_image(dataset.path(i * len(dataset) // count)) for i in range(count)]
    drawn = [detections.draw(picture) for picture, detections in zip(pictures, predictor(pictures), strict=True)]
    with replacing(run.samples) as file:
        montage(drawn, SAMPLE_HEIGHT, columns=3).save(file, format="PNG")


def montage(pictures: Sequence[Image.Image], height: int, columns: int) -> Image.Image:
    """Pictures at one height (px), `columns` a row, on white."""
    scaled = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    width = max(sum(p.width for p in row) for row in rows)
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    for y, row in enumerate(rows):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y * height))
            x += picture.width
    return sheet
