"""The authors' released weights: where they come from, and how they get into a network.

perpixel does not host them. They are fetched from their authors' place on the Hugging Face Hub, or taken from a folder
of this machine, and stay under their authors' licence.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from perpixel.coco_categories import COCO
from perpixel.config import dump
from perpixel.engine.checkpoint import load_weights_file, save_run_header, save_weights
from perpixel.errors import CheckpointError
from perpixel.interop import adelaidet
from perpixel.recipe import Recipe, build, load_recipe
from perpixel.structures import Categories


def weights_folder() -> Path:
    """Where released files are looked for first: `$PERPIXEL_WEIGHTS`, else `~/.cache/perpixel`."""
    return Path(os.environ.get("PERPIXEL_WEIGHTS") or Path.home() / ".cache" / "perpixel")


def fetch(recipe: Recipe) -> Path:
    """The file of the recipe's released weights on this machine, downloaded on first use.

    Raises:
        CheckpointError: the recipe has no released weights, or they cannot be fetched; the message says which file to
            put where.
    """
    if recipe.weights is None:
        raise CheckpointError(
            f"{recipe.name}: has no released weights; train it (perpixel train {recipe.name} data.root=DIR output=RUN) "
            "and load the run's folder, or name a file of weights"
        )
    local = weights_folder() / recipe.weights.file
    if local.is_file():
        return local
    try:
        return _from_hub(recipe.weights.hub, recipe.weights.file)
    except Exception as error:  # the client raises many kinds: offline, forbidden, moved, full disk
        address = f"https://huggingface.co/{recipe.weights.hub}/resolve/main/{recipe.weights.file}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{recipe.name}: {recipe.weights.file} cannot be fetched from the Hub ({reason}); "
            f"download {address} with a browser and put it at {local}"
        ) from error


def _from_hub(repository: str, file: str) -> Path:
    """A file of the Hub's own cache on this machine, filled on first use."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    get_hf_file_metadata(hf_hub_url(repository, file))  # fails at once without a network, where downloading retries
    return Path(hf_hub_download(repository, file))


def load_released(recipe: Recipe, file: Path) -> tuple[nn.Module, Categories]:
    """A network with the tensors of a released file, and the classes that it knows.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another configuration than the recipe.
    """
    state = load_weights_file(file)
    classes = adelaidet.count_classes(state)
    if classes is None or not adelaidet.is_release(state):
        some = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"{file}: expected the names of the authors' release (proposal_generator.fcos_head.…), got {some}…; "
            "is it a file of another project?"
        )
    net = build(recipe, classes)
    try:
        report = adelaidet.load_weights(net, state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: does not fit recipe {recipe.name}: {error}") from error
    if report.missing or report.unexpected:
        raise CheckpointError(
            f"{file}: does not fit recipe {recipe.name}: {len(report.missing)} tensors of the network are not in the "
            f"file and {len(report.unexpected)} of the file not in the network "
            f"(first: {(report.missing + report.unexpected)[0]}); choose the recipe that the file was trained by"
        )
    return net, COCO if classes == len(COCO) else Categories.anonymous(classes)


def convert(file: str | Path, recipe: str | Path | Recipe, out: str | Path) -> Path:
    """A run folder, as training leaves it, from a file of the authors' release.

    Args:
        file: a released `.pth`.
        recipe: that the file was trained by.
        out: the folder; must not hold a run already.

    Raises:
        CheckpointError: the file does not fit, or the folder is taken.
        ConfigError: unknown recipe.
    """
    chosen = load_recipe(recipe)
    folder = Path(out)
    if (folder / "recipe.yaml").exists():
        raise CheckpointError(f"{folder}: already holds a run; choose another folder")
    net, categories = load_released(chosen, Path(file))
    run = save_run_header(folder, dump(chosen), categories)
    save_weights(run.best, net)
    return folder
