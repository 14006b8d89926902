"""What is stored of a class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.methods.star.statistics import (
    feature_sums,
    norms_from,
    prototypes_from,
    pseudo_labels,
    spread_sums,
    spreads_from,
    tally,
)


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
    prototypes, norms = prototypes_from(sums), norms_from(sums)
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
    assert not prototypes_from(sums)[2].any() and norms_from(sums)[2].tolist() == [0.0, 0.0]
    assert norms_from(sums)[1, 1] == 0.0 and norms_from(sums)[1, 0] > 0
    spreads = spreads_from(spread_sums(features, codes, prototypes_from(sums)))
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
