"""Full-resolution maps on the feature grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.errors import PerdureError
from perdure.methods.star.grid import core_logits, core_pixels, grid_pixels
from perdure.networks.segmenter import upsample

CASES = [((32, 48), 16), ((24, 16), 8), ((9, 15), 3), ((6, 4), 2), ((5, 7), 1), ((8, 12, 4), 4), ((9, 3, 6), 3)]


@pytest.mark.parametrize(("size", "stride"), CASES)
def test_grid_takes_the_pixel_at_half_a_stride(size, stride):
    maps = torch.arange(2 * torch.tensor(size).prod()).reshape(2, *size)
    grid = grid_pixels(maps, stride)
    assert grid.shape == (2, *(side // stride for side in size))
    for cell in [(0,) * len(size), tuple(side // stride - 1 for side in size)]:
        assert grid[(1, *cell)] == maps[(1, *(stride // 2 + stride * i for i in cell))]


def test_grid_at_stride_16_is_8_24():
    row = torch.arange(64).expand(1, 64, 64)
    assert grid_pixels(row, 16)[0, 0].tolist() == [8, 24, 40, 56]


@pytest.mark.parametrize(("size", "stride"), CASES)
def test_mean_of_core_pixels_is_the_linear_resize(size, stride):
    torch.manual_seed(0)
    mask = torch.rand(2, *size) < 0.5
    grid = [side // stride for side in size]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    resized = F.interpolate(mask[:, None].float(), grid, mode=mode, align_corners=False)[:, 0]
    cores = core_pixels(mask, stride)
    torch.testing.assert_close(cores.float().mean(0), resized)
    assert torch.equal(cores[-1], grid_pixels(mask, stride))


@pytest.mark.parametrize(("size", "stride"), CASES)
def test_core_logits_are_the_upsampled_logits_at_the_core_pixels(size, stride):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, *(side // stride for side in size))
    full = upsample(logits, size)
    expected = torch.stack([core_pixels(full[:, k], stride) for k in range(3)], 2)
    torch.testing.assert_close(core_logits(logits, stride), expected)


def test_one_cell_has_no_neighbour():
    logits = torch.randn(1, 2, 1, 1)
    assert torch.equal(core_logits(logits, 4), logits.expand(4, 1, 2, 1, 1))


@pytest.mark.parametrize("take", [grid_pixels, core_pixels])
def test_a_crop_that_is_no_multiple_of_the_stride_is_told(take):
    with pytest.raises(PerdureError, match=r"513 x 512 pixels does not fit the network's stride of 16") as failure:
        take(torch.zeros(1, 513, 512), 16)
    assert "512" in failure.value.hint
