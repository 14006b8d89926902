"""Packages of the extra ``diffusion``, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from perdure.errors import UsageError


def need(name: str) -> Any:
    """Import a module of the extra ``diffusion``. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "a generator of pairs needs the extra 'diffusion'", "pip install 'perdure[diffusion]'"
        ) from error
