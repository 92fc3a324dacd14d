"""A detector small enough to train in a test: it learns how many objects of each class a picture has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpixel.structures import Batch, Detections, Instances, Outputs, Progress


class TinyDetector(nn.Module):
    """Two convolutions with a batch norm; the objective is a squared error, and `poison` makes it infinite."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)
        self.dropout = nn.Dropout(0.2)
        self.poison: int | None = None  # an image id

    def forward(self, images: Tensor, sizes: Any = None, *, auxiliary: bool = False) -> Outputs:
        maps = self.head(self.dropout(self.backbone(images.float() / 255)))
        logits = maps.flatten(2).mT.float()  # [B, L, C]
        points = torch.zeros(logits.shape[1], 2)
        return Outputs(logits=logits, centerness=None, ltrb=None, points=points, level=points[:, 0].long())

    def loss(
        self, outputs: Outputs, batch: Batch, progress: Progress, logs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        wanted = torch.stack([torch.bincount(t.labels, minlength=2) for t in batch.targets]).float()
        error = outputs.logits.mean(1) - wanted
        if logs is not None:
            logs["largest"] = error.detach().abs().max()
        losses = {"cls": error.square().mean(), "box": error.abs().mean()}
        if self.poison in batch.image_ids:
            losses["box"] = losses["box"] * float("inf")
        return losses

    def decode(self, outputs: Outputs, sizes: Any, output_sizes: Any = None) -> list[Detections]:
        return [
            Detections(
                size=tuple(size),
                boxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]]),
                scores=torch.tensor([0.5]),
                labels=torch.tensor([1]),
            )
            for size in output_sizes or sizes
        ]


def batch_of(step: int, size: int = 4) -> Batch:
    """A batch that depends on its number alone."""
    random = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 2, (size,), generator=random)
    return Batch(
        images=torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=random),
        sizes=[(16, 16)] * size,
        original_sizes=[(16, 16)] * size,
        targets=[
            Instances(size=(16, 16), boxes=torch.tensor([[1.0, 1.0, 9.0, 9.0]]), labels=label[None]) for label in labels
        ],
        image_ids=[100 * step + i for i in range(size)],
    )


def endless(start: int, size: int = 4) -> Iterator[Batch]:
    step = start
    while True:
        yield batch_of(step, size)
        step += 1


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)
