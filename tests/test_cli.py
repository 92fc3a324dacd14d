"""The command line: the way from data to pictures; one line and exit status 2 for everything a user can get wrong."""

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import perpixel.cli
from perpixel.data.synthetic import write_synthetic
from tiny_run import CHANGES, write_tiny_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`perpixel WORD…` in this process: exit status, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["perpixel", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            perpixel.cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "data", train=4, val=2, size=128)


TRAINING = (*CHANGES, "backbone.weights=none", "data.workers=0", "data.short_side=[64]", "data.max_size=96")
SHORT = ("train.minutes=null", "train.steps=2", "train.batch_size=2", "train.device=cpu", "train.precision=fp32")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit status 2, and one line on stderr that says these words."""
    status, _, err = result
    assert status == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err


# The way through


def test_train_evaluate_and_predict_in_three_commands(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs/a"
    words = ("fcos/lite0", f"data.root={data}", f"output={out}", *TRAINING, *SHORT)
    status, text, err = run("train", *words)
    assert status == 0, err
    assert (out / "best.safetensors").is_file()
    assert "backbone:" in text  # the effective recipe
    refused(run("train", *words), "already holds a run")
    assert run("train", *words, "train.steps=3", "--resume")[0] == 0

    status, text, err = run("evaluate", out, "--data", data, "--out", tmp_path / "results.json")
    assert status == 0, err
    assert "bbox: AP " in text
    assert "crescent" in text  # the table by class
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)
    assert run("evaluate", out, "data.test_short_side=64", "--scales", "64,96", "--flip")[0] == 0

    status, text, err = run("predict", out, data / "val", "--out", tmp_path / "found", "--threshold", 0)
    assert status == 0, err
    assert len(list((tmp_path / "found").glob("*.jpg")) + list((tmp_path / "found").glob("*.png"))) == 2
    assert "predictions.json" in text


def test_predicting_a_picture_and_a_pattern(run: Run, tiny: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ("--threshold", "0", "--precision", "fp32", "--device", "cpu", "--color-by", "object")
    assert run("predict", tiny, tmp_path / "a.png", "--out", tmp_path / "one", *words)[0] == 0
    assert run("predict", tiny, f"{tmp_path}/*.png", "--out", tmp_path / "two", "--no-pictures", *words)[0] == 0
    one, two = (json.loads((tmp_path / n / "predictions.json").read_text()) for n in ("one", "two"))
    assert one["annotations"] == two["annotations"]
    assert {a["category_id"] for a in one["annotations"]} <= {4, 9, 2}  # the run's own ids
    assert not (tmp_path / "two/a.png").exists()


def test_models_say_where_weights_come_from_and_what_they_may_be_used_for(run: Run) -> None:
    status, text, _ = run("models")
    assert status == 0
    part = text[text.index("fcos/r50_1x ") :]
    assert "38.7" in part
    assert "tianzhi/AdelaiDet-FCOS" in part
    assert "non-commercial" in part
    assert "none released; train it" in text


def test_data_commands(run: Run, tmp_path: Path) -> None:
    assert run("data", "synthetic", tmp_path / "set", "--train", 2, "--val", 1, "--seed", 3)[0] == 0
    status, text, _ = run("data", "check", tmp_path / "set")
    assert (status, text.strip()) == (0, f"{tmp_path}/set: no defects")
    status, text, _ = run("data", "show", tmp_path / "set", "--out", tmp_path / "sheet.png", "--count", 2)
    assert status == 0
    assert Image.open(tmp_path / "sheet.png").width > 100
    refused(run("data", "show", tmp_path / "set", "--split", "holiday"), "expected train, val or test")


def test_check_lists_every_defect_and_fails(run: Run, data: Path) -> None:
    file = data / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["image_id"] = 999
    file.write_text(json.dumps(content))
    status, text, err = run("data", "check", data)
    assert status == 2
    assert len(err.splitlines()) == 1
    for annotation in content["annotations"][:2]:
        assert f"annotation {annotation['id']}" in text
    assert "width 0" in text
    assert "999" in text


def test_demo_passes_its_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import perpixel.demo

    asked: list[Any] = []
    monkeypatch.setattr(perpixel.demo, "demo", lambda *a, **k: asked.append((a, k)))
    assert run("demo", "--out", "x", "--minutes", "2", "--pictures", "9")[0] == 0
    assert asked == [((Path("x"),), {"minutes": 2.0, "pictures": 9})]


def test_version_and_help(run: Run) -> None:
    assert run("--version")[1].strip() == perpixel.__version__
    status, text, _ = run("--help")
    assert status == 0
    assert all(name in text for name in ("train", "evaluate", "predict", "models", "convert", "data", "demo"))


def test_help_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys, time; sys.argv = ['perpixel', '--help']; import perpixel.cli\n"
        "try: perpixel.cli.main()\n"
        "except SystemExit: print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    last = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        last.append(done.stdout.splitlines()[-1].split())
    assert all(words[1:] == ["False", "False"] for words in last)
    assert min(float(words[0]) for words in last) < 0.4  # s of that process, start of the interpreter included


def test_an_interrupted_training_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import perpixel.runs

    class Result:
        reason, step = "interrupted", 7

    asked: dict[str, Any] = {}
    monkeypatch.setattr(perpixel.runs, "train", lambda *a, **k: asked.update(k) or Result())
    status, text, _ = run("train", "fcos/lite0", "train.steps=9", "resume=true")
    assert (status, "step 7" in text, "--resume" in text) == (0, True, True)
    assert asked == {"data": None, "output": "runs/fcos-lite0", "overrides": ["train.steps=9"], "resume": True}


def test_ctrl_c_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import perpixel.recipe

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(perpixel.recipe, "recipe_names", stop)
    status, _, err = run("models")
    assert (status, "Traceback" in err) == (130, False)


def test_system_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/x.json")

    monkeypatch.setattr(perpixel.cli, "app", full)
    refused(run("models"), "runs/a/x.json: No space left on device")


# Bad input


def train(run: Run, data: Path, *words: str) -> tuple[int, str, str]:
    return run("train", "fcos/lite0", f"data.root={data}", f"output={data.parent}/run", *TRAINING, *SHORT, *words)


def change_annotations(data: Path, change: Callable[[dict[str, Any]], None], split: str = "train") -> None:
    file = data / f"annotations/instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_missing_folder(run: Run, tiny: Path, tmp_path: Path) -> None:
    refused(train(run, tmp_path / "nope"), "nope")
    refused(run("evaluate", tiny, "--data", tmp_path / "nope"), "nope")
    refused(run("data", "check", tmp_path / "nope"), "nope")
    refused(run("predict", tiny, tmp_path / "nope", "--out", tmp_path / "out"), "nope", "no such file or folder")
    refused(run("predict", tmp_path / "nope", "a.jpg", "--out", tmp_path / "out"), "neither a run folder nor a recipe")


def test_broken_json(run: Run, data: Path) -> None:
    (data / "annotations/instances_train.json").write_text('{"images": [')
    refused(train(run, data), "instances_train.json", "JSON")


def test_annotation_to_an_unknown_image(run: Run, data: Path) -> None:
    change_annotations(data, lambda c: c["annotations"][2].update(image_id=777))
    refused(train(run, data), "annotation 3", "777")


def test_box_of_zero_width(run: Run, data: Path) -> None:
    change_annotations(data, lambda c: c["annotations"][2].update(bbox=[5, 5, 0, 9]))
    refused(train(run, data), "annotation 3", "width 0", "data.drop_degenerate=true")
    assert train(run, data, "data.drop_degenerate=true")[0] == 0


def test_nan_box(run: Run, data: Path) -> None:
    change_annotations(data, lambda c: c["annotations"][2].update(bbox=[5, float("nan"), 4, 9]))
    refused(train(run, data), "annotation 3", "nan")


def first_picture(data: Path) -> Path:
    return min((data / "train").iterdir())


def bomb(path: Path, side: int = 30000) -> None:
    """A PNG of a few kilobytes that claims to be `side` x `side`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:900])


BAD_PICTURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "not a picture": (lambda path: path.write_text("hello") and None, "picture"),
    "truncated": (truncated, "truncated"),
    "bomb": (bomb, "pixels"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_pictures_that_are_none(run: Run, tiny: Path, data: Path, tmp_path: Path, kind: str) -> None:
    spoil, word = BAD_PICTURES[kind]
    path = first_picture(data)
    spoil(path)
    refused(train(run, data), str(path), word)
    status, text, _ = run("data", "check", data)
    assert (status, path.name in text) == (2, True)
    refused(run("predict", tiny, path, "--out", tmp_path / "one"), str(path), word)
    refused(run("predict", tiny, data / "train", "--out", tmp_path / "all"), "1 of 4 pictures", str(path))
    assert len(json.loads((tmp_path / "all/predictions.json").read_text())["images"]) == 3  # the others are not lost


def test_category_mismatch_shows_both_lists(run: Run, tiny: Path, data: Path) -> None:
    before = contents(tiny)
    refused(run("evaluate", tiny, "--data", data), "'cat', 'dog', 'bird'", "'disc', 'triangle'")
    assert contents(tiny) == before


def test_unknown_recipe(run: Run, tmp_path: Path) -> None:
    refused(run("train", "fcos/r50_1y", f"output={tmp_path}/run"), "fcos/r50_1y", "did you mean 'fcos/r50_1x'?")
    assert not (tmp_path / "run").exists()


def test_unknown_override_key(run: Run, data: Path) -> None:
    refused(train(run, data, "train.minuets=10"), "train.minuets", "did you mean 'minutes'?")
    refused(run("train", "fcos/lite0", "somewhere"), "somewhere: expected section.key=value")
    refused(train(run, data, "train.lr=fast"), "train.lr")


def test_checkpoint_of_another_recipe(run: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("predict", "fcos/lite0", "a.jpg", "--out", tmp_path, "--weights", tiny / "best.safetensors")
    refused(run(*words), "best.safetensors", "fit")


def test_pickle_that_would_run_code(run: Run, tiny: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    before = contents(tiny)
    refused(run("convert", tmp_path / "trap.pth", "--recipe", "fcos/r50_1x", "--out", tmp_path / "run"), "trap.pth")
    words = ("predict", tiny, "a.jpg", "--out", tmp_path / "out", "--weights", tmp_path / "trap.pth")
    refused(run(*words), "trap.pth", "run code")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "run").exists()
    assert contents(tiny) == before


def test_disk_full_during_save_keeps_the_last_good_files(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(run, data)[0] == 0
    weights = ("best.safetensors", "last.safetensors", "state.pt")
    before = contents(data.parent / "run")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(train(run, data, "train.steps=4", "--resume"), "No space left on device")
    after = contents(data.parent / "run")
    assert all(after[name] == before[name] for name in weights)
    assert not any(name.endswith(".partial") for name in after)
    assert train(run, data, "train.steps=4", "--resume")[0] == 0


def test_wrong_options_are_one_line(run: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("predict", tiny, "a.jpg", "--out", tmp_path)
    refused(run(*words, "--device", "tpu"), "device=tpu")
    refused(run(*words, "--precision", "fp8"), "precision=fp8")
    refused(run(*words, "--scales", "big"), "--scales big")


def test_converting_what_does_not_fit(run: Run, tmp_path: Path) -> None:
    refused(run("convert", tmp_path / "none.pth", "--recipe", "fcos/r50_1x", "--out", tmp_path / "r"), "none.pth")
