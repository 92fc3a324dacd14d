"""Learning rates and lengths, worked out by hand."""

import math
from typing import Any

import pytest
import torch
from tiny_detector import TinyDetector
from torch import nn

from perpixel.config import merge, override, parse
from perpixel.engine.optim import Ema, make_optimizer, parameter_groups, set_rate
from perpixel.engine.schedule import Schedule
from perpixel.engine.settings import TrainConfig
from perpixel.errors import ConfigError


def schedule(steps_per_epoch: int = 10, **options: Any) -> Schedule:
    return Schedule(TrainConfig(**options), steps_per_epoch)


def test_length_is_steps_epochs_or_minutes() -> None:
    assert schedule(steps=7).steps == 7
    assert schedule(epochs=2.5).steps == 25
    assert schedule().steps == 120  # 12 epochs
    timed = schedule(minutes=2)
    assert (timed.steps, timed.seconds) == (None, 120.0)
    assert timed.fraction(step=1000, elapsed=30.0) == 0.25
    assert schedule(steps=8).fraction(step=2, elapsed=1e9) == 0.25
    assert timed.fraction(step=0, elapsed=500.0) == 1.0


def test_two_lengths_are_refused_and_the_later_word_wins() -> None:
    with pytest.raises(ConfigError, match="expected one of steps, epochs and minutes, got steps and minutes"):
        parse(TrainConfig, {"steps": 3, "minutes": 1}, "recipe")
    assert merge({"train": {"steps": 90, "lr": 1}}, {"train": {"minutes": 5}}) == {"train": {"lr": 1, "minutes": 5}}
    assert override({"train": {"steps": 90}}, ["train.minutes=5", "train.epochs=2"]) == {"train": {"epochs": 2}}


def test_step_schedule_falls_at_its_milestones() -> None:
    s = schedule(steps=90, warmup_steps=0, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert s.rate(10, 0.49) == 1.0
    assert s.rate(45, 0.5) == pytest.approx(0.1)
    assert s.rate(89, 0.99) == pytest.approx(0.01)


def test_linear_and_cosine_fall_to_zero() -> None:
    line = schedule(steps=10, warmup_steps=0, schedule="linear")
    curve = schedule(steps=10, warmup_steps=0, schedule="cosine")
    assert [line.rate(0, f) for f in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [curve.rate(0, f) for f in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert curve.rate(0, 0.25) == pytest.approx(0.5 + math.sqrt(0.125))


def test_warm_up_rises_by_steps_but_ends_with_a_tenth_of_the_run() -> None:
    s = schedule(steps=100_000, warmup_steps=100, warmup_factor=0.1)
    assert s.rate(0, 0.0) == pytest.approx(0.1)
    assert s.rate(50, 0.0) == pytest.approx(0.55)
    assert s.rate(100, 0.001) == 1.0
    assert s.rate(10, 0.05) == pytest.approx(0.55)  # a short run: half of its tenth
    assert s.rate(20, 0.1) == 1.0


def test_time_left_is_measured_from_where_this_process_began() -> None:
    assert schedule(minutes=1).seconds_left(5, 45.0, (0, 0.0)) == 15.0
    s = schedule(steps=30)
    assert s.seconds_left(10, 100.0, (10, 100.0)) is None
    assert s.seconds_left(20, 105.0, (10, 100.0)) == pytest.approx(5.0)


def test_validations_come_by_steps_or_five_in_a_run() -> None:
    assert [schedule(steps=9, evaluate_every=3).validation_due(s, 0, 0) for s in (2, 3, 6)] == [False, True, True]
    assert not schedule(steps=9, evaluate_every=0).validation_due(3, 0.1, 0.9)
    every = schedule(minutes=9)
    assert every.validation_due(1, 0.19, 0.2)
    assert not every.validation_due(1, 0.2, 0.39)


def test_groups_keep_decay_off_norms_and_biases() -> None:
    net = TinyDetector()
    net.backbone[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    config = TrainConfig(lr=0.1, weight_decay=0.5, decay_bias=False, decay_norm=False, backbone_lr_factor=0.2)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {
        (group["weight_decay"], round(group["lr"], 9)): [names[id(p)] for p in group["params"]]
        for group in parameter_groups(net, config)
    }
    assert found == {
        (0.5, 0.02): ["backbone.0.weight"],
        (0.0, 0.02): ["backbone.1.weight", "backbone.1.bias"],
        (0.5, 0.1): ["head.weight"],
        (0.0, 0.1): ["head.bias"],
    }
    everything = parameter_groups(TinyDetector(), TrainConfig(decay_norm=True, decay_bias=True, weight_decay=0.5))
    assert [group["weight_decay"] for group in everything] == [0.5]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_rates_follow_their_base(name: Any, kind: type) -> None:
    optimizer = make_optimizer(TinyDetector(), TrainConfig(optimizer=name, lr=0.1, backbone_lr_factor=0.5))
    assert isinstance(optimizer, kind)
    set_rate(optimizer, 0.3)
    set_rate(optimizer, 0.2)
    assert sorted({round(g["lr"], 9) for g in optimizer.param_groups}) == [0.01, 0.02]


def test_running_mean_forgets_the_start_and_copies_buffers() -> None:
    net = nn.BatchNorm1d(1)
    mean = Ema(net, 0.9)
    assert mean.net.weight.item() == 1.0
    with torch.no_grad():
        net.weight.fill_(11.0)
        net.running_mean.fill_(4.0)  # type: ignore[union-attr]
    mean.update(net, step=0)  # decay 0.1
    assert mean.net.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 11)
    assert mean.net.running_mean.item() == 4.0
    mean.update(net, step=10_000)  # decay 0.9
    assert mean.net.weight.item() == pytest.approx(0.9 * 10 + 0.1 * 11)
