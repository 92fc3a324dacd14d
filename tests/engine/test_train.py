"""The training loop on a tiny detector: what a step does, what ends a run, and what is left behind."""

import csv
import itertools
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_detector import TinyDetector, batch_of, endless, same_weights
from torch import nn

from perpixel.engine.checkpoint import RunFolder, load_state, load_weights_file
from perpixel.engine.settings import TrainConfig
from perpixel.engine.train import TrainResult, train
from perpixel.errors import CheckpointError, ConfigError, NonFiniteLossError
from perpixel.structures import Batch

PLAIN: dict[str, Any] = {"steps": 12, "lr": 0.05, "warmup_steps": 0, "batch_size": 4, "log_every": 1, "device": "cpu"}


def run_tiny(folder: Path, net: nn.Module | None = None, *, batches: Any = endless, **options: Any) -> TrainResult:
    engine = {k: options.pop(k) for k in ("validate", "resume", "console", "metric") if k in options}
    folder.mkdir(exist_ok=True)
    config = TrainConfig(**{**PLAIN, **options})
    if net is None:
        net = fresh()
    return train(net, config, make_batches=batches, steps_per_epoch=5, run=RunFolder(folder), **engine)


def fresh() -> TinyDetector:
    torch.manual_seed(5)
    return TinyDetector()


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_weights_state_rows_and_curves(tmp_path: Path) -> None:
    net = fresh()
    result = run_tiny(tmp_path, net)
    assert (result.reason, result.step, result.best) == ("finished", 12, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "last.safetensors", "metrics.csv", "state.pt"]
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [str(s) for s in range(1, 13)]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["cls"]) + float(row["box"]), rel=1e-6)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    saved = load_weights_file(tmp_path / "last.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    assert Image.open(tmp_path / "curves.png").width > 100


def test_one_step_of_sgd_equals_the_formula(tmp_path: Path) -> None:
    net, by_hand = fresh(), fresh()
    only = {"momentum": 0.0, "weight_decay": 0.01, "decay_norm": False, "decay_bias": False, "channels_last": False}
    run_tiny(tmp_path, net, steps=1, lr=0.1, **only)
    batch = batch_of(0)
    torch.manual_seed(0)  # step 0 of seed 0 on rank 0, for the dropout
    by_hand.train()
    terms = by_hand.loss(by_hand(batch.images, batch.sizes), batch, None)  # type: ignore[arg-type]
    sum(terms.values()).backward()  # type: ignore[union-attr]
    for name, p in by_hand.named_parameters():
        decay = 0.01 if name in ("backbone.0.weight", "head.weight") else 0.0
        expected = p.detach() - 0.1 * (p.grad + decay * p.detach())
        torch.testing.assert_close(dict(net.named_parameters())[name].detach(), expected)


def test_micro_batches_add_up_to_the_mean_gradient(tmp_path: Path) -> None:
    nets = [fresh(), fresh()]
    for net in nets:
        net.backbone[1] = nn.Identity()  # batch norm and dropout see micro-batches, not batches
        net.dropout = nn.Identity()

    def halves(start: int) -> Iterator[Batch]:
        step = start
        while True:
            whole, part = batch_of(step // 2), slice(2 * (step % 2), 2 * (step % 2) + 2)
            yield Batch(images=whole.images[part], sizes=whole.sizes[part], targets=whole.targets[part])
            step += 1

    run_tiny(tmp_path / "whole", nets[0], steps=3)
    run_tiny(tmp_path / "halves", nets[1], steps=3, batches=halves, accumulate=2)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw", "ema": 0.9, "schedule": "cosine", "clip_norm": 1.0}])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    straight, stopped, resumed = fresh(), fresh(), fresh()
    run_tiny(tmp_path / "a", straight, **more)

    def seven_batches(start: int) -> Iterator[Batch]:
        for number, batch in enumerate(endless(start)):
            if number == 7:
                raise KeyboardInterrupt  # as hard as a kill: nothing is saved on the way out
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "b", stopped, batches=seven_batches, save_every=5, **more)
    with torch.no_grad():
        resumed.head.weight.add_(1)  # whatever the network holds, the saved state rules
    torch.rand(17)  # and so does whatever happened to the generators
    result = run_tiny(tmp_path / "b", resumed, resume=True, **more)
    assert same_weights(straight, resumed)
    files = [load_weights_file(tmp_path / x / "last.safetensors") for x in "ab"]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert [r["step"] for r in rows_of(tmp_path / "b")] == [str(s) for s in range(1, 13)]
    assert [r["loss"] for r in rows_of(tmp_path / "b")] == [r["loss"] for r in rows_of(tmp_path / "a")]
    assert result.seconds > 0


def test_resume_without_a_saved_state_starts_anew(tmp_path: Path) -> None:
    assert run_tiny(tmp_path, resume=True, steps=2).step == 2


def test_resume_refuses_another_network_or_mean(tmp_path: Path) -> None:
    run_tiny(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"train\.ema was switched"):
        run_tiny(tmp_path, steps=4, resume=True, ema=0.9)
    with pytest.raises(CheckpointError, match="optimizer's state does not fit"):
        run_tiny(tmp_path, steps=4, resume=True, decay_bias=False)
    other = fresh()
    other.head = nn.Conv2d(4, 3, 1)
    with pytest.raises(CheckpointError, match=r"of another shape \(head.weight"):
        run_tiny(tmp_path, other, steps=4, resume=True)


def test_a_bad_loss_names_its_images_and_spares_the_files(tmp_path: Path) -> None:
    net = fresh()
    net.poison = 702  # in the batch of step 7
    with pytest.raises(NonFiniteLossError, match=r"step 8.*box = inf on the images with ids \[700, 701, 702, 703\]"):
        run_tiny(tmp_path, net, save_every=5)
    assert load_state(tmp_path / "state.pt")["step"] == 5
    assert all(value.isfinite().all() for value in load_weights_file(tmp_path / "last.safetensors").values())


def test_a_bad_weight_is_never_saved(tmp_path: Path) -> None:
    net = fresh()

    def spoil(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(endless(start), start):
            if step == 6:
                net.head.bias.register_hook(lambda grad: grad * float("nan"))
            yield batch

    with pytest.raises(NonFiniteLossError, match=r"the weight head\.bias is not finite"):
        run_tiny(tmp_path, net, batches=spoil, save_every=7)
    assert not (tmp_path / "state.pt").exists()


def test_the_best_validation_is_kept_and_no_progress_ends_the_run(tmp_path: Path) -> None:
    marks = iter([0.1, 0.5, 0.4, None, 0.9])
    seen: list[torch.Tensor] = []

    def validate(net: Any) -> dict[str, dict[str, Any]]:
        seen.append(net.head.weight.detach().clone())
        net.eval()  # the loop must put it back
        return {"bbox": {"AP": next(marks), "per_class": {"cat": {"AP": 0.1}}}}

    net = fresh()
    result = run_tiny(tmp_path, net, steps=50, evaluate_every=2, early_stop=2, validate=validate)
    assert (result.reason, result.step, result.best) == ("early_stop", 8, 0.5)
    assert torch.equal(load_weights_file(tmp_path / "best.safetensors")["head.weight"], seen[1])
    assert [r["bbox/AP"] for r in rows_of(tmp_path) if r["bbox/AP"]] == ["0.1", "0.5", "0.4"]
    assert '"AP": null' in (tmp_path / "scores.json").read_text()
    assert net.training
    again = run_tiny(tmp_path, steps=50, evaluate_every=2, early_stop=2, validate=validate, resume=True)
    assert (again.reason, again.step) == ("early_stop", 8)


def test_the_end_is_validated_once(tmp_path: Path) -> None:
    steps: list[int] = []

    def validate(net: Any) -> dict[str, dict[str, Any]]:
        steps.append(len(steps))
        return {"bbox": {"AP": 0.5}}

    run_tiny(tmp_path / "a", evaluate_every=0, validate=validate)
    assert len(steps) == 1
    run_tiny(tmp_path / "b", steps=10, validate=validate)
    assert len(steps) == 1 + 5
    assert run_tiny(tmp_path / "b", steps=10, validate=validate, resume=True).step == 10
    assert len(steps) == 6


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric 'segm\.AP': validation gave \['bbox'\]"):
        run_tiny(tmp_path, steps=1, validate=lambda net: {"bbox": {"AP": 0.5}}, metric="segm.AP")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def interrupted(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(endless(start), start):
            if step == 3:
                os.kill(os.getpid(), number)
            yield batch

    straight, resumed = fresh(), fresh()
    result = run_tiny(tmp_path / "b", batches=interrupted)
    assert (result.reason, result.step) == ("interrupted", 4)
    assert signal.getsignal(number) is before
    assert load_state(tmp_path / "b" / "state.pt")["step"] == 4
    run_tiny(tmp_path / "b", resumed, resume=True)
    run_tiny(tmp_path / "a", straight)
    assert same_weights(straight, resumed)


def test_minutes_count_training_alone_and_go_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) / 16)  # looked at twice a step: a step takes 1/16 s
    monkeypatch.setattr("perpixel.engine.train.time", clock)

    def five(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(endless(start), start):
            if step == start + 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    minute = {"steps": None, "minutes": 1 / 60, "evaluate_every": 3}

    def score(net: Any) -> dict[str, dict[str, Any]]:
        next(ticks)  # a validation takes time, too
        return {"bbox": {"AP": 0.5}}

    stopped = run_tiny(tmp_path, batches=five, validate=score, **minute)
    assert (stopped.reason, stopped.step, stopped.seconds) == ("interrupted", 5, 5 / 16)
    result = run_tiny(tmp_path, validate=score, resume=True, **minute)
    assert (result.reason, result.step, result.seconds) == ("finished", 16, 1.0)
    assert [float(r["fraction"]) for r in rows_of(tmp_path) if r["fraction"]] == [n / 16 for n in range(1, 17)]


def test_mixed_precision_trains_with_losses_in_float32(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watching(TinyDetector):
        def loss(self, outputs: Any, *rest: Any) -> Any:
            seen.append(outputs.logits.dtype)
            assert not torch.is_autocast_enabled("cpu")
            return super().loss(outputs, *rest)

    for precision in ("bf16", "fp16"):
        run_tiny(tmp_path / precision, Watching(), precision=precision, steps=3)
    assert set(seen) == {torch.float32}


def test_the_running_mean_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    net, seen = fresh(), []
    run_tiny(
        tmp_path,
        net,
        ema=0.99,
        evaluate_every=0,
        validate=lambda mean: seen.append(mean) or {"bbox": {"AP": 0.5}},  # type: ignore[func-returns-value]
    )
    kept = load_weights_file(tmp_path / "best.safetensors")["head.weight"]
    assert torch.equal(kept, seen[0].head.weight)
    assert not torch.equal(kept, net.head.weight)


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    for terminal in (False, True):
        with (tmp_path / f"{terminal}.txt").open("w") as file:
            console = Console(file=file, force_terminal=terminal, width=200)
            run_tiny(tmp_path / "run", console=console, profile=True)
        text = (tmp_path / f"{terminal}.txt").read_text()
        assert "finished after 12 steps" in text
        assert "loader wait" in text
        assert ("\x1b" in text) == terminal
        assert "step 12" in text
        assert "left" in text


def test_tensorboard_gets_losses_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: dict[str, list[int]] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert (folder, purge_step) == (str(tmp_path), None)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            events.setdefault(name, []).append(step)

        def close(self) -> None:
            events["closed"] = []

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run_tiny(tmp_path, steps=2, tensorboard=True, validate=lambda net: {"bbox": {"AP": 0.5}}, evaluate_every=0)
    assert events["train/loss"] == events["train/lr"] == [1, 2]
    assert events["val/bbox/AP"] == [2]
    assert "closed" in events


def test_tensorboard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'perpixel\[tensorboard\]'"):
        run_tiny(tmp_path, tensorboard=True)
