"""Do several processes learn what one process with the same global batch learns?

    python benchmarks/processes.py --processes 2

The same run, with live (synchronized) batch norm in backbone and towers, once in one process and once under torchrun
with gloo on the CPU; the losses of every step are compared.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from perpixel.data.synthetic import write_synthetic
from provenance import table, write_section

STEPS = 20
TERMS = ("loss", "cls", "box", "centerness")
OVERRIDES = [
    *(f"train.steps={STEPS}", "train.batch_size=4", "train.log_every=1", "train.precision=fp32", "train.device=cpu"),
    # From ImageNet weights: an untrained network with live batch norm on small maps is chaotic. There, in one process,
    # a change of all weights by one part in 10 million changes the losses by 1e-3 within seven steps.
    *("train.optimizer=sgd", "train.lr=0.002", "train.evaluate_every=0"),
    *("backbone.weights=wheel", "backbone.norm=live", "backbone.frozen_stages=0", "head.norm=bn"),
    *("data.short_side=[96, 128]", "data.test_short_side=96", "data.workers=0"),
]


def losses(folder: Path, launcher: list[str], data: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv of the run under a launcher."""
    command = [*launcher, "-m", "perpixel", "train", "fcos/lite0", f"data.root={data}", f"output={folder}", *OVERRIDES]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(row[name]) for name in TERMS} for row in csv.DictReader(file) if row["loss"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    data = write_synthetic(folder / "data", train=24, val=4, seed=2, size=160)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    one = losses(folder / "one", [sys.executable], data)
    many = losses(folder / "many", [sys.executable, *torchrun], data)
    apart = [{name: abs(a[name] - b[name]) for name in TERMS} for a, b in zip(one, many, strict=True)]
    worst = max(max(row.values()) for row in apart)
    steps = enumerate(zip(one, apart, strict=True), 1)
    lines = [[str(step), f"{a['loss']:.6f}", *(f"{row[n]:.1e}" for n in TERMS)] for step, (a, row) in steps]
    head = ["step", "loss", *(f"difference of {name}" for name in TERMS)]
    print(table(head, lines))
    print(f"largest difference: {worst:.1e}")
    body = f"{options.processes} processes (torchrun, gloo) and one, global batch 4: losses differ by at most"
    write_section("Several processes against one", f"{body} **{worst:.1e}**.\n\n{table(head, lines)}")
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
