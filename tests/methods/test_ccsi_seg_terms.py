"""Losses of class impressions for segmentation, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from perdure.labels import IGNORE
from perdure.methods.ccsi.terms import less_forget
from perdure.methods.ccsi_seg.terms import (
    agreement,
    balanced_bce,
    dice_loss,
    edge_band,
    one_hot,
    pixel_margin,
    pseudo_labels,
)


def test_edge_band_lies_on_both_sides():
    layout = torch.full((1, 5, 8), -1)
    layout[:, :, 4:] = 2
    assert edge_band(layout, 1)[0].all(0).nonzero()[:, 0].tolist() == [3, 4]
    assert edge_band(layout, 2)[0].all(0).nonzero()[:, 0].tolist() == [2, 3, 4, 5]
    assert not edge_band(layout, 0).any()


def test_balanced_bce_by_hand():
    logits = torch.tensor([[[[2.0, -1.0, 0.0, 3.0]], [[-2.0, 1.0, 0.5, 9.0]]]])
    targets = torch.tensor([[[[1.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    counts = torch.tensor([[[True, True, True, False]]])
    positive = math.log(1 + math.exp(-2))
    negative = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    absent = (math.log(1 + math.exp(-2)) + math.log(1 + math.e) + math.log(1 + math.exp(0.5))) / 3
    value = balanced_bce(logits, targets, counts)
    assert float(value) == pytest.approx(positive + negative + absent, abs=1e-6)
    # a rare class weighs as much as a common one
    wide = torch.cat([logits[:, :1], logits[:, :1, :, 1:2].expand(-1, -1, -1, 50)], 3)
    same = torch.cat([targets[:, :1], torch.zeros(1, 1, 1, 50)], 3)
    everything = torch.ones(1, 1, 54, dtype=torch.bool)
    assert float(balanced_bce(wide, same, everything)) < 2.0


def test_dice_counts_only_classes_of_the_layout():
    targets = torch.zeros(1, 2, 1, 4)
    targets[0, 0, 0, :2] = 1
    logits = torch.full((1, 2, 1, 4), -100.0)
    logits[0, 0, 0, 0] = 100.0
    counts = torch.ones(1, 1, 4, dtype=torch.bool)
    assert float(dice_loss(logits, targets, counts)) == pytest.approx(1 - 2 / 3)
    logits[0, 1] = 100.0  # a class that was not asked for is the cross-entropy's business
    assert float(dice_loss(logits, targets, counts)) == pytest.approx(1 - 2 / 3)
    assert float(dice_loss(logits, torch.zeros_like(targets), counts)) == 0.0


def test_agreement():
    layout = torch.tensor([[[0, 0, 1, -1]], [[-1, -1, -1, -1]]])
    seen = torch.tensor([[[0, -1, 1, 1]], [[0, 0, 0, 0]]])
    assert agreement(seen, layout, 2).tolist() == pytest.approx([(2 / 3 + 2 / 3) / 2, 0.0])


def test_pseudo_labels_where_sure():
    chance = torch.tensor([[[[0.9, 0.6, 0.05, 0.3]], [[0.2, 0.7, 0.1, 0.45]]]])
    ids = torch.tensor([4, 7])
    assert pseudo_labels(torch.logit(chance), ids, 0.8).tolist() == [[[4, IGNORE, 0, IGNORE]]]
    assert pseudo_labels(torch.logit(chance), ids, 0.5).tolist() == [[[4, 7, 0, 0]]]


def test_less_forget():
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
    before = torch.tensor([[[[2.0, 3.0]], [[0.0, 3.0]]]])
    assert float(less_forget(features, before)) == pytest.approx((0 + 1 - math.cos(math.pi / 4)) / 2, abs=1e-6)
    assert float(less_forget(before, before)) == pytest.approx(0, abs=1e-6)


def test_pixel_margin():
    logits = torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 1.0, 5.0]], [[1.5, -3.0, 9.0]]]]).requires_grad_()
    labels = torch.tensor([[[4, 7, 0]]])
    value = pixel_margin(logits, labels, torch.tensor([4, 7]), 1.0)
    assert float(value.detach()) == pytest.approx((1 - 2 + 1.5) / 2)
    value.backward()
    assert logits.grad is not None and logits.grad[0, :, 0, 2].eq(0).all()
    assert float(pixel_margin(logits, torch.zeros_like(labels), torch.tensor([4, 7]), 1.0).detach()) == 0.0


def test_one_hot():
    rows = torch.tensor([[[0, -1], [1, 1]]])
    assert torch.equal(one_hot(rows, 3), F.one_hot(rows + 1, 4)[..., 1:].movedim(-1, 1).float())
