"""Reading files, and writing them atomically: after a kill either the old or the new file is there."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import DataError, PerdureError, UsageError

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import Tensor

TEMPORARY = ".part-"
SECRET_BYTES = 32
DEEPEST = 50
"""Levels of nesting in YAML and JSON; recipes and our own files have at most a dozen."""


def refuse_special(path: Path) -> None:
    """Raise DataError for a pipe, a device or a socket: a pipe may block for ever, a device may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is a pipe or a device, not a file", "give a regular file")


def home(path: Path) -> Path:
    """A path with ``~`` and ``~name`` replaced. Raises UsageError where nobody has that name."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: there is no home folder of '{path.parts[0]}'", "write the whole path") from error


def cache_dir() -> Path:
    """Cache folder: ``$PERDURE_CACHE``, else the user's cache folder. Its content can be computed again."""
    named = os.environ.get("PERDURE_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "perdure" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "perdure"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perdure"


def cache_secret() -> bytes:
    """A random key in the cache folder, 32 bytes, readable by the user alone: digests in the cache are made with it.

    A digest of a patient's image, or of the name of its file, is then worth nothing on another machine, and nobody can
    tell from a copy of the cache without this file whose images were read.
    """
    return _secret(cache_dir() / "secret")


@functools.lru_cache(8)
def _secret(path: Path) -> bytes:
    """Read once per process: all digests of a process have one key, also where the cache cannot be written."""
    with contextlib.suppress(OSError):
        known = path.read_bytes()
        if len(known) == SECRET_BYTES:
            return known
    key = os.urandom(SECRET_BYTES)
    with contextlib.suppress(OSError):  # nothing is remembered then but for this process
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)  # with rights for the user alone
        with os.fdopen(handle, "wb") as stream:
            stream.write(key)
        Path(part).replace(path)
    return key


def write_atomic(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary file beside ``path``, flush it to disk, then rename it to ``path``.

    Raises:
        PerdureError: The disk is full or the folder cannot be written. ``path`` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        Path(part).chmod(0o644)
        fill(Path(part))
        with Path(part).open("rb") as written:  # or a power cut could leave the new name with no content
            os.fsync(written.fileno())
        Path(part).replace(path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            Path(part).unlink(missing_ok=True)


def write_failure(path: Path, error: OSError) -> PerdureError:
    """The PerdureError for an operating-system error while writing ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return PerdureError(
            f"the disk is full: could not write {path}",
            "free some space, then give the same command again (`perdure run` with --resume)",
        )
    return PerdureError(
        f"could not write {path}: {error.strerror or error}",
        "check that the folder exists and is writable",
    )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically. Keys keep their order, so equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises DataError if the file is missing or damaged."""
    refuse_special(path)
    try:
        text = path.read_text(encoding="utf-8")
        if nesting(text) > DEEPEST:
            raise ValueError("it is nested too deeply")
        return json.loads(text)
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; use sys.")[0]  # of a number of thousands of digits Python advises programmers
        raise DataError(f"{path} is not valid JSON: {why}") from error


def nesting(text: str) -> int:
    """Levels of brackets in a JSON text: what follows from it by recursion would overflow on thousands of them."""
    depth = deepest = 0
    quoted = False
    # one sign at a time: an expression for whole texts would look for the end of one that has none again and again
    for sign in re.finditer(r'\\.|["\[{\]}]', text, re.DOTALL):
        if sign[0] == '"':
            quoted = not quoted
        elif not quoted and sign[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not quoted and sign[0] in "]}":
            depth -= 1
    return deepest


def parse_yaml(text: str) -> JsonValue:
    """Plain values of a YAML text, as ``yaml.safe_load`` reads them, apart from what no recipe needs.

    Raises:
        yaml.YAMLError: The text is not YAML, repeats a key, or refers to another part of itself: a few lines that do so
            can stand for more values than memory holds.
    """
    import yaml  # here, because most commands read no YAML

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("references to other values (*name) are not allowed: write the value again")
            self.depth = getattr(self, "depth", 0) + 1
            if self.depth > DEEPEST:
                raise yaml.YAMLError("it is nested too deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, times in keys.items() if times > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"the key '{twice}' occurs twice (line {node.start_mark.line + 1} and below)")
            return super().construct_mapping(node, deep)

    try:
        value: JsonValue = yaml.load(text, Plain)  # noqa: S506  # a SafeLoader
        return value
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Equal tensors give equal bytes."""
    from safetensors.torch import save_file

    # a clone for each: safetensors refuses tensors that share memory, as tied weights do
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}

    def fill(part: Path) -> None:
        try:
            save_file(plain, str(part), metadata=dict(metadata or {}))
        except Exception as error:  # safetensors wraps the operating system's error in its own type
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if f"code: {code}," in str(error) or os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise

    write_atomic(path, fill)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, or only some of its tensors. Raises DataError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    refuse_special(path)
    try:
        with safe_open(str(path), "pt") as opened:
            found = set(opened.keys())
            wanted = sorted(found) if names is None else list(names)
            lacking = [name for name in wanted if name not in found]
            if lacking:
                raise DataError(
                    f"{path} lacks {len(lacking)} tensors, first '{lacking[0]}'",
                    "the file was changed or comes from another run: restore it",
                )
            return {name: opened.get_tensor(name) for name in wanted}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file. Raises DataError for a pipe or a device."""
    refuse_special(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
