"""Distances of impressions to training images, counted in batches."""

from __future__ import annotations

import math

import torch

from perdure.methods.ccsi.memorisation import BINS, distance_counts, nearest


def grey(*values: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), value) for value in values])


def test_nearest_image_of_the_same_class_only():
    # from 0.5: 0.75 is 0.25 away, 0.4 (other class) does not count; from 0: 1 is 1 away
    counts = distance_counts(grey(0.75, 0.4, 1.0), torch.tensor([0, 2, 1]), grey(0.5, 0.0), torch.tensor([0, 1]))
    assert counts.shape == (2, BINS)
    assert counts.dtype == torch.int64
    assert counts.sum().item() == 2
    assert nearest(counts).tolist() == [0.25, 1.0]


def test_class_without_images_has_no_distance():
    counts = distance_counts(grey(0.5), torch.tensor([0]), grey(0.5, 0.5), torch.tensor([0, 1]))
    found = nearest(counts).tolist()
    assert found[0] == 0
    assert math.isnan(found[1])


def test_counts_add_up_over_batches_and_match_the_direct_minimum():
    images, train = torch.rand(7, 3, 8, 8), torch.rand(40, 3, 8, 8)
    codes, train_codes = torch.arange(7) % 3, torch.arange(40) % 3
    train[4] = images[1]  # both of class 1: a memorised image
    total = sum(
        distance_counts(train[i : i + 9], train_codes[i : i + 9], images, codes) for i in range(0, len(train), 9)
    )
    assert torch.equal(total, distance_counts(train, train_codes, images, codes))
    apart = (images[:, None] - train[None]).square().mean((2, 3, 4)).sqrt()
    apart[codes[:, None] != train_codes[None]] = torch.inf
    assert torch.allclose(nearest(total), apart.min(1).values, atol=0.5 / 1024 + 1e-4)
    assert nearest(total)[1] == 0


def test_excluded_pairs_do_not_count():
    images, codes = grey(0.2, 0.3, 0.9), torch.tensor([0, 0, 1])
    found = nearest(distance_counts(images, codes, images, codes, torch.eye(3, dtype=torch.bool)))
    assert torch.allclose(found[:2], torch.tensor([0.1, 0.1]), atol=0.5 / 1024 + 1e-6)
    assert found[2].isnan()


def test_values_beyond_the_range_fall_into_the_last_bin():
    counts = distance_counts(grey(3.0), torch.tensor([0]), grey(-1.0), torch.tensor([0]))
    assert counts[0, -1] == 1
    assert nearest(counts).tolist() == [1.0]
