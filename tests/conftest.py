"""Shared fixtures. Thread counts are set before torch is imported so that parallel workers do not fight."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with small real data sets: $PERDURE_TEST_DATA, or ``shared/data`` beside the checkout."""
    named = os.environ.get("PERDURE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data sets are absent (set PERDURE_TEST_DATA to their folder)")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test its own cache folder and one thread."""
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))
