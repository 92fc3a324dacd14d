"""Recipes: everything that decides what is built and how it is trained, in one YAML file. This is the only file that
names every concrete class.

A recipe is found by name among the package's `recipes/` ("fcos/r50_1x"), or by the path of a YAML file. `base:`
names another recipe that it changes; `a.b=c` overrides come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from perpixel.assign import AssignConfig
from perpixel.config import Config, merge, nearest, override, parse, read_yaml
from perpixel.data.loading import DataConfig
from perpixel.engine.settings import TrainConfig
from perpixel.errors import ConfigError
from perpixel.methods.boxinst import BoxCriterion, BoxInstConfig
from perpixel.methods.condinst import Criterion, DiceCriterion, MaskBranch, MaskConfig
from perpixel.methods.detector import ClsConfig, DecodeConfig, Detector
from perpixel.methods.fcos import BoxBranch, BoxConfig
from perpixel.nn.backbones import BackboneConfig
from perpixel.nn.heads import HeadConfig
from perpixel.nn.pyramids import PyramidConfig
from perpixel.ops.masks import CELL

RECIPES = Path(__file__).parent / "recipes"


class WeightsConfig(Config):
    """Released weights of a recipe.

    Args:
        hub: repository on the Hugging Face Hub.
        file: name of the file in it.
        license: terms of the weights, in words.
        source: who trained them.
    """

    hub: str
    file: str
    license: str
    source: str


class Recipe(Config):
    """See the sections' own classes for their keys.

    Args:
        name: how the recipe was asked for.
        description: one line.
        published: scores by name, of the published weights ("bbox AP": 0.387).
        weights: released weights that fit the recipe, if any.
        box: the box branch; null for a network without one.
        mask: the mask branch; null for none.
        boxinst: how masks are learned from boxes; null: from true masks.
    """

    name: str = ""
    description: str = ""
    published: dict[str, float] = {}
    weights: WeightsConfig | None = None
    backbone: BackboneConfig = BackboneConfig()
    pyramid: PyramidConfig = PyramidConfig()
    head: HeadConfig = HeadConfig()
    assign: AssignConfig = AssignConfig()
    cls: ClsConfig = ClsConfig()
    box: BoxConfig | None = BoxConfig()
    mask: MaskConfig | None = None
    boxinst: BoxInstConfig | None = None
    decode: DecodeConfig = DecodeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def needs(self) -> frozenset[Literal["masks", "keypoints"]]:
        """What the branches learn from, beside boxes."""
        return self.criterion.needs if self.mask is not None else frozenset()

    @property
    def criterion(self) -> Criterion:
        """How masks are learned."""
        return DiceCriterion() if self.boxinst is None else BoxCriterion(self.boxinst)


def recipe_names() -> list[str]:
    """Names of all recipes of the package."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def load_recipe(source: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name, path or as it is, with `a.b=c` overrides applied.

    Raises:
        ConfigError: no such recipe, unknown keys, or values of the wrong kind.
    """
    if isinstance(source, Recipe):
        data: dict[str, Any] = source.model_dump(mode="json")
        return parse(Recipe, override(data, overrides), source.name or "recipe")
    data = _read(str(source))
    data.setdefault("name", str(source))
    return parse(Recipe, override(data, overrides), str(source))


def _read(source: str) -> dict[str, Any]:
    path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"recipe {source!r}: unknown; {nearest(source, recipe_names())}")
    data = read_yaml(path)
    base = data.pop("base", None)
    if base is None:
        return data
    below = read_yaml(RECIPES / f"{base}.yaml")
    if "base" in below:
        raise ConfigError(f"{path}: base {base!r} has a base of its own; one level is allowed, name the root")
    for own in ("description", "published", "weights", "name"):  # these speak of one recipe alone
        below.pop(own, None)
    return merge(below, data)


def build(
    source: str | Path | Recipe, num_classes: int, overrides: Sequence[str] = (), *, imagenet: bool = False
) -> Detector:
    """A network with fresh weights.

    Args:
        source: recipe name, path, or `Recipe`.
        num_classes: C.
        overrides: `a.b=c` changes to the recipe.
        imagenet: fill the backbone with the weights that `backbone.weights` names, as training does.

    Raises:
        ConfigError: the recipe cannot be used.
    """
    recipe = load_recipe(source, overrides)
    if num_classes < 1:
        raise ConfigError(f"num_classes: expected at least 1, got {num_classes}")
    _check(recipe)
    backbone = recipe.backbone if imagenet else recipe.backbone.model_copy(update={"weights": "none"})
    return Detector(
        num_classes,
        backbone=backbone,
        pyramid=recipe.pyramid,
        head=recipe.head,
        assign=recipe.assign,
        cls=recipe.cls,
        decode=recipe.decode,
        make_branches=lambda channels, strides: _branches(recipe, num_classes, channels, tuple(strides)),
    )


def _check(recipe: Recipe) -> None:
    """Refuses sections that cannot go together."""
    mask = recipe.mask
    if recipe.box is None and mask is None:
        raise ConfigError("recipe: box and mask are both null, so nothing is predicted; set one of them")
    if recipe.box is None and (recipe.head.quality == "iou" or recipe.decode.quality == "from_box"):
        raise ConfigError("recipe: head.quality=iou and decode.quality=from_box need boxes, but box is null")
    if recipe.boxinst is not None and mask is None:
        raise ConfigError("recipe: boxinst says how masks are learned, but mask is null; add a section mask")
    if mask is not None and recipe.needs and recipe.data.mask_stride > (stride := CELL // mask.factor):
        raise ConfigError(
            f"data.mask_stride: masks upsampled by mask.factor={mask.factor} are learned every {stride} px, but "
            f"truth is sampled every {recipe.data.mask_stride} px; set data.mask_stride={stride}"
        )


def _branches(recipe: Recipe, num_classes: int, channels: int, strides: tuple[int, ...]) -> dict[str, nn.Module]:
    branches: dict[str, nn.Module] = {}
    if recipe.box is not None:
        branches["box"] = BoxBranch(channels, strides, recipe.box)
    if recipe.mask is not None:
        branches["mask"] = MaskBranch(
            channels, strides, num_classes, recipe.mask, recipe.criterion, alone=recipe.box is None
        )
    return branches
