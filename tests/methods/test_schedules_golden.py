"""Learning rates of the published schedules."""

from __future__ import annotations

import pytest

from perdure.engine.schedules import by_name, poly, stairs, warmup_poly


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


@pytest.mark.golden
@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1e-6), (1, 6.6765e-4), (100, 0.0664676), (1499, 0.954279), (1500, 0.954885), (15000, 0.535887)],
)
def test_warmup_of_a_number_of_steps(step, factor):
    """CLIP-CISS, section 7: 1,500 steps of 30,000, times the decay."""
    assert by_name("warmup_poly", 1500)(step, 30000) == pytest.approx(factor, rel=1e-5)


def test_a_task_shorter_than_the_warmup_ends_while_it_warms_up():
    rate = by_name("warmup_poly", 1500)
    assert rate(50, 100) == pytest.approx((1e-6 * (1 - 50 / 1500) + 50 / 1500) * 0.5**0.9)


@pytest.mark.golden
@pytest.mark.parametrize("per_epoch", [1, 7, 76, 293])
def test_stairs_stand_at_the_published_epochs(per_epoch):
    """0.1 for epochs 0 to 6, then times 0.3 every 6 epochs (CCSI 4.8), at the first step of the epoch to the step."""
    total, rate = 100 * per_epoch, stairs(0.07, 0.06, 0.3)
    assert by_name("stairs")(7 * per_epoch, total) == rate(7 * per_epoch, total)
    for epoch in range(100):
        stair = 0 if epoch < 7 else 1 + (epoch - 7) // 6
        for step in {epoch * per_epoch, (epoch + 1) * per_epoch - 1}:
            assert rate(step, total) == 0.3**stair, f"epoch {epoch}, step {step}"
    assert 0.1 * rate(6 * per_epoch, total) == 0.1
    assert 0.1 * rate(13 * per_epoch, total) == pytest.approx(0.009)
    assert 0.1 * rate(61 * per_epoch, total) < 1e-6 < 0.1 * rate(61 * per_epoch - 1, total)


def test_stairs_of_other_lengths():
    rate = by_name("stairs", steps=(0.5, 0.25, 0.1))
    assert [rate(step, 8) for step in range(8)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [by_name("stairs", steps=(0.5, 9.0, 0.1))(step, 4) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.1])
