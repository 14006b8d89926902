"""Packages of the extra ``volumes``."""

from __future__ import annotations

from importlib.util import find_spec

from perdure.errors import UsageError


def need(name: str) -> None:
    """Raise UsageError unless a package of the extra ``volumes`` is installed; nothing is imported."""
    if find_spec(name) is None:
        raise UsageError("reading volumes needs the extra 'volumes'", "pip install 'perdure[volumes]'")
