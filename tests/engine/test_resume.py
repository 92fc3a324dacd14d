"""A real run, killed without warning and resumed, ends with the weights of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from perpixel.data.synthetic import write_synthetic
from perpixel.engine.checkpoint import load_weights_file
from perpixel.runs import train

STEPS = 14
OVERRIDES = [
    f"train.steps={STEPS}",
    "train.batch_size=2",
    "train.save_every=3",
    "train.log_every=1",
    "train.ema=0.9",
    "train.precision=fp32",
    "train.device=cpu",
    "train.evaluate_every=7",
    "backbone.weights=none",
    "backbone.norm=live",
    "pyramid.channels=64",
    "data.short_side=[64, 96]",
    "data.test_short_side=64",
    "data.workers=1",
]
CALL = "import sys, json, torch; from perpixel.runs import train; a = json.loads(sys.argv[1]); "
CALL += "torch.set_num_threads(a.pop('threads')); train(**a)"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data"), train=9, val=2, seed=1, size=128)


def arguments(data: Path, output: Path) -> dict[str, Any]:
    return {"recipe": "fcos/lite0", "data": str(data), "output": str(output), "overrides": OVERRIDES}


def steps_done(folder: Path) -> int:
    file = folder / "metrics.csv"
    return len(file.read_text().splitlines()) if file.exists() else 0


def killed_at(data: Path, output: Path, rows: int) -> None:
    """Runs in another process, which is killed as soon as that many rows are written."""
    text = json.dumps({**arguments(data, output), "resume": True, "threads": torch.get_num_threads()})
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", CALL, text], env=environment, stdout=subprocess.DEVNULL)
    while steps_done(output) < rows and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def test_two_kills_and_resumes_change_no_bit(data: Path, tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())  # any step must do
    train(**arguments(data, tmp_path / "straight"))
    for first, last in ((2, 7), (8, STEPS)):
        killed_at(data, tmp_path / "killed", chance.randint(first, last))
    result = train(**arguments(data, tmp_path / "killed"), resume=True)
    assert result.step == STEPS
    for name in ("last.safetensors", "best.safetensors"):
        one, other = (load_weights_file(tmp_path / run / name) for run in ("straight", "killed"))
        assert [n for n in one if not torch.equal(one[n], other[n])] == []
