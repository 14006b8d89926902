"""Packages of the extra ``volumes``: imported when they are needed, and kept from printing."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

from perdure.errors import UsageError

_IMPORTING: Final = threading.RLock()


def need(name: str) -> ModuleType:
    """Import a module of the extra ``volumes``. Raises UsageError where it is not installed.

    nnU-Net prints when it is imported and when it works, which belongs to no output of ours.
    """
    try:
        with _IMPORTING:  # readers call this in threads, and standard output belongs to all of them
            if (loaded := sys.modules.get(name)) is not None:
                return loaded
            with quiet():
                return importlib.import_module(name)
    except ImportError as error:
        raise UsageError("reading volumes needs the extra 'volumes'", "pip install 'perdure[volumes]'") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a library prints from standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def nnunet_folders(folder: Path) -> Iterator[None]:
    """Let nnU-Net find raw and preprocessed data in ``folder``; the user's environment is as before afterwards."""
    # nnU-Net asks the machine for its name where the number of processes is not given
    wanted = {"nnUNet_raw": str(folder), "nnUNet_preprocessed": str(folder), "nnUNet_n_proc_DA": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_memory() -> int:
    """Bytes of memory that the machine can still give."""
    free: int = importlib.import_module("psutil").virtual_memory().available  # comes with accelerate
    return free
