"""Speed against torchvision's FCOS R50 on a real picture, in turn in one run; results go to RESULTS.md.

    python benchmarks/speed.py --data DIR
    python benchmarks/speed.py --data DIR --parts training

Both networks have the same layers and the same random weights, so their dense outputs are the same numbers; score
thresholds are set so that about 3000 candidates reach suppression. Theirs is measured as it comes, with live batch
norm in evaluation mode (the faster of the two norms it can be built with) and in the layout that it uses itself;
variants of it are timed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS

from peers import copy_weights, fcos_resnet50
from perpixel.data.coco import CocoDataset
from perpixel.data.loading import DataConfig, find_split
from perpixel.data.transforms import View
from perpixel.predictor import Predictor
from perpixel.recipe import build, load_recipe
from perpixel.structures import Batch, Categories, Outputs, Progress
from provenance import RESULTS, table, write_section
from timing import Times, take_turns

CLASSES = 80
SIZE = (800, 1067)  # of the picture, px
STEP_SIZE = (480, 640)  # of both pictures of a training step, px
CANDIDATES = 3000
# torchvision's arithmetic: stride in the 3x3, its colors and statistics.
SAME_NETWORK = [
    "backbone.weights=none", "backbone.stride_in_1x1=false", "backbone.order=rgb",
    "backbone.mean=[123.675, 116.28, 103.53]", "backbone.std=[58.395, 57.12, 57.375]",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="COCO folder; its largest picture is used")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-other-cpus", type=float, default=0.15, help="busier rounds are repeated,")
    parser.add_argument("--patience", type=float, default=4.0, help="up to this many times --rounds in all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for part in arguments.parts:
        title, body = PARTS[part](arguments)
        print(f"\n## {title}\n\n{body}", flush=True)
        write_section(title, body, arguments.out)


# Inference


def inference(arguments: argparse.Namespace) -> tuple[str, str]:
    """uint8 picture to detections: fp32 and bf16, and what decoding takes of ours."""
    picture = largest_picture(arguments.data)
    ours, theirs = same_networks()
    candidates = limit_candidates(ours, theirs, picture)
    frozen = fcos_resnet50(CLASSES, frozen_norm=True, min_size=min(SIZE)).eval()
    last = fcos_resnet50(CLASSES, frozen_norm=False, min_size=min(SIZE)).eval().to(memory_format=torch.channels_last)
    for variant in (frozen, last):
        variant.load_state_dict(theirs.state_dict(), strict=False)
        variant.score_thresh = theirs.score_thresh
    predictors = {p: predictor_of(ours, p) for p in ("fp32", "bf16")}
    work: dict[str, Callable[[], Any]] = {f"ours {p}": _predict(predictors[p], picture) for p in predictors}
    for p in predictors:
        work[f"torchvision {p}"] = _detect(theirs, picture, p)
        work[f"torchvision {p}, channels last"] = _detect(last, picture, p)
    work["torchvision fp32, frozen norm"] = _detect(frozen, picture, "fp32")
    dense = {p: predictors[p].net(picture[None], [SIZE]) for p in predictors}
    for p, one in predictors.items():
        work[f"ours {p}, network alone"] = _network(one, picture)
        work[f"ours {p}, decoding and NMS"] = _decode(one, dense[p])
    counts = {name: len(work[name]()) for name in ("ours fp32", "ours bf16", "torchvision fp32", "torchvision bf16")}
    times = _take_turns(work, arguments)
    share = times.ratio("ours fp32, decoding and NMS", "ours fp32")
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    lines = [
        f"One picture of {SIZE[0]}x{SIZE[1]} px from uint8 to detections, {arguments.threads} threads; same random "
        f"weights. Candidates that reach NMS: {candidates}. Detections: {found}. {rounds_note(times)}",
        "",
        times_table(times, "torchvision fp32"),
        "",
        f"- ours fp32 / torchvision fp32: **{show_ratio(times, 'ours fp32', 'torchvision fp32')}** (target ≤ 0.80)",
        f"- ours bf16 / torchvision fp32: **{show_ratio(times, 'ours bf16', 'torchvision fp32')}** (target ≤ 0.42)",
        f"- ours bf16 / torchvision bf16: {show_ratio(times, 'ours bf16', 'torchvision bf16')}; with its layers in "
        f"channels last: {show_ratio(times, 'ours bf16', 'torchvision bf16, channels last')}",
        f"- decoding and NMS in ours fp32: **{share:.1%}** of the whole (target ≤ 3%)",
    ]
    return "Speed: inference", "\n".join(lines)


def same_networks() -> tuple[Any, FCOS]:
    """Ours and torchvision's FCOS R50 with the same random weights, for evaluation."""
    ours = build("fcos/r50_1x", CLASSES, SAME_NETWORK).eval()
    for name, value in ours.state_dict().items():
        if name.endswith("norm.weight") and name.startswith("backbone."):
            value.fill_(0.3)  # timm starts some of them from 0, which would switch the residual branches off
    nn.init.normal_(ours.head.logits.weight, std=0.05)  # scores that differ from place to place
    theirs = fcos_resnet50(CLASSES, frozen_norm=False, min_size=min(SIZE)).eval()
    copy_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def limit_candidates(ours: Any, theirs: FCOS, picture: Tensor) -> str:
    """Sets both thresholds so that about `CANDIDATES` reach suppression; returns the numbers in words."""
    outputs = ours(picture[None], [SIZE])
    score = outputs.logits.sigmoid()
    product = (score * outputs.centerness.sigmoid()[..., None]).sqrt()
    limit = ours.decode_config.pre_nms_top
    on_class = _threshold(score, outputs, limit)
    theirs.score_thresh = _threshold(product, outputs, limit)
    ours.decode_config = ours.decode_config.model_copy(update={"score_threshold": on_class})
    return (
        f"ours {_reaching(score, outputs, limit, on_class)}, torchvision "
        f"{_reaching(product, outputs, limit, theirs.score_thresh)}"
    )


def _reaching(scores: Tensor, outputs: Outputs, limit: int, threshold: float) -> int:
    """Candidates above the threshold, at most `limit` a level."""
    level = outputs.level[(scores[0] > threshold).nonzero()[:, 0]]
    return int(torch.bincount(level, minlength=1).clamp(max=limit).sum())


def _threshold(scores: Tensor, outputs: Outputs, limit: int) -> float:
    """The score above which about `CANDIDATES` remain, by bisection."""
    low, high = 0.0, float(scores.max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _reaching(scores, outputs, limit, middle) > CANDIDATES else (low, middle)
    return high


def predictor_of(ours: Any, precision: str) -> Predictor:
    """The predictor that users get, around a network whose threshold has been set."""
    recipe = load_recipe("fcos/r50_1x", [*SAME_NETWORK, f"data.test_short_side={min(SIZE)}"])
    return Predictor(ours, recipe, Categories.anonymous(CLASSES), device="cpu", precision=precision, threshold=0.0)


def _predict(predictor: Predictor, picture: Tensor) -> Callable[[], Any]:
    return lambda: predictor(picture)


def _network(predictor: Predictor, picture: Tensor) -> Callable[[], Any]:
    images = picture[None].contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: predictor.net(images, [SIZE]))


def _decode(predictor: Predictor, outputs: Outputs) -> Callable[[], Any]:
    return torch.inference_mode()(lambda: predictor.net.decode(outputs, [SIZE], [SIZE]))


def _detect(model: FCOS, picture: Tensor, precision: str) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model([picture.float() / 255])[0]["boxes"]

    return run


# Training


def training(arguments: argparse.Namespace) -> tuple[str, str]:
    """Forward, losses, backward and SGD on two real pictures, stem and first stage frozen, all norms frozen."""
    batch = step_batch(arguments.data)
    work: dict[str, Callable[[], Any]] = {}
    for precision in ("fp32", "bf16"):
        work[f"ours {precision}"] = _our_step(batch, precision)
        work[f"torchvision {precision}"] = _their_step(batch, precision, channels_last=False)
        work[f"torchvision {precision}, channels last"] = _their_step(batch, precision, channels_last=True)
    times = _take_turns(work, arguments)
    objects = sum(len(target) for target in batch.targets)
    lines = [
        f"One step (forward, losses, backward, SGD) on {len(batch)} pictures of {STEP_SIZE[0]}x{STEP_SIZE[1]} px with "
        f"{objects} objects, {arguments.threads} threads; stem and first stage frozen, all norms frozen "
        f"(`FrozenBatchNorm2d` in theirs). {rounds_note(times)}",
        "",
        times_table(times, "torchvision fp32"),
        "",
        f"- fp32, ours / torchvision: **{show_ratio(times, 'ours fp32', 'torchvision fp32')}** (target ≤ 0.85)",
        f"- bf16, ours / torchvision: **{show_ratio(times, 'ours bf16', 'torchvision bf16')}** (target ≤ 0.85)",
        f"- ours bf16 / torchvision fp32: {show_ratio(times, 'ours bf16', 'torchvision fp32')}",
        "- against theirs in channels last: fp32 "
        f"{show_ratio(times, 'ours fp32', 'torchvision fp32, channels last')}, bf16 "
        f"{show_ratio(times, 'ours bf16', 'torchvision bf16, channels last')}",
    ]
    return "Speed: training step", "\n".join(lines)


def step_batch(data: Path) -> Batch:
    """The first two training pictures of exactly `STEP_SIZE` with 5 to 10 objects."""
    dataset = CocoDataset(*find_split(DataConfig(root=str(data)), "train"), crowd="background")
    fitting = (i for i in range(len(dataset)) if dataset.size(i) == STEP_SIZE)
    samples = [s for s in map(dataset.sample, fitting) if 5 <= len(s.instances) <= 10][:2]
    if len(samples) < 2:
        raise SystemExit(f"{data}: found no two pictures of {STEP_SIZE} px with 5 to 10 objects; give COCO pictures")
    return Batch(
        images=torch.stack([s.image for s in samples]),
        sizes=[STEP_SIZE] * 2,
        targets=[s.instances for s in samples],
    )


def _our_step(batch: Batch, precision: str) -> Callable[[], None]:
    net: Any = build("fcos/r50_1x", CLASSES, SAME_NETWORK).train().to(memory_format=torch.channels_last)
    optimizer = _sgd(net)

    def step() -> None:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = net(images, batch.sizes, auxiliary=True)
        _descend(net.loss(outputs, batch, Progress()), optimizer)

    return step


def _their_step(batch: Batch, precision: str, *, channels_last: bool) -> Callable[[], None]:
    model = fcos_resnet50(CLASSES, frozen_norm=True, min_size=STEP_SIZE[0], max_size=STEP_SIZE[1]).train()
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = _sgd(model)
    targets = [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = model([image.float() / 255 for image in batch.images], targets)
        _descend(losses, optimizer)

    return step


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-5, momentum=0.9, fused=True)


def _descend(losses: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# The loader's share


def loader(arguments: argparse.Namespace) -> tuple[str, str]:
    """CPU seconds of making a batch beside those of learning from it, in a process whose threads do not spin."""
    script = Path(__file__).with_name("loader_share.py")
    # Idle threads of OpenMP burn CPU time while they wait; that would make the loader's share look smaller.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, str(script), "--data", str(arguments.data), "--threads", str(arguments.threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    lines = [
        f"CPU seconds a batch, medians of {rows[0]['steps']} steps: making it (decoding JPEG, resizing, flipping, "
        "padding) and learning from it (forward, losses, backward, clipping, optimizer). Target ≤ 10%.",
        "",
        table(
            ["recipe", "pictures", "loader", "step", "loader's share"],
            [
                [
                    r["name"], str(r["batch"]), f"{r['loader']:.3f} s", f"{r['step']:.3f} s",
                    f"**{r['loader'] / (r['loader'] + r['step']):.1%}**",
                ]
                for r in rows
            ],
        ),
    ]  # fmt: skip
    return "Speed: the loader's share of CPU time", "\n".join(lines)


# Presentation


def _take_turns(work: dict[str, Callable[[], Any]], arguments: argparse.Namespace) -> Times:
    limits = {"max_other_cpus": arguments.max_other_cpus, "patience": arguments.patience}
    return take_turns(work, rounds=arguments.rounds, **limits)


def largest_picture(data: Path) -> Tensor:
    """uint8 [3, H, W] of `SIZE`: the first validation picture of the largest area, resized."""
    dataset = CocoDataset(*find_split(DataConfig(root=str(data)), "val"))
    index = int(dataset.sizes.prod(axis=1).argmax())
    return dataset.sample(index, View.whole(dataset.size(index), SIZE)).image


def rounds_note(times: Times) -> str:
    if times.other_cpus is None:
        return f"Median of {len(next(iter(times.seconds.values())))} rounds."
    busy = f"other processes kept {min(times.other_cpus):.2f} to {max(times.other_cpus):.2f} CPUs busy"
    dropped = f"; {times.dropped} busier rounds were left out" if times.dropped else ""
    return f"Median of {len(times.other_cpus)} rounds, in which {busy}{dropped}."


def times_table(times: Times, base: str) -> str:
    rows = [
        [n, f"{times.median(n):.3f} s", f"{min(times.seconds[n]):.3f} s", f"{times.ratio(n, base):.2f}"]
        for n in times.seconds
    ]
    return table(["", "median", "fastest", f"/ {base}"], rows)


def show_ratio(times: Times, name: str, base: str) -> str:
    low, high = times.spread(name, base)
    return f"{times.ratio(name, base):.2f} ({low:.2f} to {high:.2f})"


PARTS: dict[str, Callable[[argparse.Namespace], tuple[str, str]]] = {
    "inference": inference,
    "training": training,
    "loader": loader,
}

if __name__ == "__main__":
    main()
