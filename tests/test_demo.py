"""The demo goes the whole way; how good it becomes is `make demo`'s business."""

from pathlib import Path

import pytest
from PIL import Image

from perpixel import demo
from tiny_run import CHANGES


def test_the_demo_leaves_a_score_and_a_sheet_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (*CHANGES, "backbone.weights=none", "data.workers=0", "data.short_side=[64]", "train.batch_size=2")
    monkeypatch.setattr(demo, "SETTINGS", (*demo.SETTINGS, *small))
    monkeypatch.setattr(demo, "TRAIN_PICTURES", 4)
    lines: list[str] = []
    scores = demo.demo(tmp_path / "demo", minutes=0.02, pictures=2, say=lines.append)
    assert 0 <= scores["AP"] <= scores["AP50"] <= 1
    sheet = Image.open(tmp_path / "demo/found.png")
    assert sheet.width > sheet.height
    assert lines[1].startswith(f"box AP {scores['AP']:.3f}")
    assert (tmp_path / "demo/run/best.safetensors").is_file()
    again = demo.demo(tmp_path / "demo", minutes=0.02, pictures=2, say=lines.append)
    assert again == scores  # a finished run is used as it is
