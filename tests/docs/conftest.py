"""Fixtures of the tests of the docs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture
def at_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the root with it on the import path, as `python -m perdure` does there."""
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    return root
