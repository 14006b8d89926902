"""The four losses of CCSI's update, worked by hand on small tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from perdure.methods.ccsi import terms


def test_class_weights_are_largest_count_over_count() -> None:
    # n = 6, 3, 0, 1: a = 6/6, 6/3, nothing, 6/1
    assert terms.class_weights(torch.tensor([6, 3, 0, 1])).tolist() == [1.0, 2.0, 0.0, 6.0]
    assert terms.class_weights(torch.tensor([0, 0])).tolist() == [0.0, 0.0]


def test_weighted_cross_entropy_by_hand() -> None:
    # rows of logits (0, 0) and (ln 3, 0): -log softmax of the target = ln 2 and ln(4/3)
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    targets = torch.tensor([1, 0])
    weights = torch.tensor([1.0, 3.0])  # the first sample has class 1, so weighs 3
    expected = (3 * math.log(2) + 1 * math.log(4 / 3)) / (3 + 1)
    assert float(terms.weighted_ce(logits, targets, weights)) == pytest.approx(expected)
    assert float(terms.weighted_ce(logits, targets, None)) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_two_classes_at_scale_one_cannot_fall_below_the_bound() -> None:
    # spec 2.2: cosines of 1 and -1 at scale 1 leave ln(1 + e^-2) = 0.127
    assert float(terms.weighted_ce(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), None)) == pytest.approx(
        0.126928, abs=1e-6
    )


def test_less_forget_is_one_minus_the_cosine() -> None:
    # cosines of (1,0) with (0,2) and of (3,4) with (4,3): 0 and 24/25
    now, before = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [4.0, 3.0]])
    assert float(terms.less_forget(now, before)) == pytest.approx((1 + 1 / 25) / 2)
    assert float(terms.less_forget(now, 7 * now)) == pytest.approx(0, abs=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("old", "step", "expected"),
    [
        (2, 2, 5.0),
        (4, 2, 7.071),
        (6, 2, 8.660),
        (3, 2, 6.124),
        (5, 2, 7.906),
        (7, 2, 9.354),
        (3, 3, 5.0),
        (9, 3, 8.660),
    ],
)
def test_the_published_distillation_weights(old: int, step: int, expected: float) -> None:
    assert terms.less_forget_weight(5.0, old, step) == pytest.approx(expected, abs=5e-4)


def test_margin_holds_old_samples_against_the_nearest_new_classes() -> None:
    cosines = torch.tensor(
        [
            [0.5, 0.1, 0.4, 0.1],  # old class 0: 0.3 - 0.5 + 0.4 = 0.2; with the second rival 0.3 - 0.5 + 0.1 < 0
            [0.2, 0.9, 0.1, 0.3],  # old class 1: 0.3 - 0.9 + 0.3 < 0, no loss
            [0.0, 0.0, 0.9, 0.1],  # new class 2: takes no part
        ]
    )
    targets = torch.tensor([0, 1, 2])
    assert float(terms.margin_ranking(cosines, targets, 2, 0.3, 1)) == pytest.approx(0.2 / 2)
    assert float(terms.margin_ranking(cosines, targets, 2, 0.3, 2)) == pytest.approx(0.1 / 2)
    assert float(terms.margin_ranking(cosines, targets, 2, 0.3, 9)) == pytest.approx(0.1 / 2)  # only two new classes


def test_a_batch_without_old_samples_has_no_margin_loss() -> None:
    cosines = torch.rand(3, 4, requires_grad=True)
    loss = terms.margin_ranking(cosines, torch.tensor([2, 3, 2]), 2, 0.3, 1)
    loss.backward()
    assert float(loss) == 0 and float(cosines.grad.abs().max()) == 0


def test_centroids_are_means_and_absent_classes_are_zero() -> None:
    cosines = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(terms.centroids(cosines, torch.tensor([0, 0, 2])), expected)


def test_moving_centroids_keep_the_direction_of_absent_classes() -> None:
    before, now = (
        torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]], requires_grad=True),
    )
    moved = terms.moving(before, now, 0.9)
    torch.testing.assert_close(moved, torch.tensor([[0.1, 0.9], [0.0, 0.2]]))
    moved.sum().backward()
    assert before.grad is None and torch.equal(now.grad, torch.full((2, 2), 0.9))


def test_idc_of_uninformative_centroids_is_the_log_of_the_classes() -> None:
    # all directions equal: R is constant, so -log(K R) + log(K^2 R) = log K; all zero: the same
    for rows in (torch.ones(4, 4), torch.zeros(4, 4)):
        assert float(terms.idc(rows, rows, 1.0)) == pytest.approx(math.log(4), abs=1e-6)


def test_idc_by_hand() -> None:
    # directions e1, e2 against e1, e2: R = [[e^(1/T), 1], [1, e^(1/T)]]
    eye = torch.eye(2)
    for temperature in (1.0, 5.0):
        high = math.exp(1 / temperature)
        expected = -math.log(2 * high) + math.log(2 * high + 2)
        assert float(terms.idc(3 * eye, 0.5 * eye, temperature)) == pytest.approx(expected, abs=1e-6)
    # one target row still zero: its entries are exp(0) = 1
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = -math.log(math.e + 1) + math.log(math.e + 1 + 1 + 1)
    assert float(terms.idc(eye, target, 1.0)) == pytest.approx(expected, abs=1e-6)


def test_idc_reaches_both_passes_and_falls_when_they_agree() -> None:
    torch.manual_seed(0)
    labelled, unlabelled = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    channels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def loss() -> torch.Tensor:
        return terms.idc(terms.centroids(labelled, channels), terms.centroids(unlabelled, channels), 1.0)

    before = loss()
    before.backward()
    assert float(labelled.grad.norm()) > 0 and float(unlabelled.grad.norm()) > 0
    with torch.no_grad():
        unlabelled -= unlabelled.grad
        labelled -= labelled.grad
    assert float(loss()) < float(before)
    assert F.cosine_similarity(labelled, unlabelled).isfinite().all()
