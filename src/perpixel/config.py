"""YAML files and `a.b=c` overrides, read into frozen pydantic models.

A config model is declared beside the code that it configures; this module only reads, merges, checks and writes.
Unknown keys are refused and the nearest known key is named. Never imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from perpixel.errors import ConfigError


class Config(BaseModel):
    """Base of every section of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a recipe in YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    return data


# Keys that say the same thing in different words: naming one of them unsays the others below it.
ALTERNATIVES = (frozenset({"steps", "epochs", "minutes"}),)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `change`; mappings merge key by key, anything else is replaced, and an entry that is
    one of several alternatives removes the others."""
    unsaid = {key for group in ALTERNATIVES if group & change.keys() for key in group}
    merged = {key: value for key, value in base.items() if key not in unsaid}
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`data` with `a.b=value` assignments applied in order; values are read as YAML (`true`, `3`, `[1, 2]`, `null`).

    Raises:
        ConfigError: an assignment without `=`, or one that goes through a value that is not a section.
    """
    result: dict[str, Any] = merge({}, data)
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not sign or not all(keys):
            raise ConfigError(f"override {assignment!r}: expected section.key=value, for example train.minutes=10")
        try:
            value = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"override {assignment!r}: {text!r} is not a valid YAML value; quote it") from error
        change: Any = value
        for key in reversed(keys):
            change = {key: change}
        result = merge(result, change)
    return result


def parse(model: type[C], data: Mapping[str, Any], where: str) -> C:
    """A checked config from a mapping.

    Args:
        model: the config class.
        data: nested mapping, as read from YAML.
        where: what the user should look at when something is wrong (a file, a recipe's name).

    Raises:
        ConfigError: unknown keys (with the nearest known one) or values of the wrong kind; all of them, one a line.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def dump(config: Config) -> str:
    """The config as YAML that `parse` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: ' did you mean X?' or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _explain(model: type[BaseModel], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(model, [str(part) for part in item["loc"][:-1]])
        return f"unknown key {path!r}; {nearest(str(item['loc'][-1]), known)}"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "missing" else f", got {item['input']!r}"
    return f"{path}: {message}{got}" if path else message


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the section that `path` leads to."""
    for key in path:
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
