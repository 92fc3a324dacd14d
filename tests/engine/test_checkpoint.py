"""Run folders: what is written whole or not at all, and what is refused on reading."""

import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detector import TinyDetector

from perpixel.engine.checkpoint import (
    load_into,
    load_state,
    load_weights_file,
    read_run,
    replacing,
    save_run_header,
    save_state,
    save_weights,
    write_text,
)
from perpixel.errors import CheckpointError
from perpixel.structures import Categories, Skeleton

CATEGORIES = Categories(("cat", "Hündin"), (3, 9), (None, Skeleton(("nose",), sigmas=(0.1,))))


def test_a_header_and_weights_make_a_run_that_reads_back(tmp_path: Path) -> None:
    run = save_run_header(tmp_path / "a" / "b", "name: x\n", CATEGORIES)
    save_weights(run.last, TinyDetector())
    info = read_run(run.path)
    assert (info.recipe_yaml, info.categories, info.weights) == ("name: x\n", CATEGORIES, run.last)
    save_weights(run.best, TinyDetector())
    assert read_run(run.path).weights == run.best


def test_weights_come_back_bit_for_bit_from_both_formats(tmp_path: Path) -> None:
    net = TinyDetector()
    save_weights(tmp_path / "w.safetensors", net)
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        state = load_weights_file(tmp_path / name)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "good")

    def fill_the_disk() -> None:
        with replacing(file) as out:
            out.write(b"half of the")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"a\.txt: cannot be written \(No space.*previous file is as it was"):
        fill_the_disk()
    assert file.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: as good as a full disk, writes fail half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["state", "weights"])
@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_leaves_the_last_good_file(tmp_path: Path, kind: str) -> None:
    save: Any = save_weights if kind == "weights" else lambda path, net: save_state(path, net.state_dict())
    path = tmp_path / "file"
    save(path, torch.nn.Linear(10, 10))
    good = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"file: cannot be written \(.*previous file is as it was"):
        save(path, torch.nn.Linear(1000, 1000))
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["file"]


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    torch.save({"model": Bomb()}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth"):
        with pytest.raises(
            CheckpointError, match=rf"{name}: cannot be read as plain tensors.*would run code, which is refused"
        ):
            load_weights_file(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    torch.save([1, 2], tmp_path / "list.pth")
    cases = {
        "cut.safetensors": "cannot be read as safetensors",
        "cut.pth": "cannot be read as plain tensors",
        "list.pth": "expected a state dict of tensors",
        "none.pth": "no such file",
    }
    for name, text in cases.items():
        with pytest.raises(CheckpointError, match=rf"{name}: .*{text}|{name}: {text}"):
            load_weights_file(tmp_path / name)


def test_a_folder_that_is_no_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run folder with recipe\.yaml"):
        read_run(tmp_path)
    run = save_run_header(tmp_path, "name: x", CATEGORIES)
    with pytest.raises(CheckpointError, match="stopped before its first save"):
        read_run(tmp_path)
    save_weights(run.last, TinyDetector())
    run.categories.write_text("[]")
    with pytest.raises(CheckpointError, match=r"categories\.json: cannot be read as categories"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be created"):
        save_run_header(run.recipe / "below", "name: x", CATEGORIES)


def test_weights_of_another_network_are_listed_by_fault() -> None:
    net, state = TinyDetector(), TinyDetector().state_dict()
    state["stranger"] = state.pop("head.bias")
    state["head.weight"] = torch.zeros(3, 4, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        load_into(net, state, "x.pth")
    message = str(caught.value)
    assert message.startswith("x.pth: weights do not fit the network: 1 missing (head.bias); 1 unknown (stranger); ")
    assert "1 of another shape (head.weight)" in message


def test_state_of_another_format_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", {"step": 3, "net": {"a": torch.ones(2)}})
    assert load_state(tmp_path / "state.pt")["step"] == 3
    torch.save({"format": 99}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="training state of format 1, got 99"):
        load_state(tmp_path / "state.pt")
