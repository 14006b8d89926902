"""Learning rates of the published schedules."""

from __future__ import annotations

import pytest

from perdure.engine.schedules import poly, warmup_poly


@pytest.mark.golden
@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.01), (1, 0.009909955), (10, 0.009095326), (20, 0.008180521), (50, 0.005358867), (99, 0.000158489)],
)
def test_poly(step, lr):
    assert 0.01 * poly(0.9)(step, 100) == pytest.approx(lr, rel=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("step", "lr"), [(0, 1e-5), (1, 0.000504912), (10, 0.004552211), (19, 0.007859284), (20, 0.008180521)]
)
def test_warmup_poly(step, lr):
    assert 0.01 * warmup_poly(0.2)(step, 100) == pytest.approx(lr, rel=1e-5)
