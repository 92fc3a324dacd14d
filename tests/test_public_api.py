"""The public contract: names, signatures, and what importing costs."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import perpixel

CONTRACT: dict[str, list[str]] = {  # name: parameters that other tools rely on, in order
    "build": ["source", "num_classes", "overrides"],
    "load": ["source", "weights", "device", "precision", "threshold", "compile"],
    "train": ["recipe", "data", "output", "overrides", "resume"],
    "evaluate": ["run", "data"],
}


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", CONTRACT)
def test_functions_of_the_contract_keep_their_parameters(name: str) -> None:
    wanted = CONTRACT[name]
    assert parameters(getattr(perpixel, name))[: len(wanted)] == wanted


def test_the_public_names_are_these() -> None:
    assert set(perpixel.__all__) == {
        *("build", "load", "train", "evaluate", "Recipe", "Predictor", "Detections", "Instances", "Categories"),
        *("PerpixelError", "interop"),
    }
    for name in perpixel.__all__:
        assert getattr(perpixel, name).__doc__
        assert name in dir(perpixel)
    assert perpixel.interop.adelaidet.load_weights.__doc__


def test_a_detector_has_its_protocol() -> None:
    net = perpixel.build("fcos/lite0", num_classes=3)
    assert net.num_classes == 3
    assert parameters(net.forward) == ["images", "sizes", "auxiliary"]
    assert parameters(net.loss)[:3] == ["outputs", "batch", "progress"]
    assert parameters(net.decode)[:3] == ["outputs", "sizes", "output_sizes"]


def test_a_predictor_and_its_results_have_their_members() -> None:
    assert parameters(perpixel.Predictor.__call__)[1:] == ["image", "threshold", "batch_size", "scales", "flip"]
    for name in ("boxes", "scores", "labels", "masks", "keypoints", "names", "to_coco", "to_supervision", "draw"):
        assert hasattr(perpixel.Detections, name)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'; public names: build, load"):
        _ = perpixel.fit


def test_importing_is_quick_and_brings_no_torch() -> None:
    program = (
        "import time; t = time.process_time(); import perpixel; dir(perpixel); t = time.process_time() - t\n"
        "import sys; print(t, 'torch' in sys.modules)\n"
        "perpixel.PerpixelError; print(0, 'torch' in sys.modules)"
    )
    rows = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        rows.append(done.stdout.split())
    assert all(words[1::2] == ["False", "False"] for words in rows)
    assert min(float(words[0]) for words in rows) < 0.2  # s of this process: other work on the machine does not count


def test_reading_a_config_needs_no_torch() -> None:
    program = "import perpixel.config, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_function_and_class_says_what_it_is() -> None:
    """Docstrings on everything public, in every module."""
    import importlib
    import pkgutil

    silent = []
    for info in pkgutil.walk_packages(perpixel.__path__, "perpixel."):
        if info.name.endswith("__main__"):
            continue  # importing it is running it
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            public = not name.startswith("_") and getattr(value, "__module__", None) == info.name
            if public and (inspect.isclass(value) or inspect.isfunction(value)) and not value.__doc__:
                silent.append(f"{info.name}.{name}")
    assert silent == []
