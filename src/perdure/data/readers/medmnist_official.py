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
from typing import NamedTuple

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


def difference(path: Path, facts: OfficialSet, size: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Differences between a file and the official one; empty if the MD5 is the same.

    Args:
        path: The file.
        facts: Description of the official set.
        size: Height and width of the official images.
        shapes: Shape of each array of the file.
    """
    ours, official = _md5(path), facts.md5[str(size)]
    if ours == official:
        return ""
    found = {split: shapes.get(f"{split}_images", (0,))[0] for split in SPLITS}
    differs = [
        f"{s} has {found[s]} images, officially {facts.counts[s]}" for s in SPLITS if found[s] != facts.counts[s]
    ]
    _, height, width, *channels = shapes["train_images"]
    shape, wanted = (height, width, *(channels or [1])), (size, size, facts.channels)
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
    facts = medmnist.INFO[flag]
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    getattr(medmnist, facts["python_class"])(split="val", root=folder, size=size, download=True)
            except Exception as error:  # the package raises RuntimeError for every failure
                url = facts["url" if size == 28 else f"url_{size}"]
                raise DataError(
                    f"{path.name} could not be fetched ({type(error).__name__})",
                    f"check the network, or fetch {url} into {path.parent} yourself",
                ) from error
            # a wrong file never gets the name, not even for a moment: another process could read it
            part = Path(folder) / path.name
            digest, md5 = _md5(part), official_sets()[flag].md5[str(size)]
            if digest != md5:
                raise DataError(f"what was fetched as {path.name} has MD5 {digest}, not {md5}", "try again later")
            part.replace(path)
    except OSError as error:
        raise write_failure(path, error) from error
