"""Every recipe builds, learns, decodes and is stored; names and files are found or refused with help."""

import pytest
import torch

from perpixel.config import dump
from perpixel.errors import ConfigError
from perpixel.recipe import Recipe, build, load_recipe, recipe_names
from perpixel.structures import Batch, Instances, Progress


def tiny_batch(needs: frozenset[str]) -> Batch:
    """A picture of two objects and a smaller one without any, with the labels that a recipe learns from."""
    boxes = torch.tensor([[10.0, 10, 60, 70], [70, 20, 120, 90]])
    rows, columns = torch.arange(2, 96, 4)[:, None], torch.arange(2, 128, 4)[None]
    masks = torch.stack([(columns > x0) & (columns < x1) & (rows > y0) & (rows < y1) for x0, y0, x1, y1 in boxes])
    labels = {"masks": masks, "mask_stride": 4} if "masks" in needs else {}
    truth = Instances(size=(96, 128), boxes=boxes, labels=torch.tensor([0, 2]), **labels)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    sizes = [(96, 128), (80, 100)]
    return Batch(images=images, sizes=sizes, original_sizes=sizes, targets=[truth, Instances.empty((80, 100))])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_learns_two_steps_decodes_and_reloads(name, tmp_path) -> None:
    recipe = load_recipe(name)
    net = build(name, num_classes=3)
    batch = tiny_batch(recipe.needs)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        outputs = net(batch.images, batch.sizes, auxiliary=True)
        losses = net.loss(outputs, batch, Progress(step, step / 2))
        assert all(torch.isfinite(value) for value in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        expected = net(batch.images, batch.sizes)
        found = net.decode(expected, batch.sizes, [(192, 256), (80, 100)])
    assert [d.size for d in found] == [(192, 256), (80, 100)]
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = build(name, num_classes=3).eval()
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again(batch.images, batch.sizes).logits, expected.logits)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_being_stored_and_says_what_it_is(name, tmp_path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe.description
    assert recipe.name == name
    assert recipe.weights is None or "non-commercial" in recipe.weights.license


def test_a_base_lends_everything_but_what_speaks_of_itself() -> None:
    root, derived = load_recipe("fcos/r50_1x"), load_recipe("fcos/ms_r50_2x")
    assert derived.backbone == root.backbone
    assert derived.train.steps == 2 * root.train.steps
    assert derived.published != root.published


def test_names_paths_and_recipes_are_all_sources(tmp_path) -> None:
    recipe = load_recipe("fcos/lite0", ["head.cls_convs=1"])
    assert recipe.head.cls_convs == 1
    assert load_recipe(recipe, ["head.cls_convs=3"]).head.cls_convs == 3
    (tmp_path / "mine.yaml").write_text("base: fcos/lite0\nhead: {norm: none}\n")
    assert load_recipe(tmp_path / "mine.yaml").head.norm == "none"


def test_mistakes_are_explained(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"recipe 'fcos/r5O_1x': unknown; did you mean 'fcos/r50_1x'"):
        load_recipe("fcos/r5O_1x")
    with pytest.raises(ConfigError, match=r"unknown key 'train.minuets'; did you mean 'minutes'"):
        load_recipe("fcos/lite0", ["train.minuets=3"])
    (tmp_path / "deep.yaml").write_text("base: fcos/ms_r50_2x\n")
    with pytest.raises(ConfigError, match="one level is allowed"):
        load_recipe(tmp_path / "deep.yaml")
    with pytest.raises(ConfigError, match="at least 1"):
        build("fcos/lite0", num_classes=0)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().name = "x"
