"""The benchmarks measure what they say: equal networks, equal treatment, nothing run twice."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import contest
import part
import provenance
import speed
import vs_torchvision
from folds import cross_validation, own_split, read
from paired import bootstrap_error, mean_and_error
from peers import TorchvisionDetector
from perpixel.data.synthetic import write_synthetic
from perpixel.recipe import load_recipe
from perpixel.structures import Batch, Instances, Progress
from timing import take_turns

SMALL = ["backbone.weights=none", "pyramid.channels=64", "head.cls_convs=1", "head.box_convs=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("pictures"), train=4, val=2, size=128)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return speed.same_networks()


def test_ours_and_theirs_with_the_same_weights_predict_the_same(networks):
    ours, theirs = networks
    picture = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8)
    with torch.no_grad():
        outputs = ours(picture[None])
        normalized = theirs.transform.normalize(picture.float() / 255)
        head = theirs.head(list(theirs.backbone(normalized[None]).values()))
    torch.testing.assert_close(head["cls_logits"], outputs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head["bbox_regression"], outputs.ltrb, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(head["bbox_ctrness"][..., 0], outputs.centerness, atol=1e-4, rtol=1e-4)


def test_thresholds_let_the_wanted_number_of_candidates_through(networks):
    ours, theirs = networks
    told = speed.limit_candidates(ours, theirs, torch.randint(0, 256, (3, 320, 320), dtype=torch.uint8))
    assert told == f"ours {speed.CANDIDATES}, torchvision {speed.CANDIDATES}"


@pytest.fixture(scope="module")
def peer() -> TorchvisionDetector:
    torch.manual_seed(0)
    return TorchvisionDetector(load_recipe("fcos/lite0", [*SMALL, "decode.score_threshold=0.01"]), 3)


def test_peer_computes_torchvisions_own_losses(peer):
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    sizes = [(96, 128), (80, 100)]
    images[1, :, 80:], images[1, :, :, 100:] = 0, 0
    first = Instances(
        size=sizes[0],
        boxes=torch.tensor([[10.0, 10, 60, 70], [40, 20, 120, 90], [0, 0, 128, 96]]),
        labels=torch.tensor([0, 2, 1]),
        ignore=torch.tensor([False, False, True]),
    )
    batch = Batch(images=images, sizes=sizes, targets=[first, Instances.empty(sizes[1])])
    peer.train()
    losses = peer.loss(peer(images, sizes), batch, Progress())
    peer.model.transform._skip_resize = True
    given = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(images, sizes, strict=True)]
    truth = [{"boxes": t.boxes[~t.ignore], "labels": t.labels[~t.ignore]} for t in batch.targets]
    expected = peer.model(given, truth)
    assert losses["cls"].item() == pytest.approx(expected["classification"].item(), rel=1e-5)
    assert losses["box"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-5)
    assert losses["centerness"].item() == pytest.approx(expected["bbox_ctrness"].item(), rel=1e-5)


@torch.no_grad()
def test_peer_finds_what_torchvision_finds(peer):
    image = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    peer.eval()
    peer.model.transform.min_size, peer.model.transform.max_size = (96,), 128
    expected = peer.model([image[0].float() / 255])[0]
    (found,) = peer.decode(peer(image), [(96, 128)])
    (doubled,) = peer.decode(peer(image), [(96, 128)], [(192, 256)])
    assert len(found) == len(expected["boxes"]) > 0
    torch.testing.assert_close(found.boxes, expected["boxes"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.scores, expected["scores"])
    torch.testing.assert_close(doubled.boxes, 2 * found.boxes)


def test_peer_freezes_what_the_recipe_freezes(peer):
    body = peer.model.backbone.body
    assert not any(p.requires_grad for p in body.conv_stem.parameters())
    assert any(p.requires_grad for p in body.blocks[-1].parameters())
    assert not any("Batch" in type(m).__name__ and "Frozen" not in type(m).__name__ for m in body.modules())


def test_every_picture_is_held_out_once_with_its_objects(pictures, tmp_path):
    splits = cross_validation(pictures, tmp_path, 3, [])
    held_out = [json.loads(split.val.read_text()) for split in splits]
    names = [image["file_name"] for content in held_out for image in content["images"]]
    assert sorted(names) == sorted(image["file_name"] for image in read(pictures, ["train", "val"], [])["images"])
    assert len(set(names)) == 6
    assert all((pictures / name).is_file() for name in names)
    for split, content in zip(splits, held_out, strict=True):
        ids = {image["id"] for image in content["images"]}
        assert {a["image_id"] for a in content["annotations"]} <= ids
        assert not ids & {image["id"] for image in json.loads(split.train.read_text())["images"]}
        assert split.pictures == 2


def test_only_the_named_categories_are_kept_and_all_pictures(pictures, tmp_path):
    name = read(pictures, ["train"], [])["categories"][1]["name"]
    content = json.loads(own_split(pictures, tmp_path, [name]).train.read_text())
    assert [category["name"] for category in content["categories"]] == [name]
    assert {a["category_id"] for a in content["annotations"]} <= {content["categories"][0]["id"]}
    assert len(content["images"]) == 4
    with pytest.raises(SystemExit, match="no categories"):
        own_split(pictures, tmp_path, ["unicorn"])


def test_standard_error_of_a_mean_by_hand():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])  # deviations -2, -1, 0, 3: variance 14 / 3
    assert mean == 3.0
    assert error == pytest.approx((14 / 3 / 4) ** 0.5)


def test_bootstrap_tells_equal_results_from_unlike_ones(pictures, tmp_path):
    split = own_split(pictures, tmp_path, [])
    truth = json.loads(split.train.read_text())
    perfect = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for a in truth["annotations"]]
    half = {image["id"] for image in truth["images"][::2]}
    some = [row for row in perfect if row["image_id"] in half]
    for name, rows in (("perfect", perfect), ("some", some)):
        (tmp_path / name).write_text(json.dumps(rows))
    assert bootstrap_error(split.train, tmp_path / "perfect", tmp_path / "perfect", rounds=5) == 0
    assert bootstrap_error(split.train, tmp_path / "perfect", tmp_path / "some", rounds=20) > 0.01


def test_turns_alternate_and_ratios_are_of_the_same_round():
    order = []
    work = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = take_turns(work, rounds=2, warmup=1, max_other_cpus=float("inf"))
    assert "".join(order) == "ababba"
    assert [len(seconds) for seconds in times.seconds.values()] == [2, 2]
    times.seconds.update(a=[1.0, 8.0, 3.0], b=[2.0, 4.0, 3.0])
    assert times.ratio("a", "b") == 1.0
    assert times.spread("a", "b") == (0.5, 2.0)


def test_a_section_replaces_its_older_self_alone(tmp_path):
    file = tmp_path / "RESULTS.md"
    for title, body in (("One", "first"), ("Two", "second"), ("One", r"third \1")):
        provenance.write_section(title, body, file)
    text = file.read_text()
    assert text.count("## One\n") == text.count("## Two\n") == 1
    assert "first" not in text
    assert text.index(r"third \1") < text.index("second")


def test_part_that_fails_or_is_interrupted_stops_the_contest():
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    contest._run_to_end(python("pass"), {}, "good")
    with pytest.raises(SystemExit, match="goes on from here"):
        contest._run_to_end(python(f"raise SystemExit({part.INTERRUPTED})"), {}, "stopped")
    with pytest.raises(SystemExit, match="status 3"):
        contest._run_to_end(python("raise SystemExit(3)"), {}, "broken")


def test_smoke_contest_records_every_part_and_runs_none_twice(tmp_path, monkeypatch, capsys):
    calls = []

    def in_this_process(command: list[str], environment: dict[str, str], what: str) -> None:
        calls.append(what)
        assert part.main(Path(command[2]), Path(command[3])) == 0

    threads = torch.get_num_threads()
    monkeypatch.setattr(contest, "_run_to_end", in_this_process)
    monkeypatch.setattr(sys, "argv", ["vs_torchvision.py", "--smoke", "--out", str(tmp_path)])
    vs_torchvision.main()
    assert len(calls) == 4  # two entrants on two folds; the search on fold 0 is one of them
    vs_torchvision.main()
    assert len(calls) == 4
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert all(row["steps"] >= 1 and row["code"] for row in rows)
    report = (tmp_path / "report.md").read_text()
    assert "6 held-out pictures" in report
    assert "standard error, over 2 pairs" in report
    assert str(tmp_path) not in report
    assert "recorded" in capsys.readouterr().out


@pytest.mark.slow
def test_speed_reports_every_target(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SIZE", (96, 128))
    monkeypatch.setattr(speed, "STEP_SIZE", (96, 128))
    out = tmp_path / "RESULTS.md"
    options = ["--rounds", "1", "--patience", "1", "--threads", "1", "--parts", "inference", "training"]
    monkeypatch.setattr(sys, "argv", ["speed.py", "--data", str(pictures), "--out", str(out), *options])
    speed.main()
    text = out.read_text()
    assert text.count("(target ≤") == 5
    assert "## Speed: inference" in text
    assert "## Speed: training step" in text
    assert str(pictures) not in text


@pytest.mark.slow
def test_smoke_contest_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vs_torchvision.py", "--smoke", "--out", str(tmp_path)])
    vs_torchvision.main()
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == 4
