"""The script that measures angles between classes in the features of finished runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def test_angles_worked_by_hand() -> None:
    spec = importlib.util.spec_from_file_location("angles", Path(__file__).parents[1] / "scripts" / "feature_angles.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def at(*degrees: float) -> torch.Tensor:
        turns = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([turns.cos(), turns.sin()], 1)

    # means at 10 and 60 degrees; 20 of the second class lies nearer to the first
    first, second = at(0, 20), at(20, 60, 100)
    between, *rest = script.angles(first, second)
    assert between == pytest.approx(50, abs=1e-3)
    assert rest == pytest.approx([10, 80 / 3, 100, 200 / 3], abs=1e-2)
