"""Weights and results of other projects. Submodules are imported when they are first used."""

from importlib import import_module
from types import ModuleType

_SUBMODULES = ("adelaidet",)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_SUBMODULES))
