"""Table 3.2 on a hand-made case with two old classes, and the rounding of replay numbers."""

from __future__ import annotations

import pytest
import torch

from perdure.methods.star.bookkeeping import RULES, Counts, whole


def counts(old=(1000.0, 70.0), background=5000.0, predicted=(2000.0, 100.0, 90.0)):
    return Counts(*(torch.tensor(v, dtype=torch.float64) for v in (old, background, predicted)))


@pytest.mark.parametrize(
    ("rule", "replays", "repeat", "background", "old"),
    [
        # B = 5000 (1 - .03) = 4850; (1000 - 100) / 8, (70 - 90) / 8 -> 0; 4850 / 2000 - .5; 1000 + 4850
        ("overlap", [112.5, 0.0], 1.925, 5850.0, [1000.0, 70.0]),
        # B = 5000; 1000 / 8, 70 / 8; 5000 / 2000; 2000 + 5000; old + predicted
        ("disjoint", [125.0, 8.75], 2.5, 7000.0, [1100.0, 160.0]),
        ("carried", [125.0, 8.75], 2.5, 7000.0, [1000.0, 70.0]),
    ],
)
def test_each_column(rule, replays, repeat, background, old):
    books = RULES[rule](counts(), 3, 8)
    assert books.replays.tolist() == pytest.approx(replays)
    assert float(books.repeat) == pytest.approx(repeat)
    assert float(books.background) == pytest.approx(background)
    assert books.old.tolist() == pytest.approx(old)


@pytest.mark.parametrize("rule", RULES)
def test_no_true_background_means_no_repeat(rule):
    books = RULES[rule](counts(predicted=(0.0, 0.0, 0.0)), 1, 4)
    assert float(books.repeat) == 0.0
    assert torch.isfinite(books.background)


def test_overlap_repeat_is_never_negative():
    assert float(RULES["overlap"](counts(background=10.0), 1, 4).repeat) == 0.0


def test_truncation_loses_rare_classes_and_rounding_does_not():
    amounts = torch.tensor([112.5, 0.25, 0.0, 3.0])
    assert whole(amounts, truncate=True).tolist() == [112, 0, 0, 3]
    torch.manual_seed(0)
    drawn = torch.stack([whole(amounts) for _ in range(4000)])
    assert drawn.double().mean(0).tolist() == pytest.approx([112.5, 0.25, 0.0, 3.0], abs=0.03)
    assert set(drawn[:, 1].tolist()) == {0, 1}
    assert drawn[:, 2].max() == 0 and drawn[:, 3].min() == drawn[:, 3].max() == 3


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_whole_does_not_depend_on_the_number_of_processes(world):
    amounts = torch.tensor([112.5, 0.25, 10.0])
    torch.manual_seed(world)
    together = sum(whole(amounts, world).double() for _ in range(world * 4000)) / 4000
    assert together.tolist() == pytest.approx([112.5, 0.25, 10.0], rel=0.1)
    assert (whole(amounts, world, truncate=True) == (amounts / world).long()).all()
