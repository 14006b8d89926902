"""Packages of the extra ``volumes``, imported where they are needed first: help and lists load none of them."""

from __future__ import annotations

import importlib
from typing import Any

from perdure.errors import PerdureError


def need(name: str) -> Any:
    """Import a package of the extra. Raises PerdureError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PerdureError(
            f"reading volumes needs the extra 'volumes': {error}", "run pip install 'perdure[volumes]'"
        ) from error
