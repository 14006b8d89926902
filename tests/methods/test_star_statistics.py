"""What STAR measures on the feature grid: core pixels, and what is stored of a class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.errors import PerdureError
from perdure.methods.star.statistics import (
    core_logits,
    core_pixels,
    feature_sums,
    grid_pixels,
    prototypes_and_norms,
    pseudo_labels,
    spread_sums,
    spreads_from,
    tally,
)
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


def example(size):
    torch.manual_seed(0)
    features = torch.randn(3, 8, *size).relu() + 0.01
    codes = torch.randint(-1, 3, (3, *size))
    codes[codes == 2] = -1  # class 2 never occurs
    return features, codes


@pytest.mark.parametrize("size", [(5, 6), (3, 4, 5)])
def test_definitions(size):
    features, codes = example(size)
    sums = feature_sums(features, codes, 3)
    prototypes, norms = prototypes_and_norms(sums)
    spreads = spreads_from(spread_sums(features, codes, prototypes))
    for c in (0, 1):
        vectors = features.movedim(1, -1)[codes == c].double()
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        torch.testing.assert_close(prototypes[c], F.normalize(unit.sum(0), dim=0))
        torch.testing.assert_close(norms[c], torch.stack([vectors.norm(dim=1).mean(), vectors.norm(dim=1).std()]))
        torch.testing.assert_close(spreads[c], (unit - prototypes[c]).square().mean(0).sqrt())
    assert sums["cells"][:2].sum() == (codes >= 0).sum()


def test_absent_and_single_cell_classes_are_finite():
    features, codes = example((5, 6))
    codes[codes == 1] = -1
    codes[0, 0, 0] = 1
    sums = feature_sums(features, codes, 3)
    prototypes, norms = prototypes_and_norms(sums)
    assert not prototypes[2].any() and norms[2].tolist() == [0.0, 0.0]
    assert norms[1, 1] == 0.0 and norms[1, 0] > 0
    spreads = spreads_from(spread_sums(features, codes, prototypes))
    assert not spreads[2].any() and torch.isfinite(spreads).all()


def test_sums_add_over_batches():
    features, codes = example((5, 6))
    whole = feature_sums(features, codes, 3)
    parts = [feature_sums(features[i : i + 1], codes[i : i + 1], 3) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
    assert {value.dtype for value in whole.values()} == {torch.float64, torch.int64}


def test_tally():
    assert tally(torch.tensor([[-1, 0, 2], [2, -1, -1]]), 4).tolist() == [1, 0, 2, 0]


def test_pseudo_labels_threshold_the_raw_logit():
    logits = torch.tensor([[0.4, 0.6, -3.0], [0.3, 0.2, -1.0]]).reshape(1, 1, 2, 3, 1)
    assert pseudo_labels(logits, 0.5).flatten().tolist() == [0, 1, 0]
    assert pseudo_labels(logits, 0.0).flatten().tolist() == [1, 1, 0]
