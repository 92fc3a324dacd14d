"""Recorded inputs and outputs of the authors' release, and the rule that makes its weights from their names."""

import json
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perpixel.structures import Batch, Detections, Instances


def rule_weights(record: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a recorded configuration: numbers drawn from a seed made of each tensor's name."""
    weights = {}
    for key, shape, _, rule, first, _ in record["state_dict"]:
        if rule == "keep":
            continue
        entry = next(e for e in record["rule"]["entries"] if e["id"] == rule)
        z = np.random.default_rng(zlib.crc32(f"{record['seed']}:{key}".encode())).standard_normal(size=shape)
        forms = {
            "a+b*z": lambda z=z, e=entry: e["a"] + e["b"] * z,
            "a+b*abs(z)": lambda z=z, e=entry: e["a"] + e["b"] * np.abs(z),
            "b*sqrt(2/fan_in)*z": lambda z=z, e=entry, s=shape: e["b"] * np.sqrt(2 / np.prod(s[1:])) * z,
        }
        value = np.asarray(forms[entry["form"]](), dtype=np.float32)
        assert abs(value.flat[0] - first) <= 1e-6 * max(1, abs(first)), key
        assert re.search(entry["regex"], key), key
        weights[key] = torch.from_numpy(value.copy())
    return weights


@dataclass(frozen=True)
class Reference:
    """One recorded configuration: `record` (JSON) and `arrays` (npz)."""

    record: dict[str, Any]
    arrays: Any

    @classmethod
    def read(cls, folder: Path, name: str) -> "Reference":
        return cls(json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz"))

    def tensor(self, name: str) -> Tensor:
        array = self.arrays[name]
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "i" else array)

    def dense(self, name: str) -> Tensor:
        """[B, L, D] of maps recorded per level under `name`_p3 and so on."""
        maps = [self.tensor(f"{name}_{level}").flatten(2).transpose(1, 2) for level in self.record["levels"]]
        return torch.cat(maps, dim=1)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return rule_weights(self.record)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.record["image_hw"]
        return height, width

    @property
    def image(self) -> Tensor:
        """uint8 [3, H, W] RGB."""
        return self.tensor("image_rgb").permute(2, 0, 1)

    @property
    def size_b(self) -> tuple[int, int]:
        height, width = self.record["b_image_hw"]
        return height, width

    @property
    def image_b(self) -> Tensor:
        """The second image: a mirrored corner of the first, padded to its size."""
        height, width = self.size_b
        padded = torch.zeros_like(self.image)
        padded[:, :height, :width] = self.image[:, :height, :width].flip(2)
        return padded

    def truth(self, prefix: str = "", **fields: Any) -> Instances:
        size = self.size_b if prefix else self.size
        boxes, labels = self.tensor(f"{prefix}gt_boxes"), self.tensor(f"{prefix}gt_classes")
        return Instances(size=size, boxes=boxes, labels=labels, **fields)

    def batch(self, names: str, truths: dict[str, Instances]) -> Batch:
        """A batch such as "BA"; `truths` gives each letter's objects."""
        images = {"A": self.image, "B": self.image_b}
        sizes = {"A": self.size, "B": self.size_b}
        return Batch(
            images=torch.stack([images[n] for n in names]),
            sizes=[sizes[n] for n in names],
            original_sizes=[sizes[n] for n in names],
            targets=[truths[n] for n in names],
            image_ids=list(range(len(names))),
        )


def assert_same_detections(reference: Reference, found: Detections, prefix: str) -> Tensor:
    """Detections equal to recorded ones as sets: neighbors in score can change places within the noise of float32.

    Returns:
        int64 [N], the recorded row of each.
    """
    boxes, scores, classes = (reference.tensor(f"{prefix}_{name}") for name in ("boxes", "scores", "classes"))
    assert len(found) == len(boxes)
    distance = (found.boxes[:, None] - boxes[None]).abs().amax(-1)
    distance[found.labels[:, None] != classes[None]] = 1e9
    nearest, partner = distance.min(dim=1)
    assert nearest.max() < 1e-2
    assert len(partner.unique()) == len(boxes)
    torch.testing.assert_close(found.scores, scores[partner], atol=1e-4, rtol=0)
    return partner
