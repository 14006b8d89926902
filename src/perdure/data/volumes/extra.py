"""Packages of the extra ``volumes``, imported where they are needed first: help and lists load none of them."""

from __future__ import annotations

import importlib
from types import ModuleType

from perdure.errors import PerdureError


def need(name: str) -> ModuleType:
    """Import a package of the extra. Raises PerdureError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PerdureError("reading volumes needs the extra 'volumes'", "pip install 'perdure[volumes]'") from error
