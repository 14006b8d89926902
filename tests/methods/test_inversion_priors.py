"""Total variation and norm of groups of images."""

from __future__ import annotations

import math

import pytest
import torch

from perdure.methods.inversion.engine import differences, l2, tv1, tv2


@pytest.mark.golden
def test_published_values():
    images = torch.arange(96.0).reshape(2, 3, 4, 4) / 10
    assert tv1(images).item() == pytest.approx(1.3, abs=1e-4)
    assert tv2(images).item() == pytest.approx(10.1214, abs=1e-4)


def test_worked_by_hand():
    # 1 2   along the row: 1, 5; along the column: 3, 7; main diagonal: 8; other diagonal: 4 - 2 = 2
    # 4 9
    images = torch.tensor([[1.0, 2], [4, 9]])[None, None]
    row, column, main, other = differences(images)
    assert row.flatten().tolist() == [1, 5]
    assert column.flatten().tolist() == [3, 7]
    assert (main.item(), other.item()) == (8, 2)
    assert tv1(images).item() == pytest.approx(3 + 5 + 8 + 2)  # means 6/2, 10/2, 8, 2
    assert tv2(images).item() == pytest.approx(math.sqrt(26) + math.sqrt(58) + 8 + 2, rel=1e-6)
    assert l2(images).item() == pytest.approx(math.sqrt(1 + 4 + 16 + 81), rel=1e-6)


def test_norm_is_a_mean_over_images_and_variation_is_one_norm_of_all():
    one = torch.tensor([[0.0, 3], [0, 3]])[None, None]  # norms: row √(9 + 9), diagonals 3 and 3, column 0
    two = torch.cat([one, one])
    assert tv2(one).item() == pytest.approx(math.sqrt(18) + 6, rel=1e-6)
    assert tv2(two).item() == pytest.approx(math.sqrt(2) * tv2(one).item(), rel=1e-6)  # grows with √B
    assert l2(two).item() == pytest.approx(l2(one).item())
    assert tv1(two).item() == pytest.approx(tv1(one).item())


@pytest.mark.parametrize("prior", [tv1, tv2, l2])
def test_groups_are_independent(prior):
    images = torch.rand(12, 3, 6, 5, requires_grad=True)
    together = prior(images, groups=3)
    alone = torch.cat([prior(part) for part in images.split(4)])
    assert together.shape == (3,)
    assert torch.allclose(together, alone)
    (gradient,) = torch.autograd.grad(together[1], images)
    assert gradient[:4].abs().max() == gradient[8:].abs().max() == 0
    assert gradient[4:8].abs().max() > 0


@pytest.mark.parametrize("prior", [tv1, tv2, l2])
def test_flat_images_have_a_finite_gradient(prior):
    images = torch.zeros(2, 1, 4, 4, requires_grad=True)
    prior(images).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize("prior", [tv1, tv2, l2])
def test_gradient_is_right(prior):
    images = torch.rand(4, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: prior(x, 2), images)


def test_order_in_memory_does_not_matter():
    images = torch.rand(4, 3, 5, 5)
    sorted_ = images.contiguous(memory_format=torch.channels_last)
    for prior in (tv1, tv2, l2):
        assert torch.allclose(prior(images, 2), prior(sorted_, 2))
