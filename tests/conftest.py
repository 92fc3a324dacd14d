"""Shared fixtures. Real pictures and recorded reference outputs live outside the project, in the folder that
PERPIXEL_SHARED names (default: ../shared); tests that need them are skipped, with a reason, where it is absent."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("PERPIXEL_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the folder with reference data; set PERPIXEL_SHARED")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
