import subprocess
import sys

import pytest

from perpixel import allocator

PROGRAM = """
import resource, sys, torch
from perpixel.allocator import keep_freed_memory

def step():  # the activations of a forward pass, all alive at once, then freed
    alive = [torch.ones(millions * 1_000_000) for millions in (2, 4, 10, 15, 20)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(8):
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_freed_memory_is_used_again_instead_of_faulted_in_anew() -> None:
    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)

    assert faults("keep") < 0.5 * faults("leave")  # the heap settles after some steps


def test_other_systems_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch) -> None:
    class Musl:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Musl())
    monkeypatch.setattr(sys, "platform", "linux")
    assert allocator.keep_freed_memory() is False
