"""Run lengths against pycocotools and back."""

import numpy as np
import pycocotools.mask
import pytest
import torch

from perpixel.errors import ShapeError
from perpixel.rle import decode, encode


def test_encoding_equals_pycocotools() -> None:
    masks = torch.rand(4, 37, 53) > 0.6
    masks[1], masks[2] = False, True
    for own, mask in zip(encode(masks), masks, strict=True):
        theirs = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert own == {"size": [37, 53], "counts": theirs["counts"].decode()}


def test_decoding_gives_the_masks_back() -> None:
    masks = torch.rand(3, 20, 11) > 0.5
    assert torch.equal(decode(encode(masks)), masks)


def test_uncompressed_counts_are_read() -> None:
    mask = decode([{"size": [2, 3], "counts": [1, 2, 3]}])  # runs of 0 and 1 down the columns
    assert mask.int().tolist() == [[[0, 1, 0], [1, 0, 0]]]


def test_no_masks_stay_no_masks() -> None:
    assert encode(torch.zeros(0, 4, 5, dtype=torch.bool)) == []
    assert decode([], size=(4, 5)).shape == (0, 4, 5)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ShapeError, match=r"torch.bool tensor \[N, H, W\], got torch.uint8"):
        encode(torch.zeros(1, 4, 5, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="masks of one size"):
        decode(encode(torch.zeros(1, 4, 5, dtype=torch.bool)) + encode(torch.zeros(1, 5, 4, dtype=torch.bool)))
    with pytest.raises(ShapeError, match="masks of one size"):
        decode([])
