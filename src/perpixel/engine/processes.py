"""Joining the processes of a run that `torchrun` started, and the device that each works on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from perpixel.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """The device of this process: "auto" is its GPU where there is one, else the CPU.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise ConfigError(
            f"device: process {index} of this machine needs GPU {index}, but torch sees {count}; start no more "
            "processes than there are GPUs, or set train.device=cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other processes where `torchrun` started several; in a single process, does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
