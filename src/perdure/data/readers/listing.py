"""Image lists and folder contents: the image and mask file of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, MASK_SUFFIXES
from perdure.errors import DataError


class Pair(NamedTuple):
    """The two files of a sample."""

    image: Path
    mask: Path


class Line(NamedTuple):
    """One line of an image list: its number in the file, counted from 1, and its columns."""

    number: int
    columns: tuple[str, ...]


def read_list(path: Path, columns: int = 2) -> list[Line]:
    """Read an image list with one entry or, if ``columns`` is 2, up to two white-space separated entries per line.

    Blank lines are skipped. With ``columns=1`` a line is one entry and may contain spaces.

    Raises:
        DataError: The list is missing, not text, empty, or has a line with too many entries.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the image list {path} cannot be read: {error}", "a list is a text file with one sample per line"
        ) from error
    lines: list[Line] = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = tuple(line.split()) if columns > 1 else (line.strip(),)
        if len(parts) > columns:
            raise DataError(
                f"{path} line {number} has {len(parts)} entries", "expected a name, or an image path and a mask path"
            )
        if any(parts):
            lines.append(Line(number, parts))
    if not lines:
        raise DataError(f"the image list {path} is empty", "write one sample name per line")
    return lines


def index_folder(folder: Path, suffixes: Iterable[str], ending: str = "") -> dict[str, Path]:
    """Map sample name -> file for the files of a folder, sorted by name.

    Args:
        folder: The folder. Sub-folders and hidden files are skipped.
        suffixes: File suffixes to include, lower case.
        ending: Required end of the stem, removed from the name, e.g. ``"_leftImg8bit"``.

    Raises:
        DataError: The folder is missing, or two of its files differ only in their suffix.
    """
    wanted = tuple(suffixes)
    found: dict[str, Path] = {}
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read: {error.strerror}", "check the data set's layout"
        ) from error
    for file in files:
        if file.name.startswith(".") or file.suffix.lower() not in wanted or not file.stem.endswith(ending):
            continue
        name = file.stem[: len(file.stem) - len(ending)]
        if name in found:
            raise DataError(
                f"{folder} holds both {found[name].name} and {file.name}", "a sample has one file: remove one of them"
            )
        found[name] = file
    return found


def match(images: Mapping[str, Path], masks: Mapping[str, Path], where: str) -> dict[str, Pair]:
    """Pair images and masks of the same name, in name order.

    Raises:
        DataError: There is no image, an image has no mask, or a mask has no image.
    """
    for these, those, what, lacks in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
        alone = [these[name] for name in these if name not in those]
        if alone:
            raise DataError(
                f"{what} without {lacks}: {alone[0]}{_more(alone)}", f"add the {lacks} or remove the {what}"
            )
    if not images:
        raise DataError(f"{where} holds no images", f"expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return {name: Pair(images[name], masks[name]) for name in sorted(images)}


Locate = Callable[[Line], tuple[Path, Path]]
"""Expected paths of the image and the mask of a line of a list; their suffix is not used."""


def from_list(path: Path, lines: list[Line], locate: Locate) -> dict[str, Pair]:
    """Find the files of every line of an image list, in list order. A sample's name is its image's stem.

    Each folder is read once, so that long lists need no file-system call per line.

    Raises:
        DataError: A file is missing (the message names the first and counts the others), or a sample is listed twice.
    """
    folders: dict[tuple[Path, bool], dict[str, Path]] = {}

    def find(file: Path, mask: bool) -> Path | None:
        key = (file.parent, mask)
        if key not in folders:
            folders[key] = index_folder(file.parent, MASK_SUFFIXES if mask else IMAGE_SUFFIXES)
        found = folders[key].get(file.stem)
        if (
            found is None and Path(file.stem).suffix.lower() in IMAGE_SUFFIXES
        ):  # the list has file names instead of sample names
            found = folders[key].get(Path(file.stem).stem)
        return found

    pairs: dict[str, Pair] = {}
    missing: list[tuple[int, str, Path]] = []
    for line in lines:
        image, mask = locate(line)
        found = find(image, mask=False), find(mask, mask=True)
        if found[0] is None or found[1] is None:
            missing.append((line.number, "image", image) if found[0] is None else (line.number, "mask", mask))
            continue
        if found[0].stem in pairs:
            raise DataError(f"{path} line {line.number} lists '{found[0].stem}' a second time", "remove the line")
        pairs[found[0].stem] = Pair(found[0], found[1])
    if missing:
        number, what, file = missing[0]
        raise DataError(
            f"{path} line {number} names a missing {what}: {file}{_more(missing)}", "add the file or remove the line"
        )
    return pairs


def _more(items: list[Path] | list[tuple[int, str, Path]]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
