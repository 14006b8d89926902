"""What classes are called in prompts: names are hyper-parameters, so they lie in files and have a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from perdure.errors import DataError, UsageError, nearest, plain
from perdure.files import refuse_special

FOLDER: Final = Path(__file__).parent / "tables"
TEMPLATE: Final = "a photo of a {}"
LONGEST_FILE: Final = 1 << 20


def class_names(source: str | Path) -> tuple[str, ...]:
    """Names of the classes 1, 2, … of a data set, in the order of their ids.

    Args:
        source: ``voc`` (20 names) or ``ade20k`` (150 short names), as the published text tables were made from; or the
            path of a UTF-8 text file with one name per line.

    Raises:
        UsageError: There is no such list and no such file.
        DataError: The file cannot be read, or holds an empty name or one twice.
    """
    known = sorted(file.stem for file in FOLDER.glob("*.txt"))
    path = FOLDER / f"{source}.txt" if str(source) in known else Path(source).expanduser()
    if not path.is_file():
        refuse_special(path)
        raise UsageError(f"there are no class names '{source}'", f"{nearest(str(source), known)}, or give a text file")
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise ValueError("it is larger than any list of names")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no list of class names: {error}", "write one name per line, in UTF-8") from error
    try:
        check_names(names)
    except UsageError as error:
        raise DataError(f"{path}: {error.what}", "write one name per line; each class needs one of its own") from error
    return names


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is empty or that two classes share: their queries would be the same."""
    seen: dict[str, int] = {}
    for position, name in enumerate(names, 1):
        word = " ".join(name.lower().split())  # as CLIP reads it
        if not word:
            raise UsageError(f"class {position} has an empty name", "give every class a name: it is how it is told")
        if word in seen:
            raise UsageError(
                f"classes {seen[word]} and {position} are both called '{plain(name)}'",
                "give them different names: a class is known by its name alone",
            )
        seen[word] = position


def names_hash(names: Sequence[str]) -> str:
    """Hex SHA-256 of names in their order."""
    return hashlib.sha256("\0".join(names).encode()).hexdigest()


def prompts(name: str, templates: Sequence[str]) -> list[str]:
    """A name in each template. Raises UsageError for a template without exactly one ``{}``."""
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(f"the prompt '{plain(template)}' has no single {{}}", f"write for example '{TEMPLATE}'")
    return [template.replace("{}", name) for template in templates]
