"""Released weights: from a folder, from a stand-in for the Hub, and what is said when there is neither."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from perpixel.coco_categories import COCO
from perpixel.errors import CheckpointError, ConfigError
from perpixel.hub import convert, fetch, load_released, weights_folder
from perpixel.predictor import load
from perpixel.recipe import Recipe, WeightsConfig, build, load_recipe

WEIGHTS = WeightsConfig(hub="tianzhi/AdelaiDet-FCOS", file="FCOS_R_50_1x.pth", license="non-commercial", source="them")
SMALL = (
    *("backbone.name=resnet18", "backbone.stride_in_1x1=false", "backbone.frozen_stages=0", "pyramid.channels=48"),
    *("head.cls_convs=1", "head.box_convs=1", "data.test_short_side=64", "data.test_max_size=96"),
)


def small_recipe() -> Recipe:
    return load_recipe("fcos/r50_1x", SMALL)


def released(net: nn.Module) -> dict[str, Tensor]:
    """A small network's tensors under the names of the release, written out by hand for this one shape."""
    head = "proposal_generator.fcos_head."
    state = {}
    for name, value in net.state_dict().items():
        if name == "branches.box.scales":
            state |= {f"{head}scales.{level}.scale": scale.reshape(1) for level, scale in enumerate(value)}
            continue
        part, _, rest = name.partition(".")
        if part == "backbone":
            rest = rest.removeprefix("body.").replace("conv.weight", "weight").replace("downsample.0", "shortcut")
            if rest.startswith("layer"):
                rest = f"res{int(rest[5]) + 1}{rest[6:]}"
            else:
                rest = f"stem.{rest}"
            state[f"backbone.bottom_up.{rest}"] = value
        elif part == "pyramid":
            kind, index, leaf = rest.split(".")
            place = f"top_block.p{int(index) + 6}" if kind == "extra" else f"fpn_{kind}{int(index) + 3}"
            state[f"backbone.{place}.{leaf}"] = value
        else:
            for ours, theirs in {
                "head.cls_tower.0.conv": "cls_tower.0",
                "head.cls_tower.0.norm": "cls_tower.1",
                "head.box_tower.0.conv": "bbox_tower.0",
                "head.box_tower.0.norm": "bbox_tower.1",
                "head.logits": "cls_logits",
                "head.centerness": "ctrness",
                "branches.box.ltrb": "bbox_pred",
            }.items():
                if name.startswith(ours + "."):
                    state[head + theirs + name.removeprefix(ours)] = value
    return state


@pytest.fixture
def pth(tmp_path: Path) -> tuple[Path, nn.Module]:
    net = build(small_recipe(), 80)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    torch.save({"model": released(net), "__author__": "them", "iteration": 3}, tmp_path / "released.pth")
    return tmp_path / "released.pth", net


def test_coco_has_its_80_categories_and_ids() -> None:
    assert len(COCO) == 80
    assert COCO.names[0] == "person"
    assert (COCO.names[11], COCO.ids[11]) == ("stop sign", 13)
    assert (COCO.names[79], COCO.ids[79]) == ("toothbrush", 90)
    assert max(COCO.ids) == 90


def test_coco_is_in_the_order_of_its_own_file(shared: Path) -> None:
    import json

    entries = json.loads((shared / "data/coco-mini/annotations/instances_val.json").read_text())["categories"]
    assert [(c["id"], c["name"]) for c in entries] == list(zip(COCO.ids, COCO.names, strict=True))


def test_every_tensor_and_the_classes_come_with_a_released_file(pth: tuple[Path, nn.Module]) -> None:
    file, net = pth
    loaded, categories = load_released(small_recipe(), file)
    assert categories is COCO
    wanted = net.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


def test_converting_gives_a_run_that_predicts_as_the_file_does(
    pth: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = pth
    run = convert(file, small_recipe(), tmp_path / "run")
    image = torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8)
    monkeypatch.setenv("PERPIXEL_WEIGHTS", str(tmp_path))
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threshold": 0.0}
    from_run, from_file = load(run, **options), load(run / "recipe.yaml", weights=file, **options)
    assert from_run.categories == from_file.categories == COCO
    assert torch.equal(from_run(image).boxes, from_file(image).boxes)
    with pytest.raises(CheckpointError, match="already holds a run"):
        convert(file, small_recipe(), tmp_path / "run")


def test_another_number_of_classes_has_nameless_ones(tmp_path: Path) -> None:
    torch.save(released(build(small_recipe(), 3)), tmp_path / "three.pth")
    assert load_released(small_recipe(), tmp_path / "three.pth")[1].names == ("class 0", "class 1", "class 2")


def test_files_that_do_not_fit_are_refused(pth: tuple[Path, nn.Module], tmp_path: Path) -> None:
    file, _ = pth
    with pytest.raises(CheckpointError, match=r"released.pth: does not fit recipe fcos/r50_1x: .*pyramid"):
        load_released(load_recipe("fcos/r50_1x", [*SMALL, "pyramid.channels=96"]), file)
    with pytest.raises(CheckpointError, match=r"0 tensors of the network are not in the file and 4 of the file"):
        load_released(load_recipe("fcos/r50_1x", [*SMALL, "head.cls_convs=0"]), file)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"strange.pth: expected the names of the authors' release"):
        load_released(small_recipe(), tmp_path / "strange.pth")
    with pytest.raises(ConfigError, match="unknown"):
        convert(file, "fcos/r50_2x", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match=r"trap.pth"):
        load_released(small_recipe(), tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def recipe_with_weights() -> Recipe:
    return small_recipe().model_copy(update={"weights": WEIGHTS, "name": "fcos/r50_1x"})


def test_a_file_in_the_local_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERPIXEL_WEIGHTS", str(tmp_path))
    (tmp_path / WEIGHTS.file).write_bytes(b"x")
    assert fetch(recipe_with_weights()) == tmp_path / WEIGHTS.file
    monkeypatch.delenv("PERPIXEL_WEIGHTS")
    assert weights_folder() == Path.home() / ".cache" / "perpixel"


def test_without_a_network_the_error_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(address: str) -> None:
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setenv("PERPIXEL_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(CheckpointError) as caught:
        fetch(recipe_with_weights())
    message = str(caught.value)
    assert "https://huggingface.co/tianzhi/AdelaiDet-FCOS/resolve/main/FCOS_R_50_1x.pth" in message
    assert str(tmp_path / "FCOS_R_50_1x.pth") in message
    assert "no route to host" in message
    assert "\n" not in message


class StandIn(BaseHTTPRequestHandler):
    """The one file of the Hub that is asked for."""

    content = b"weights"
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        found = self.path == f"/{WEIGHTS.hub}/resolve/main/{WEIGHTS.file}"
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_file_is_downloaded_from_the_hub_once(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from perpixel.hub import fetch\nfrom perpixel.recipe import load_recipe\n"
        "print(fetch(load_recipe('fcos/r50_1x')).read_text())"
    )
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "PERPIXEL_WEIGHTS": str(tmp_path),
        "PATH": "",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
        )
    finally:
        server.shutdown()
    assert done.stdout.strip() == "weights", done.stderr
    assert any(WEIGHTS.file in path for path in StandIn.asked)
