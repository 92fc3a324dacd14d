import torch
from torchvision.ops import nms

from perpixel.ops.nms import batched_nms, rank_in_group, top_per_group


def test_groups_are_suppressed_separately_as_one_nms_a_group() -> None:
    low = torch.rand(400, 2) * 200
    boxes = torch.cat([low, low + 20 + 60 * torch.rand(400, 2)], 1)
    scores, groups = torch.rand(400), torch.randint(0, 7, (400,))
    kept = batched_nms(boxes, scores, groups, 0.5)
    expected = [rows[nms(boxes[rows], scores[rows], 0.5)] for rows in ((groups == g).nonzero()[:, 0] for g in range(7))]
    assert set(kept.tolist()) == set(torch.cat(expected).tolist())
    assert (scores[kept].diff() <= 0).all()


def test_far_groups_lose_no_precision() -> None:
    # IoU just above and just below the threshold, in the group that is moved farthest.
    above, below = [0, 0, 100.0, 60.02], [0, 0, 100.0, 59.98]
    boxes = torch.tensor([[0, 0, 100.0, 100], above, [0, 0, 100.0, 100], below, [0, 0, 1300.0, 800]])
    groups = torch.tensor([79, 79, 78, 78, 0])
    assert sorted(batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), groups, 0.6).tolist()) == [0, 2, 3, 4]


def test_nothing_to_suppress() -> None:
    empty = batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.6)
    assert empty.shape == (0,)
    assert top_per_group(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 5).shape == (0,)


def test_top_per_group_takes_the_best_of_every_group_in_order() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    groups = torch.tensor([1, 0, 1, 0, 0])
    assert top_per_group(scores, groups, 2).tolist() == [1, 3, 2, 0]


def test_rank_in_group_counts_within_runs() -> None:
    assert rank_in_group(torch.tensor([0, 0, 3, 3, 3, 8])).tolist() == [0, 1, 0, 1, 2, 0]
