import pytest
import torch
import torch.nn.functional as F

from perpixel.nn.layers import SparselyTaughtConv2d


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("places", [[], [(0, 0, 0), (1, 5, 8), (1, 2, 3), (1, 2, 4)]], ids=["none", "some"])
def test_gradients_of_few_locations_equal_those_of_an_ordinary_convolution(layout, places) -> None:
    conv, x = SparselyTaughtConv2d(5, 7), torch.randn(2, 5, 6, 9)
    price = torch.zeros(2, 7, 6, 9)
    for image, row, column in places:
        price[image, :, row, column] = torch.randn(7)
    results = []
    for form in (conv, lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1)):
        leaf = x.clone().requires_grad_()
        out = form(leaf.contiguous(memory_format=layout))
        results.append((out, *torch.autograd.grad(out, [leaf, conv.weight, conv.bias], price)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_have_the_type_of_what_they_belong_to_under_autocast() -> None:
    conv, x = SparselyTaughtConv2d(8, 8), torch.randn(1, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x.bfloat16())
    out[0, :, 1, 1].float().sum().backward()
    assert conv.weight.grad.dtype == conv.bias.grad.dtype == x.grad.dtype == torch.float32
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1)[0, :, 1, 1].sum()
    theirs = torch.autograd.grad(expected, [x, conv.weight])
    torch.testing.assert_close(x.grad, theirs[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(conv.weight.grad, theirs[1], atol=2e-2, rtol=2e-2)
