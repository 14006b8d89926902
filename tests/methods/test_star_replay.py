"""How much STAR replays, and the replayed features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.methods.star.replay import RULES, Counts, chunks, draw, whole


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


WIDTH = 256


def statistics():
    torch.manual_seed(0)
    prototypes = F.normalize(torch.rand(3, WIDTH), dim=1)
    spreads = 0.02 + 0.05 * torch.rand(3, WIDTH)
    return prototypes, spreads, torch.tensor([[8.0, 2.0], [5.0, 0.5], [1.0, 0.0]])


def test_moments_are_those_stored():
    prototypes, spreads, norms = statistics()
    for row in range(3):
        x = draw(prototypes, spreads, norms, torch.full((20000,), row))
        mean, std = norms[row]
        assert F.cosine_similarity(x.mean(0), prototypes[row], dim=0) > 0.999
        torch.testing.assert_close(x.mean(0) @ prototypes[row], mean, rtol=0.02, atol=0)
        # E|x - s p|^2 = E[s^2] sum sigma^2: the chord around the scaled prototype
        chord = (x.square().sum(1).mean() - (mean**2 + std**2)).sqrt()
        torch.testing.assert_close(chord, ((mean**2 + std**2) * spreads[row].square().sum()).sqrt(), rtol=0.02, atol=0)


def test_the_norm_factor_is_one_a_vector():
    prototypes, spreads, norms = statistics()
    rows = torch.zeros(20000, dtype=torch.int64)
    x = draw(prototypes, torch.zeros_like(spreads), norms, rows)
    torch.testing.assert_close(x.norm(dim=1).std(), norms[0, 1], rtol=0.02, atol=0)
    torch.testing.assert_close(F.cosine_similarity(x, prototypes[:1]).abs(), torch.ones(20000))


def test_compat_norm_a_channel_collapses_the_spread_of_norms():
    prototypes, spreads, norms = statistics()
    rows = torch.zeros(20000, dtype=torch.int64)
    one, many = (draw(prototypes, spreads, norms, rows, per_channel=way) for way in (False, True))
    assert many.norm(dim=1).std() < 0.25 * one.norm(dim=1).std()
    cosines = [F.cosine_similarity(x, prototypes[:1]).mean() for x in (one, many)]
    assert cosines[1] < cosines[0] - 0.01
    torch.testing.assert_close(many.mean(0) @ prototypes[0], norms[0, 0], rtol=0.02, atol=0)


def test_chunks_are_bounded_and_complete():
    prototypes, spreads, norms = statistics()
    zero = torch.zeros_like(spreads)
    parts = list(chunks(prototypes, zero, norms * torch.tensor([1.0, 0.0]), torch.tensor([5, 0, 12]), 4))
    assert [len(part) for part in parts] == [4, 4, 4, 4, 1]
    x = torch.cat(parts)
    torch.testing.assert_close(x[:5], 8 * prototypes[:1].expand(5, -1))
    torch.testing.assert_close(x[5:], prototypes[2:].expand(12, -1))


def test_nothing_to_replay():
    assert list(chunks(*statistics(), torch.tensor([0, 0, 0]), 4)) == []


def test_draws_follow_torchs_seed():
    known = statistics()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(torch.cat(list(chunks(*known, torch.tensor([3, 2, 1]), 4))))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
