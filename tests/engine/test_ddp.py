"""Two processes through gloo learn what one process with the same global batch learns."""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perpixel.data.synthetic import write_synthetic
from perpixel.runs import train

STEPS = 20
OVERRIDES = [
    f"train.steps={STEPS}",
    "train.batch_size=4",
    "train.log_every=1",
    "train.precision=fp32",
    "train.device=cpu",
    "train.optimizer=sgd",
    "train.lr=0.001",  # with larger steps an untrained net doubles rounding errors at every step
    "train.evaluate_every=0",
    "backbone={name: resnet10t, weights: none, norm: live, frozen_stages: 0}",
    "head={norm: bn, cls_convs: 1, box_convs: 1}",
    "pyramid.channels=64",
    "data.short_side=[96]",
    "data.test_short_side=64",
    "data.workers=0",
]
CALL = "import sys, json, torch; torch.set_num_threads(1); from perpixel.runs import train; "
CALL += "train(**json.loads(sys.argv[1]))"


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_two_processes(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun does, without its start-up time: rank 1 is a new process, rank 0 is this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CALL, json.dumps(arguments)]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        train(**arguments)
        output, _ = other.communicate(timeout=120)
        assert other.returncode == 0, output.decode()
    finally:
        other.kill()


def columns(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.usefixtures("one_thread")
def test_two_processes_and_one_agree_for_twenty_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_synthetic(tmp_path / "data", train=12, val=3, seed=2, size=128)
    arguments = {"recipe": "fcos/lite0", "data": str(data), "overrides": OVERRIDES}
    train(**arguments, output=tmp_path / "one")  # type: ignore[arg-type]
    in_two_processes({**arguments, "output": str(tmp_path / "two")}, monkeypatch)
    one, two = columns(tmp_path / "one"), columns(tmp_path / "two")
    assert len(one) == len(two) == STEPS + 1  # and a validation
    names = ("loss", "cls", "box", "centerness")
    for a, b in zip(one[:STEPS], two[:STEPS], strict=True):
        assert [b[n] for n in names] == pytest.approx([a[n] for n in names], abs=1e-5)
        assert 2 * b["positives"] == a["positives"]  # a mean over processes
    assert two[-1]["bbox/AP"] == pytest.approx(one[-1]["bbox/AP"], abs=0.01)
