"""Moments of replayed features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from perdure.methods.star.replay import chunks, draw

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
