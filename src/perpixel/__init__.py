"""perpixel: boxes, keypoints and instance masks predicted at every location of a feature pyramid.

    net  = perpixel.build("fcos/r50_1x", num_classes=80)
    pred = perpixel.load("fcos/r50_1x")
    det  = pred("photo.jpg", threshold=0.3)
    perpixel.train("fcos/lite0", data="my_coco_folder", output="runs/a", overrides=["train.minutes=10"])
    perpixel.evaluate("runs/a", data="my_coco_folder")

Public names are resolved when they are first used, so that importing perpixel does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from perpixel import interop as interop
    from perpixel.errors import PerpixelError as PerpixelError
    from perpixel.predictor import Predictor as Predictor
    from perpixel.predictor import load as load
    from perpixel.recipe import Recipe as Recipe
    from perpixel.recipe import build as build
    from perpixel.runs import evaluate as evaluate
    from perpixel.runs import train as train
    from perpixel.structures import Categories as Categories
    from perpixel.structures import Detections as Detections
    from perpixel.structures import Instances as Instances

_HOME = {
    "build": "recipe",
    "load": "predictor",
    "train": "runs",
    "evaluate": "runs",
    "Recipe": "recipe",
    "Predictor": "predictor",
    "Detections": "structures",
    "Instances": "structures",
    "Categories": "structures",
    "PerpixelError": "errors",
}
_SUBPACKAGES = ("interop",)

__all__ = [*_HOME, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
