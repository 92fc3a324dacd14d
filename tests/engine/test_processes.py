"""Devices, process groups and signals."""

import os
import signal
import socket
import threading

import pytest
import torch
import torch.distributed as dist

from perpixel import distributed
from perpixel.engine.interrupt import StopSignals
from perpixel.engine.processes import choose_device, process_group
from perpixel.errors import ConfigError


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 2 of this machine needs GPU 2, but torch sees 2"):
        choose_device("cuda")


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device=cpu"):
        choose_device("cuda")


def test_a_single_process_joins_nothing() -> None:
    with process_group(torch.device("cpu")):
        assert not dist.is_initialized()
        assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_processes_that_torchrun_started_join_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined: list[str] = []
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", joined.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: joined.append("left"))
    with process_group(torch.device("cpu")):
        assert joined == ["gloo"]
    assert joined == ["gloo", "left"]


@pytest.fixture
def _ctrl_c_raises():
    """Python's own handler, which a shell that starts tests in the background takes away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_raises")
def test_the_first_signal_is_a_wish_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_forked_processes_leave_ctrl_c_to_their_parent_and_die_of_sigterm() -> None:
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert not signals.requested


def test_in_a_thread_signals_are_left_alone() -> None:
    seen = []

    def enter() -> None:
        with StopSignals() as signals:
            seen.append(signals.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
