"""Reads the tensors of a TorchScript archive without running anything in it.

OpenAI publishes CLIP this way. ``torch.jit.load`` would compile and run the archive's code, and ``torch.load`` with
``weights_only`` refuses archives. But an archive is a zip: ``data.pkl`` describes the tree of modules, and each storage
is a member of raw bytes. The tree is read by an unpickler that can build plain nodes and tensors and nothing else; the
code in the archive is never looked at.
"""

from __future__ import annotations

import functools
import io
import itertools
import operator
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from perdure.errors import DataError
from perdure.networks.weights import DAMAGE

DTYPES: Final = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
DEEPEST: Final = 64
"""Levels of modules; CLIP has seven."""
MOST: Final = 100_000
"""Values in the tree of modules; CLIP has some thousands. Few bytes can describe a tree that never ends."""


def is_torchscript(path: Path) -> bool:
    """True for a TorchScript archive; a file that is damaged so far that it is no zip is none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by their dotted names.

    Raises:
        DataError: The archive is damaged, or holds anything but modules, tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(archive)
    except _ForbiddenError as error:
        raise DataError(
            f"{path} asks for the Python object {error}, which no archive of a network needs; nothing in it was run",
            "fetch the file from its publisher, or use weights in the safetensors format",
        ) from error
    except (*DAMAGE, zipfile.BadZipFile, ArithmeticError) as error:
        raise DataError(f"{path} is a damaged TorchScript archive", "fetch it again") from error


class _ForbiddenError(Exception):
    """The pickle names something outside of the few that a tree of modules needs."""


class Leaf:
    """A tensor that a pickle cannot reach into: torch's own ``__setstate__`` would give it another size."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: object) -> None:
        raise ValueError("a tensor with a state of its own")


def _tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    entries = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(entries) != 1:
        raise ValueError("not one description of the modules")
    root = entries[0].removesuffix("data.pkl")
    left = 2 * sum(member.file_size for member in archive.infolist())
    storages: dict[tuple[str, torch.dtype], Leaf] = {}

    # Made anew for each file: whatever a pickle does to the classes and functions that it can name ends with the call.
    class Node:
        """A module of the archive: its attributes, whatever its class was called."""

        def __setstate__(self, state: dict[str, object]) -> None:
            self.state = state

    def storage(dtype: torch.dtype, key: str, count: int) -> Leaf:
        if (key, dtype) not in storages:
            raw = bytearray(_member(archive, f"{root}data/{key}"))
            storages[key, dtype] = Leaf(torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype))
        whole = storages[key, dtype].tensor
        if count > len(whole):
            raise ValueError("a storage is shorter than it says")
        return Leaf(whole[:count])

    def tensor(part: Leaf, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Leaf:
        nonlocal left
        flat = part.tensor
        cells = functools.reduce(operator.mul, size, 1)
        left -= cells * flat.element_size()
        reach = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) + 1
        # by strides of 0 few numbers could stand for more than memory holds
        if min((offset, *size, *stride)) < 0 or (cells and max(cells, reach) > len(flat)):
            raise ValueError("a tensor reaches beyond its storage")
        if left < 0:  # many tensors of one storage
            raise ValueError("the tensors are larger than the archive")
        return Leaf(flat.as_strided(tuple(size), tuple(stride), offset).clone())

    def same(value: object, *_: object) -> object:
        return value

    allowed: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("collections", "OrderedDict"): OrderedDict,
        # lists with a type, which TorchScript marks
        **{("torch.jit._pickle", f"build_{kind}list"): same for kind in ("int", "double", "bool", "tensor")},
        ("torch.jit._pickle", "restore_type_tag"): same,
        **{("torch", name): dtype for name, dtype in DTYPES.items()},
    }

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            if module.partition(".")[0] == "__torch__":
                return Node
            if (module, name) not in allowed:
                raise _ForbiddenError(f"'{module}.{name}'")
            return allowed[module, name]

        def persistent_load(self, pid: Any, /) -> Leaf:
            kind, dtype, key, _, count = pid
            if kind != "storage":
                raise ValueError("a reference to something that is no storage")
            return storage(dtype, key, count)

    tree = Reader(io.BytesIO(_member(archive, entries[0]))).load()
    values = _walk(tree, "", lambda value: value.state if isinstance(value, Node) else None, itertools.count())
    return dict(values)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Content of a member. torch stores data as it is; a compressed one could unpack to more than memory holds."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("data is compressed")
    return archive.read(name)


def _walk(
    value: object,
    name: str,
    state: Callable[[object], dict[str, object] | None],
    seen: Iterator[int],
    depth: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors below a node, with their dotted names; ``seen`` counts values."""
    if depth > DEEPEST or next(seen) > MOST:
        raise ValueError("modules are nested too deeply, in a circle, or too many")
    for key, child in (state(value) or {}).items():
        if isinstance(child, Leaf):
            yield name + key, child.tensor
        else:
            yield from _walk(child, f"{name}{key}.", state, seen, depth + 1)
