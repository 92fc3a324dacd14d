import torch

from perpixel.ops.nms import mask_nms


def slow_nms(masks, scores, groups, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        overlaps = [(masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum() for j in kept if groups[i] == groups[j]]
        if all(o <= threshold for o in overlaps):
            kept.append(i)
    return kept


def test_mask_nms_equals_a_loop_over_pairs() -> None:
    y, x = torch.meshgrid(torch.arange(24), torch.arange(30), indexing="ij")
    center, radius = torch.rand(60, 2) * torch.tensor([24, 30]), 3 + 6 * torch.rand(60)
    masks = ((y - center[:, :1, None]) ** 2 + (x - center[:, 1:, None]) ** 2) < radius[:, None, None] ** 2
    scores, groups = torch.rand(60), torch.randint(0, 3, (60,))
    for threshold in (0.2, 0.5):
        kept = mask_nms(masks, scores, groups, threshold).tolist()
        assert kept == slow_nms(masks, scores, groups, threshold)
        assert 3 < len(kept) < 60


def test_masks_that_share_a_box_but_no_pixel_both_stay() -> None:
    stripes = torch.arange(16)[None, None].expand(2, 16, -1) % 2 == torch.tensor([0, 1])[:, None, None]
    assert mask_nms(stripes, torch.tensor([0.2, 0.9]), torch.zeros(2), 0.5).tolist() == [1, 0]


def test_no_masks() -> None:
    assert mask_nms(torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)
