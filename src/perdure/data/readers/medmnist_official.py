"""The official MedMNIST files: their description, comparison of a file with them, and download."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from perdure.data.readers.npzfile import Header
from perdure.data.source import SPLITS
from perdure.errors import DataError, PerdureError
from perdure.files import TEMPORARY, write_failure
from perdure.labels import Kind


class OfficialSet(NamedTuple):
    """Description of an official set. ``md5`` is by image size; class k of ``classes`` has label k in the file."""

    about: str
    source: str
    licence: str
    kind: Kind
    multilabel: bool
    channels: int
    counts: Mapping[str, int]
    md5: Mapping[str, str]
    classes: Sequence[str]


@cache
def official_sets() -> dict[str, OfficialSet]:
    """The twelve official 2D sets by flag."""
    table = json.loads((files("perdure.data.readers") / "tables" / "medmnist.json").read_text(encoding="utf-8"))
    return {flag: OfficialSet(**facts) for flag, facts in table["sets"].items()}


def file_name(flag: str, size: int) -> str:
    """File name of an official set at an image size."""
    return f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"


def channels_of(images: Header) -> int:
    """1 for ``(N, H, W)`` and the last axis of ``(N, H, W, C)``."""
    return images.shape[3] if len(images.shape) == 4 else 1


def difference(path: Path, facts: OfficialSet, size: int, headers: Mapping[str, Header]) -> str:
    """Differences between a file and the official one; empty if the MD5 is the same."""
    ours, official = _md5(path), facts.md5[str(size)]
    if ours == official:
        return ""
    keys = {split: f"{split}_images" for split in SPLITS}
    found = {split: headers[key].shape[0] if key in headers else 0 for split, key in keys.items()}
    differs = [
        f"{s} has {found[s]} images, officially {facts.counts[s]}" for s in SPLITS if found[s] != facts.counts[s]
    ]
    images = headers["train_images"]
    shape, wanted = (*images.shape[1:3], channels_of(images)), (size, size, facts.channels)
    if shape != wanted:
        differs.append("images are {}×{} with {} channels, officially {}×{} with {}".format(*shape, *wanted))
    same = "numbers, size and channels of its images are the official ones, so order, packing or pixels differ"
    return f"{path} is not the official file (MD5 {ours}, officially {official}): {'; '.join(differs) or same}"


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download_official(flag: str, size: int, path: Path) -> None:
    """Download an official file with its authors' package, check its MD5, and rename it to ``path``.

    Args:
        flag: Name of the set, e.g. ``bloodmnist``.
        size: Height and width of its images.
        path: Destination.

    Raises:
        PerdureError: The package medmnist is not installed, or ``path`` cannot be written.
        DataError: The file could not be downloaded or is not the official one.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the package prints; standard output belongs to the command
            import medmnist
    except ImportError as error:
        raise PerdureError(
            f"fetching '{flag}' needs the package medmnist, which is not installed: {error}",
            "run pip install 'perdure[medmnist]', or download the file yourself",
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
            part = _fetch(medmnist, flag, size, Path(folder), path)
            digest, md5 = _md5(part), official_sets()[flag].md5[str(size)]
            if digest != md5:
                raise DataError(f"what was fetched as {path.name} has MD5 {digest}, not {md5}", "try again later")
            part.replace(path)
    except OSError as error:
        raise write_failure(path, error) from error


def _fetch(medmnist: Any, flag: str, size: int, folder: Path, path: Path) -> Path:
    facts = medmnist.INFO[flag]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            getattr(medmnist, facts["python_class"])(split="val", root=str(folder), size=size, download=True)
    except Exception as error:  # the package raises RuntimeError for every failure
        raise DataError(
            f"{path.name} could not be fetched ({type(error).__name__})",
            f"check the network, or fetch {facts['url' if size == 28 else f'url_{size}']} into {path.parent} yourself",
        ) from error
    return folder / path.name
