"""Rows, curves and what is watched while a run goes on."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from perpixel.engine.curves import draw_curves, nice_ticks
from perpixel.engine.record import Metrics, clock, read_metrics
from perpixel.engine.watch import LossWindow, StepTimer, require_finite
from perpixel.errors import CheckpointError, NonFiniteLossError


def test_rows_append_and_new_columns_widen_the_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    metrics = Metrics(file, None)
    metrics.add({"step": 1, "loss": 0.5})
    metrics.add({"step": 2, "loss": 0.25})
    assert file.read_text() == "step,loss\n1,0.5\n2,0.25\n"
    metrics.add({"step": 2, "bbox/AP": 0.1})
    assert read_metrics(file) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "bbox/AP": 0.1}]


def test_a_resumed_run_drops_rows_that_it_will_make_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1\n4,0.")  # the last line was cut by a kill
    assert [row["step"] for row in Metrics(file, 2).rows] == [1, 2]
    assert len(read_metrics(file)) == 2
    file.write_text("step,loss\n1,0.5\nx")
    assert len(read_metrics(file)) == 1
    assert Metrics(file, None).rows == []


def test_a_row_that_cannot_be_written_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.csv", None)
    metrics.add({"step": 1})
    metrics.path = tmp_path  # a folder cannot be appended to
    with pytest.raises(CheckpointError, match="cannot be written"):
        metrics.add({"step": 2})


def test_times_are_read_as_by_a_clock() -> None:
    assert [clock(s) for s in (0.4, 61, 3600 + 125)] == ["0:00", "1:01", "1:02:05"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 2.36, [0, 0.5, 1, 1.5, 2, 2.5]),
        (1, 12, [0, 5, 10, 15]),
        (5, 5, [5, 6]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_curves_show_a_line_where_the_values_are(tmp_path: Path) -> None:
    rows = [{"step": float(s), "loss": 1.0 if s < 5 else 0.0, "lr": 0.1} for s in range(10)]
    rows.append({"step": 9.0, "bbox/AP": 0.5, "bbox/AR1": 0.2})
    draw_curves(rows, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert picture.size == (900, 900)  # losses, scores, learning rate
    blue = [(x, y) for x in range(70, 400) for y in range(30, 150) if picture.getpixel((x, y)) == (0, 114, 178)]
    assert len({x for x, _ in blue}) > 200  # the first half of the loss runs along the top
    draw_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_window_gives_means_and_the_sum_of_the_objective() -> None:
    window = LossWindow(torch.device("cpu"))
    assert window.drain() == {}
    for value in (1.0, 3.0):
        window.add(0, [1], {"cls": torch.tensor(value), "box": torch.tensor(0.5)}, {"iou": torch.tensor(value)})
    assert window.drain() == {"loss": 2.5, "cls": 2.0, "box": 0.5, "iou": 2.0}
    assert window.drain() == {}


def test_a_window_that_looks_late_names_the_first_bad_batch() -> None:
    window = LossWindow(torch.device("cpu"))
    window.eager = False  # as on a GPU
    for step, value in enumerate([1.0, float("nan"), float("inf")]):
        window.add(step, [step], {"cls": torch.tensor(1.0), "box": torch.tensor(value)}, {"iou": torch.tensor(value)})
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*box = nan on the images with ids \[1\]"):
        window.drain()


def test_a_number_that_is_only_logged_may_be_anything() -> None:
    window = LossWindow(torch.device("cpu"))
    window.add(0, [1], {"cls": torch.tensor(1.0)}, {"iou": torch.tensor(float("nan"))})
    assert window.drain()["loss"] == 1.0


def test_spoilt_weights_are_named() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    require_finite(net, 3)
    net[1].running_var.fill_(float("inf"))  # type: ignore[union-attr,operator]
    with pytest.raises(NonFiniteLossError, match=r"after step 3 the weight 1\.running_var is not finite"):
        require_finite(net, 3)


def test_a_timer_adds_up_parts_and_costs_nothing_when_off() -> None:
    timer = StepTimer(True, torch.device("cpu"))
    timer.start()
    for part in ("a", "b", "a"):
        timer.lap(part)
    assert list(timer.seconds) == ["a", "b"]
    assert "a " in timer.table(2)
    off = StepTimer(False, torch.device("cpu"))
    off.start()
    off.lap("a")
    assert off.table(1) == "profile: no steps"
