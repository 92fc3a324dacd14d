"""Small networks and batches with masks, for the tests of CondInst and BoxInst."""

import torch

from perpixel.methods.detector import Detector
from perpixel.recipe import build
from perpixel.structures import Batch, Instances

SLIM = ("pyramid.channels=32", "head.cls_convs=1", "head.box_convs=1", "mask.branch_channels=16")
SIZE = (96, 128)


def small_net(recipe: str, *overrides: str) -> Detector:
    torch.manual_seed(0)
    net = build(recipe, 3, (*SLIM, *overrides))
    torch.nn.init.normal_(net.branches["mask"].controller.weight, std=0.2)  # masks that differ from place to place
    return net


def disk(center: tuple[float, float], radius: float, size=SIZE) -> torch.Tensor:
    """bool [H, W]; center as x, y in px."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2


def disks(*circles: tuple[float, float, float], size=SIZE, **fields) -> Instances:
    """Truth with one disk a circle (x, y, radius), px; classes in turn."""
    places = torch.tensor(circles, dtype=torch.float32).reshape(-1, 3)
    boxes = torch.cat([places[:, :2] - places[:, 2:], places[:, :2] + places[:, 2:]], 1)
    masks = [disk((x, y), r, size) for x, y, r in circles]
    return Instances(
        size=size,
        boxes=boxes,
        labels=torch.arange(len(circles)) % 3,
        **{
            "masks": torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool),
            "centers": places[:, :2],
            **fields,
        },
    )


def picture(truth: Instances) -> torch.Tensor:
    """uint8 [3, H, W]: every disk in a color of its own, on gray."""
    image = torch.full((3, *truth.size), 90, dtype=torch.uint8)
    for i, mask in enumerate(truth.masks):
        image[:, mask] = torch.tensor([[200, 40, 60], [30, 180, 90], [60, 80, 220]], dtype=torch.uint8)[i % 3][:, None]
    return image


def batch_of(*truths: Instances) -> Batch:
    height, width = (max(side) for side in zip(*(t.size for t in truths), strict=True))
    images = torch.zeros(len(truths), 3, height, width, dtype=torch.uint8)
    for image, truth in zip(images, truths, strict=True):
        image[:, : truth.size[0], : truth.size[1]] = picture(truth)
    sizes = [t.size for t in truths]
    return Batch(
        images=images, sizes=sizes, original_sizes=sizes, targets=list(truths), image_ids=list(range(len(truths)))
    )


def bare(truth: Instances) -> Instances:
    """The same with its boxes alone."""
    return Instances(size=truth.size, boxes=truth.boxes, labels=truth.labels)
