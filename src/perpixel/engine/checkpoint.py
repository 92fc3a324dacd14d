"""A run folder: everything about a run, and everything that is needed to use or continue it.

    recipe.yaml          the effective recipe
    categories.json      what the labels mean
    state.pt             weights, optimizer, counters: for an exact resume
    best.safetensors     weights of the best validation
    last.safetensors     weights at the last save
    metrics.csv          one row each few steps, and one a validation
    scores.json          the last validation, per class
    curves.png, samples.png

Every file is written beside its place and moved there when it is complete, so that a crash, a kill or a full disk
leaves the previous one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from perpixel.errors import CheckpointError
from perpixel.structures import Categories

STATE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run (see the module's docstring)."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def categories(self) -> Path:
        return self.path / "categories.json"

    @property
    def state(self) -> Path:
        return self.path / "state.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        return self.path / "last.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a run folder says about its network.

    Args:
        recipe_yaml: text of the effective recipe.
        categories: of the data that it was trained on.
        weights: the file to load: the best where there is one, else the last.
    """

    recipe_yaml: str
    categories: Categories
    weights: Path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the previous file is as it was" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written ({reason}){kept}; free space or check permissions") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system lets a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step."""
    with replacing(path) as file:
        file.write(text.encode())


def save_run_header(folder: Path, recipe_yaml: str, categories: Categories) -> RunFolder:
    """Creates the folder with what the network is and what its labels mean."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be created ({error.strerror}); choose another output") from error
    run = RunFolder(folder)
    write_text(run.recipe, recipe_yaml)
    write_text(run.categories, json.dumps(categories.to_dict(), indent=1, ensure_ascii=False))
    return run


def read_categories(path: Path) -> Categories:
    """Categories as `save_run_header` wrote them.

    Raises:
        CheckpointError: the file is missing or does not hold categories.
    """
    try:
        return Categories.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as categories ({error}); give a folder that `perpixel train` or `convert` wrote"
        ) from error


def read_run(folder: str | Path) -> RunInfo:
    """What a run folder holds.

    Raises:
        CheckpointError: it is no run folder, or a part is missing.
    """
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        raise CheckpointError(
            f"{folder}: expected a run folder with recipe.yaml, categories.json and weights; "
            "give a folder that `perpixel train` or `perpixel convert` wrote"
        )
    weights = next((path for path in (run.best, run.last) if path.is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{folder}: no best.safetensors or last.safetensors; the run was stopped before its first save, train it"
        )
    return RunInfo(run.recipe.read_text(encoding="utf-8"), read_categories(run.categories), weights)


def save_weights(path: Path, net: nn.Module) -> None:
    """Writes all parameters and saved buffers as safetensors."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    data = to_safetensors(state)
    with replacing(path) as file:
        file.write(data)


def load_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a pickle that is read without running code.

    Raises:
        CheckpointError: the file is missing, broken, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a .safetensors or .pth file of weights")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({error}); fetch or write it again"
            ) from error
    state = _load_pickle(path)
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, perhaps under 'model' or 'state_dict'")
    return state


def _load_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch remarks on old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a broken or hostile file provokes; its texts mislead
        raise CheckpointError(
            f"{path}: cannot be read as plain tensors ({type(error).__name__}): it is broken, or a pickle that would "
            "run code, which is refused; use safetensors, or a file that holds a state dict alone"
        ) from error


def load_into(net: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Loads weights that must fit the network exactly.

    Raises:
        CheckpointError: names or shapes differ; the first few of each are named.
    """
    own = net.state_dict()
    faults = [
        ("missing", [name for name in own if name not in state]),
        ("unknown", [name for name in state if name not in own]),
        ("of another shape", [n for n in own if n in state and own[n].shape != state[n].shape]),
    ]
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})" for kind, names in faults if names
    ]
    if found:
        raise CheckpointError(
            f"{where}: weights do not fit the network: {'; '.join(found)}; use the recipe they belong to"
        )
    net.load_state_dict(state)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes what an exact resume needs: nested dicts, lists, numbers, strings and tensors."""
    with replacing(path) as file:
        torch.save({"format": STATE_FORMAT, **state}, file)


def load_state(path: Path) -> dict[str, Any]:
    """State as `save_state` wrote it, on the CPU.

    Raises:
        CheckpointError: the file is broken, or another version of perpixel wrote it.
    """
    state = _load_pickle(path)
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: expected training state of format {STATE_FORMAT}, got {found}; resume with the version of "
            "perpixel that wrote it, or start a new run"
        )
    return state
