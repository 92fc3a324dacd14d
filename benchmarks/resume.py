"""Does a run that is killed again and again end with the same weights as one that never was?

    python benchmarks/resume.py --kills 20

A run on the CPU is killed with SIGKILL at random moments: in a step, in a save, in a validation, while it starts. It
is resumed each time. In the end its weights, running mean, optimizer and best weights are compared bit for bit with
those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpixel.data.synthetic import write_synthetic
from perpixel.engine.checkpoint import load_state, load_weights_file
from provenance import table, write_section

OVERRIDES = [
    *("train.batch_size=2", "train.save_every=3", "train.log_every=1", "train.ema=0.99", "train.evaluate_every=10"),
    *("train.device=cpu", "train.precision=fp32", "backbone.weights=none", "backbone.norm=live"),
    *("data.short_side=[96, 128]", "data.test_short_side=96", "data.workers=2", "data.color_jitter=0.2"),
]
CALL = (
    "import sys, json, torch; a = json.loads(sys.argv[1]); torch.set_num_threads(a.pop('threads')); "
    "from perpixel.runs import train; train(**a)"
)


def start(arguments: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Training in a process, and a process group, of its own."""
    command = [sys.executable, "-c", CALL, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def rows(folder: Path) -> int:
    file = folder / "metrics.csv"
    return len(file.read_text().splitlines()) if file.exists() else 0


def saved_step(folder: Path) -> int:
    file = folder / "state.pt"
    return int(load_state(file)["step"]) if file.exists() else 0


def kill_once(arguments: dict[str, Any], chance: random.Random) -> str:
    """Starts or resumes the run and kills it a few rows and a random moment later; says what it was killed in."""
    folder = Path(arguments["output"])
    seen, wanted = rows(folder), chance.randint(0, 8)
    process = start(arguments)
    began, grown = time.monotonic(), 0
    while grown < wanted and process.poll() is None:
        time.sleep(0.002)
        now = rows(folder)
        grown += max(now - seen, 0)  # a resume drops rows that it will make again
        seen = now
    time.sleep(chance.uniform(0, 4.0 if wanted == 0 else 0.5))
    if process.poll() is not None:
        raise SystemExit("the run ended before it could be killed; give it more --steps")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return f"{time.monotonic() - began:.1f} s"


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of the parts of two nested states that are not equal bit for bit."""
    if isinstance(a, Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        missing = [f"{name}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}[{i}]")]
    return [] if a == b or name == ".seconds" else [name]  # the clock alone may differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="of the moments of the kills")
    options = parser.parse_args()
    chance, folder = random.Random(options.seed), Path(tempfile.mkdtemp())
    data = write_synthetic(folder / "data", train=24, val=4, seed=1, size=160)
    arguments: dict[str, Any] = {"recipe": "fcos/lite0", "data": str(data), "threads": options.threads, "resume": True}
    arguments["overrides"] = [*OVERRIDES, f"train.steps={options.steps}"]
    alone, killed = ({**arguments, "output": str(folder / name)} for name in ("alone", "killed"))
    if start(alone).wait() != 0:
        raise SystemExit("the run that was left alone failed")
    lines = []
    for number in range(1, options.kills + 1):
        lived = kill_once(killed, chance)
        step = saved_step(folder / "killed")
        lines.append([str(number), lived, str(step)])
        print(f"kill {number}: lived {lived}, last saved step {step}", flush=True)
    if start(killed).wait() != 0:
        raise SystemExit("the last resume failed")
    found = differences(*(load_state(folder / name / "state.pt") for name in ("alone", "killed")))
    for file in ("best.safetensors", "last.safetensors"):
        found += differences(*(load_weights_file(folder / name / file) for name in ("alone", "killed")), file)
    verdict = f"{len(found)} parts differ: {found[:5]}" if found else "all weights and states are equal bit for bit"
    print(verdict)
    body = (
        f"{options.steps} steps, {options.kills} kills (seed {options.seed}), {options.threads} threads: **{verdict}**."
    )
    write_section("Killed and resumed", f"{body}\n\n{table(['kill', 'after', 'last saved step'], lines)}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
