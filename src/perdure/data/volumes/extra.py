"""Packages of the extra ``volumes``, which are imported only where a volume is read or written."""

from __future__ import annotations

import importlib
from types import ModuleType

from perdure.errors import PerdureError


def need(name: str) -> ModuleType:
    """Import a package of the extra ``volumes``. Raises PerdureError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PerdureError("reading volumes needs the extra 'volumes'", "pip install 'perdure[volumes]'") from error
