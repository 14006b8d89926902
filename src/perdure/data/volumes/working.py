"""Working files: cases of the current task, prepared once, from which training samples are cut.

They hold images of patients. They lie in one folder, under numbers and not under names, and are deleted when the task
is sealed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from perdure.data.case import Case
from perdure.data.content import content_fingerprint
from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.source import Source, Split
from perdure.data.volumes.extra import need
from perdure.data.volumes.sampled import ANNOTATED, Ready, Sampled
from perdure.errors import DataError, RunError
from perdure.files import TEMPORARY, read_json, write_atomic, write_failure, write_json
from perdure.labels import TABLE_SIZE

MARKER: Final = "working.json"
"""Says which cases the files of a folder are made of; written first, deleted last."""
IMAGE, LABEL, PLACES = ".image.b2nd", ".label.b2nd", ".places.npz"
TAUGHT: Final = "annotated"
"""Entry among the places: ids that the case says it annotates."""


@dataclass(frozen=True)
class WorkingFiles:
    """Prepared cases in a folder.

    Args:
        folder: Where they lie.
        names: Of the cases, in the order of their numbers; not written anywhere.
    """

    folder: Path
    names: tuple[str, ...]

    def sample(self, name: str, preparation: Preparation, seed: int, labels: Collection[int] | None = None) -> Case:
        """A training sample, a pure function of the seed; of the files only what the sample shows is read.

        Args:
            name: Of the case.
            preparation: That the files were made with.
            seed: Of everything random.
            labels: Labels that samples are centred on, such as those that the task teaches; all if not given.

        Returns:
            Image ``(C, *patch)`` float32, label ``(*patch)`` int64 in the source's ids.

        Raises:
            DataError: A file is missing or damaged.
        """
        assert isinstance(preparation, Sampled)  # no other has working files
        case = f"{self.names.index(name):05d}"
        with _sound(self.folder):
            entries = np.load(self.folder / f"{case}{PLACES}", allow_pickle=False)
        with entries:
            places = _Places(self.folder, entries, labels)
            image, label = (_Stored(self.folder / f"{case}{ending}") for ending in (IMAGE, LABEL))
            sample = preparation.cut(Ready(image, label, places), seed)
            taught = places.read(TAUGHT).tolist() if TAUGHT in entries.files else None
        return Case(*sample, name, None if taught is None else frozenset(taught), group=name)


def prepare_working_files(
    source: Source,
    split: Split,
    names: Sequence[str],
    preparation: Sampled,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    content: str | None = None,
) -> WorkingFiles:
    """Prepare cases and write them into a folder, or go on where an earlier call was stopped.

    Each file is written whole or not at all, and the last file of a case only after its others. A folder whose files
    are those of other cases, or of another preparation, is refused.

    Args:
        source: Where the cases are read.
        split: Of the source.
        names: The cases.
        preparation: How they are prepared.
        folder: Empty, absent, or left by an earlier call.
        progress: Called after each case with the number of those that are done, and of all.
        content: :func:`~perdure.data.content.content_fingerprint` of the cases, where it is known; it is computed
            otherwise, for which up to 16 of them are read.

    Raises:
        RunError: The folder holds something else, or the disk has too little room.
        DataError: A case cannot be read or prepared.
        PerdureError: The disk became full, or the folder cannot be written.
    """
    if content is None:
        table = np.arange(TABLE_SIZE, dtype=np.int16)
        content = content_fingerprint((Dataset(source, split, tuple(names), table, preparation),))
    _begin(folder, _digest(names, preparation, content))
    missing = [number for number in range(len(names)) if not (folder / f"{number:05d}{PLACES}").exists()]
    for done, number in enumerate(missing):
        case = source.read(split, names[number])
        if case.label.shape != case.image.shape[1:]:
            raise source.size_error(split, names[number], case.image.shape[1:], case.label.shape)
        ready = preparation.ready(case)
        packed = {ending: _packed(array, preparation.patch) for ending, array in _arrays(ready).items()}
        if not done:
            _room(folder, sum(map(len, packed.values())) * len(missing))
        entries = {str(label): places for label, places in ready.places.items()}
        if case.annotated is not None:
            entries[TAUGHT] = np.asarray(sorted(case.annotated), np.uint16)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **entries)  # not compressed: an entry is read for every sample
        for ending, data in {**packed, PLACES: stream.getvalue()}.items():
            write_atomic(folder / f"{number:05d}{ending}", partial(Path.write_bytes, data=data))
        if progress is not None:
            progress(len(names) - len(missing) + done + 1, len(names))
    return WorkingFiles(folder, tuple(names))


def _arrays(ready: Ready) -> dict[str, npt.NDArray[Any]]:
    return {IMAGE: np.asarray(ready.image, np.float32), LABEL: np.asarray(ready.label, np.int16)}


def _packed(array: npt.NDArray[Any], patch: tuple[int, ...]) -> bytes:
    """An array as the content of a ``.b2nd`` file, with the chunks that nnU-Net chooses for a patch.

    In memory first: an error of the disk then comes from the operating system, and not, without its number, from the
    library.
    """
    blosc2 = need("blosc2")
    chosen = need("nnunetv2.training.dataloading.nnunet_dataset").comp_blosc2_params
    blocks, chunks = chosen((1, *array.shape[-3:]), patch, array.itemsize)
    lead = array.ndim - 3
    # the codec of nnU-Net's files; shuffled bytes, as it finds best where images were resampled
    settings = {
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 5,
        "filters": [blosc2.Filter.SHUFFLE],
        "nthreads": 1,
    }
    blocks, chunks = (1,) * lead + tuple(blocks[1:]), (1,) * lead + tuple(chunks[1:])
    packed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=settings)
    content: bytes = packed.to_cframe()
    return content


class _Stored:
    """An array in a file, of which only the chunks are read that an index touches."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        # memory maps fail on Windows; one thread, because those of the library do not survive a fork
        mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
        with _sound(self.folder):
            self.array = need("blosc2").open(str(path), mode="r", dparams={"nthreads": 1}, **mapped)
        self.shape: tuple[int, ...] = self.array.shape

    def __getitem__(self, index: Any) -> Any:
        with _sound(self.folder):
            return self.array[index]


class _Places(Mapping[int, npt.NDArray[np.uint16]]):
    """Places of each label, of which only the one is read that a sample asks for."""

    def __init__(self, folder: Path, entries: Any, wanted: Collection[int] | None) -> None:
        self.folder, self.entries = folder, entries
        labels = (int(key) for key in entries.files if key != TAUGHT)
        self.labels = tuple(i for i in labels if wanted is None or i in wanted or i == ANNOTATED)

    def read(self, key: str) -> npt.NDArray[np.uint16]:
        """One entry of the file."""
        with _sound(self.folder):
            found: npt.NDArray[np.uint16] = self.entries[key]
        return found

    def __getitem__(self, label: int) -> npt.NDArray[np.uint16]:
        return self.read(str(label))

    def __contains__(self, label: object) -> bool:
        return label in self.labels  # that of Mapping would read the entry

    def __iter__(self) -> Iterator[int]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)


@contextlib.contextmanager
def _sound(folder: Path) -> Iterator[None]:
    """What the libraries raise over missing and damaged files, as a DataError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(
            f"a working file in {folder} is missing or damaged",
            "delete this folder, then start again with --resume: the files are made anew",
        ) from error


def _own(folder: Path) -> list[Path]:
    """Working files in a folder, and what a kill left of one that was being written."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(f for f in files if f.name.endswith((IMAGE, LABEL, PLACES)) or f.name.startswith(TEMPORARY))


def _digest(names: Sequence[str], preparation: Sampled, content: str) -> str:
    """Digest of what decides the content of working files: cases, preparation, and the version of nnU-Net."""
    need("nnunetv2")  # told as a missing extra; the version alone would end in a traceback
    described = [preparation.model_dump(mode="json"), list(names), content, version("nnunetv2")]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=12).hexdigest()


def _begin(folder: Path, digest: str) -> None:
    """Mark an empty folder as one of working files; one with the same mark is taken over, any other refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {file.name for file in folder.iterdir() if not file.name.startswith(TEMPORARY)}
        for file in folder.glob(f"{TEMPORARY}*"):  # of a process that was killed while it wrote
            file.unlink()
    except OSError as error:
        raise write_failure(folder, error) from error
    if MARKER in inside:
        if read_json(folder / MARKER) != {"made_of": digest}:
            raise RunError(
                f"{folder} holds working files of other cases or settings",
                "delete this folder, or choose another one",
            )
    elif inside:
        raise RunError(
            f"{folder} is not empty: it holds {min(inside)}", "give an empty folder: working files are deleted later"
        )
    else:
        write_json(folder / MARKER, {"made_of": digest})


def _room(folder: Path, needed: int) -> None:
    """Raise RunError unless the disk holds working files like those of the first case, for all."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"working files need about {needed / 1e9:.1f} GB, the disk of {folder} has {free / 1e9:.1f} GB free",
            "free some space, or choose a folder on another disk",
        )
