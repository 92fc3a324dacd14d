"""Watching a run from inside: are the losses numbers, what are their means, and where does the time go."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from perpixel.distributed import is_distributed, mean_over_ranks
from perpixel.errors import NonFiniteLossError


class LossWindow:
    """Losses of the steps since the last look, left on their device so that a step never waits for it.

    Nothing that follows a bad loss can reach a file: the run looks at the window before it writes anything.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        # On a CPU in one process a look costs nothing, so a bad batch is named before it touches the weights.
        self.eager = device.type == "cpu" and not is_distributed()
        self._names: list[str] = []
        self._terms = 0  # how many of the names are losses; the rest are only logged
        self._where: list[tuple[int, list[int]]] = []  # step and image ids
        self._values: list[Tensor] = []  # [names] each

    def add(self, step: int, image_ids: list[int], losses: Mapping[str, Tensor], logs: Mapping[str, Tensor]) -> None:
        """Takes in one micro-batch. Names are the same in all steps.

        Raises:
            NonFiniteLossError: in a single process on the CPU, at once.
        """
        self._names, self._terms = [*losses, *logs], len(losses)
        self._where.append((step, list(image_ids)))
        self._values.append(torch.stack([v.detach().float() for v in (*losses.values(), *logs.values())]))
        if self.eager and not bool(self._values[-1][: self._terms].isfinite().all()):
            self._raise(self._values[-1][None], self._where[-1:])

    def drain(self) -> dict[str, float]:
        """Means over the window and over all processes, and "loss", their sum; {} for an empty window.

        Raises:
            NonFiniteLossError: a loss of any process was not finite; all processes raise.
        """
        if not self._values:
            return {}
        own, where = torch.stack(self._values), self._where  # [micro-batches, names]
        self._values, self._where = [], []
        values = mean_over_ranks(own).cpu()
        if not bool(values[:, : self._terms].isfinite().all()):  # a mean with a bad number is bad in every process
            self._raise(own.cpu(), where)
        means = values.double().mean(0).tolist()
        return {"loss": sum(means[: self._terms]), **dict(zip(self._names, means, strict=True))}

    def _raise(self, values: Tensor, where: list[tuple[int, list[int]]]) -> None:
        for (step, image_ids), row in zip(where, values[:, : self._terms].tolist(), strict=True):
            bad = [f"{n} = {v}" for n, v in zip(self._names, row, strict=False) if not math.isfinite(v)]
            if bad:
                raise NonFiniteLossError(
                    f"training: step {step + 1}: expected finite losses, got {', '.join(bad)} on the images with ids "
                    f"{image_ids}; saved files are as they were: look at these images (`perpixel data check`), lower "
                    "train.lr, or set train.clip_norm"
                )
        raise NonFiniteLossError(
            "training: another process met a loss that is not finite; its message names the images"
        )


@torch.no_grad()
def require_finite(net: nn.Module, step: int) -> None:
    """Refuses weights that a non-finite gradient has spoilt.

    Raises:
        NonFiniteLossError: a parameter or buffer is not finite; the first one is named.
    """
    tensors = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    flags = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    if not all(flags):
        name = next(name for name, fine in zip(tensors, flags, strict=True) if not fine)
        raise NonFiniteLossError(
            f"training: after step {step} the weight {name} is not finite, though all losses were; saved files are as "
            "they were: lower train.lr, set train.clip_norm, or use train.precision=bf16 or fp32"
        )


class StepTimer:
    """Seconds spent in each part of a step.

    Args:
        enabled: otherwise a lap is free.
        device: a GPU is waited for at every lap, so that its work counts where it was asked for.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Begins a lap."""
        if self.enabled:
            self._mark = time.perf_counter()

    def lap(self, part: str) -> None:
        """Time since the last lap goes to `part`."""
        if not self.enabled:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self._mark
        self._mark = now

    def table(self, steps: int) -> str:
        """A line a part: milliseconds a step and share of the whole."""
        total = sum(self.seconds.values())
        if not total or not steps:
            return "profile: no steps"
        rows = [f"{n:>12} {1000 * s / steps:9.1f} ms a step {s / total:6.1%}" for n, s in self.seconds.items()]
        return "\n".join([f"profile of {steps} steps:", *rows, f"{'all':>12} {1000 * total / steps:9.1f} ms a step"])
