"""A run folder with a network that is small, untrained, and sees something everywhere."""

from pathlib import Path

import torch
from torch import nn

from perpixel.config import dump
from perpixel.engine.checkpoint import save_run_header, save_weights
from perpixel.recipe import Recipe, build, load_recipe
from perpixel.structures import Categories

CHANGES = (
    *("backbone.name=resnet18", "backbone.mean=[124, 116, 104]", "backbone.std=[58, 57, 57]", "pyramid.channels=48"),
    *("head.cls_convs=1", "head.box_convs=1", "data.test_short_side=96", "data.test_max_size=160"),
)
CATEGORIES = Categories(("cat", "dog", "bird"), (4, 9, 2))


def tiny_recipe() -> Recipe:
    return load_recipe("fcos/lite0", CHANGES)


def tiny_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = build(tiny_recipe(), len(CATEGORIES))
    nn.init.normal_(net.head.logits.weight, std=0.3)
    nn.init.constant_(net.head.logits.bias, -1.0)
    nn.init.normal_(net.head.centerness.weight, std=0.3)  # type: ignore[union-attr]
    return net.eval()


def write_tiny_run(folder: Path) -> Path:
    run = save_run_header(folder, dump(tiny_recipe()), CATEGORIES)
    save_weights(run.best, tiny_net())
    return folder
