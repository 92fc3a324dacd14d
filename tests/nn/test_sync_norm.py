"""Batch norm over processes against torch's batch norm on the whole batch."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from perpixel.nn.sync_norm import SyncBatchNorm2d, synchronize_norms

PARTS = (3, 1)  # pictures of the two processes


def example() -> tuple[Tensor, Tensor]:
    """Input [4, 5, 6, 7], far from zero so that sums of squares would cancel, and the gradient of the output."""
    torch.manual_seed(1)
    return torch.randn(4, 5, 6, 7) + 100, torch.randn(4, 5, 6, 7)


def layer() -> nn.BatchNorm2d:
    torch.manual_seed(2)
    norm = BatchNormAct2d(5, act_layer=nn.ReLU)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def run(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Two steps; output and gradients of the second one, then running statistics."""
    for _ in range(2):
        norm.zero_grad()
        x = x.detach().requires_grad_()
        y = norm(x)
        y.backward(grad)
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]  # type: ignore[list-item]


def part(rank: int, port: int) -> list[Tensor]:
    """What one of two processes makes of its pictures."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(sum(PARTS[:rank]), sum(PARTS[: rank + 1]))
    x, grad = example()
    net = synchronize_norms(nn.Sequential(layer()))
    found = [value.clone() for value in run(net[0], x[rows], grad[rows])]
    dist.destroy_process_group()
    return found


def test_two_processes_equal_one_forward_and_backward(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_sync_norm as t; "
    code += f"torch.save(t.part(1, {port}), sys.argv[2])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "b.pt")]
    with subprocess.Popen(command) as other:
        try:
            a = part(0, port)
            assert other.wait(timeout=60) == 0
        finally:
            other.kill()
    b = torch.load(tmp_path / "b.pt")
    whole = run(layer(), *example())
    for index in (0, 1):  # output, gradient of the input
        torch.testing.assert_close(torch.cat([a[index], b[index]]), whole[index], atol=2e-5, rtol=1e-5)
    for index in (2, 3):  # gradients of weight and bias add up
        torch.testing.assert_close(a[index] + b[index], whole[index], atol=1e-4, rtol=1e-5)
    for index in (4, 5):  # running statistics are the same everywhere
        assert torch.equal(a[index], b[index])
        torch.testing.assert_close(a[index], whole[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_the_norm_that_it_was_made_from(training: bool) -> None:
    norm, x = layer().train(training), example()[0]
    made = SyncBatchNorm2d(norm)
    assert made.state_dict().keys() == norm.state_dict().keys()
    assert made.training == training
    assert torch.equal(made(x), norm(x))
