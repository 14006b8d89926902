"""Code outside of Perdure that a recipe names as ``package.module:name``: a method, a network, a reader of data.

A recipe may come from somebody else, and to import a module runs it. The command line therefore imports such code with
``--allow-code`` only, and only then finds modules of the current folder. A call from Python is not asked: whoever makes
it runs code already.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from perdure.errors import UsageError

HINT = "installed modules are found, with --allow-code those of the current folder too; --debug shows where it fails"


def is_foreign(name: str) -> bool:
    """True where a name in a recipe is a place in a module and none of Perdure's own names."""
    return ":" in name


def search_here() -> None:
    """Let modules of the current folder be found, after all installed ones, so that none of those is replaced."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def load(name: str, what: str) -> object:
    """What ``package.module:name`` names. Raises UsageError where it cannot be imported; ``what`` says what it is."""
    module, _, attribute = name.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's own module does when it is imported
        raise UsageError(f"the {what} '{name}' cannot be imported: {type(error).__name__}: {error}", HINT) from error
    return found
