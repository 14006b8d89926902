"""The benchmark of generated pairs: the ways of a training step agree, and distances are those worked by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def program() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "generated_pairs.py"
    spec = importlib.util.spec_from_file_location("generated_pairs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its tuples look for their module by name
    spec.loader.exec_module(module)
    return module


def test_one_call_and_two_have_the_same_losses_and_gradients(program: ModuleType) -> None:
    learner = program.Learner(program.SHAPES["cgr/phantoms"]._replace(batch=2), torch.device("cpu"))
    learner.check()
    found = learner.losses("one call")
    assert set(found) == {"joint", "conditional"} and min(found.values()) > 0.1
    with torch.no_grad():
        learner.made.targets[2:] += 1  # of the second pass
    assert learner.losses("two calls")["conditional"] != pytest.approx(found["conditional"], abs=1e-2)
    assert learner.losses("two calls")["joint"] == pytest.approx(found["joint"], abs=1e-5)


def test_frechet_distance_by_hand(program: ModuleType) -> None:
    one = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert program.frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert program.frechet(one, one + shift) == pytest.approx(5.25)
    centred = one - one.mean(0)
    assert program.frechet(centred, 3 * centred) == pytest.approx(4 * float(centred.T.cov().trace()))


def test_a_sampler_is_compared_seed_by_seed(program: ModuleType) -> None:
    first = [[{"dice": 0.5}, {"dice": 0.7}], [{"dice": 0.7}, {"dice": 0.9}]]
    rows = [[{"dice": 0.6}, {"dice": 0.6}], [{"dice": 0.8}, {"dice": 0.8}]]
    mean, more, error = program.compared(rows, first, "dice")
    assert (mean, more, error) == pytest.approx((0.7, 0.0, 0.1), abs=1e-6)
    same = {"dice": (0.7, 0.0, 0.0), "learned": (0.8, 0.0, 0.0), "images": (1.0, 0.05, 0.0), "pairs": (1.0, 0.0, 0.0)}
    assert program.as_good(same)
    assert not program.as_good(same | {"dice": (0.7, -0.02, 0.0)})
    assert not program.as_good(same | {"learned": (0.7, -0.02, 0.0)})
    assert not program.as_good(same | {"pairs": (1.2, 0.2, 0.0)})


def test_what_a_segmenter_learns_from_pairs(program: ModuleType) -> None:
    """Bright squares are found in other images; from masks that do not belong to the images nothing is learned."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.zeros(40, 16, 16, dtype=torch.int64)
    for mask, (y, x) in zip(codes, torch.randint(0, 8, (40, 2), generator=draw).tolist(), strict=True):
        mask[y : y + 8, x : x + 8] = 1
    images = (codes + 0.3 * torch.randn(40, 16, 16, generator=draw))[:, None]
    real = images[20:], codes[20:]
    assert program.learned((images[:20], codes[:20]), real, 1, 0) > 0.9
    assert program.learned((images[:20], codes[:20].roll(8, 2)), real, 1, 0) < 0.6
