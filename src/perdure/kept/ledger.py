"""The ledger: every byte that a sealed task keeps, what kind it is, what it was made from and where it is.

Nothing that did not change is written again. Places are given from the run folder on, so a ledger may name files of
earlier tasks and of the run's store (:mod:`perdure.kept.store`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from perdure.errors import DataError, RunError
from perdure.files import read_json, read_tensors, sha256, write_json, write_tensors
from perdure.kept.items import Kept
from perdure.kept.store import STORE, FileStore, Place, StoredFile

if TYPE_CHECKING:
    from torch import Tensor

LEDGER: Final = "ledger.json"
DONE: Final = "done"
WEIGHTS: Final = Kept("weights", "weights", (), "training on the data of this and all earlier tasks")
_DAMAGED: Final = "the file was changed or is damaged"


class StoredTensor(TypedDict):
    """A tensor as a ledger lists it; ``sha256`` is that of its bytes, ``file`` the one that holds it."""

    name: str
    shape: list[int]
    dtype: str
    sha256: str
    file: Place


class Entry(TypedDict):
    """One kept item.

    ``bytes`` counts the tensors and the stored files that are needed after the task, not what earlier files hold
    besides. ``files`` are all files that it needs; ``stored`` is the name in the method's ``files`` of those in the
    store.
    """

    name: str
    kind: str
    bytes: int
    made_from: str
    patient_data: bool
    per_class_bytes: int | None
    shows: str | None
    stored: str | None
    files: list[StoredFile]
    tensors: list[StoredTensor]


class Ledger(TypedDict):
    """What ``ledger.json`` holds; ``total_bytes`` are those needed after the task, by kind."""

    version: int
    task: str
    items: list[Entry]
    total_bytes: dict[str, int]


_ADAPTER: Final = TypeAdapter(Ledger)


def task_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a task, ``tasks/00-NAME``."""
    return run / "tasks" / f"{index:02d}-{name.replace('/', '-').replace(' ', '-')}"


def sealed_folders(run: Path, names: Sequence[str]) -> list[Path]:
    """Folders of sealed tasks, given the names of all tasks, up to the first one that is not sealed."""
    folders: list[Path] = []
    for index, name in enumerate(names):
        folder = task_folder(run, index, name)
        if not (folder / DONE).is_file():
            break
        folders.append(folder)
    return folders


def write_kept(
    folder: Path,
    state: Mapping[str, Tensor],
    items: Sequence[Kept],
    classes: int,
    files: Mapping[str, Sequence[str]] | None = None,
    store: FileStore | None = None,
    before: Path | None = None,
) -> list[Entry]:
    """Write what is new of a method's state: network weights, and one file for each kept item that changed.

    Weights are compared tensor by tensor. Any other item is written whole if one of its tensors changed, so that one
    file shows it.

    Args:
        folder: The task's folder, two levels below the run folder.
        state: ``method.state_dict()``.
        items: What the method says it keeps; every key and name of files belongs to one item only.
        classes: Number of classes seen, for bytes per class.
        files: The method's files: names in the store, by the name that an item gives.
        store: Where they are.
        before: Folder of the task sealed before this one; nothing that its ledger lists is written or hashed again.

    Returns:
        Ledger entries.

    Raises:
        RunError: An item names a key or files that the method does not have, two claim one, or files have no item.
    """
    files, store = files or {}, store or FileStore()
    _check_claims(state, items, files)
    earlier = read_ledger(before)["items"] if before is not None else []
    known = {file["file"]: file for entry in earlier for file in entry["files"]}
    # whatever no item claims is a weight: nothing that a method saves escapes the ledger
    claimed = {key for item in items for key in item.keys}
    weights = {k: v for k, v in state.items() if k not in claimed}
    entries = []
    for item in (WEIGHTS, *items):
        tensors = weights if item is WEIGHTS else {k: state[k] for k in item.keys}
        place = "weights.safetensors" if item is WEIGHTS else f"kept/{item.name}.safetensors"
        previous = next((e["tensors"] for e in earlier if e["name"] == item.name and e["tensors"]), [])
        listed = _write_changed(folder, place, tensors, previous, whole=item is not WEIGHTS)
        if any(t["file"] not in known for t in listed):
            new = _describe(folder, folder / place)
            known[new["file"]] = new
        stored = [known.get(f"{STORE}/{name}") or store.describe(name) for name in files.get(item.files or "", ())]
        by_class = sum(t.nbytes for t in tensors.values() if t.ndim and t.shape[0] == classes)
        entry: Entry = {
            "name": item.name,
            "kind": item.kind,
            "bytes": sum(t.nbytes for t in tensors.values()) + sum(f["bytes"] for f in stored),
            "made_from": item.made_from,
            "patient_data": False,
            "per_class_bytes": by_class // classes if item.per_class and classes else None,
            "shows": item.shows,
            "stored": item.files,
            "files": [known[name] for name in sorted({t["file"] for t in listed})] + stored,
            "tensors": listed,
        }
        entries.append(entry)
    return entries


def _write_changed(
    folder: Path, file: str, tensors: Mapping[str, Tensor], previous: Sequence[StoredTensor], whole: bool
) -> list[StoredTensor]:
    """Write the tensors of one item that differ from the previous ledger's (all if ``whole``), and list all of them."""
    own = (folder / file).relative_to(run_of(folder)).as_posix()
    old = {t["name"]: t for t in previous}
    listed: list[StoredTensor] = []
    for name, tensor in tensors.items():
        shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        entry: StoredTensor = {"name": name, "shape": shape, "dtype": dtype, "sha256": hash_of(tensor), "file": own}
        if name in old and entry == {**old[name], "file": own}:
            entry["file"] = old[name]["file"]
        listed.append(entry)
    if whole and (len(listed) != len(old) or any(t["name"] not in old or t["file"] == own for t in listed)):
        for entry in listed:
            entry["file"] = own
    changed = {t["name"]: tensors[t["name"]] for t in listed if t["file"] == own}
    if changed:
        write_tensors(folder / file, changed)
    return listed


def _check_claims(state: Mapping[str, Tensor], items: Sequence[Kept], files: Mapping[str, Sequence[str]]) -> None:
    keys = Counter(key for item in items for key in item.keys)
    names = Counter(item.files for item in items if item.files is not None)
    for item in items:
        if bad := [k for k in item.keys if k not in state or keys[k] > 1]:
            raise RunError(
                f"kept item '{item.name}' claims '{bad[0]}', which is not in the method's state or not its own"
            )
        if item.files is not None and (item.files not in files or names[item.files] > 1):
            raise RunError(
                f"kept item '{item.name}' claims the files '{item.files}', which are not there or not its own"
            )
    if unclaimed := [name for name in files if name not in names]:
        raise RunError(f"the method has files '{unclaimed[0]}', but no kept item says what they are")
    again = [name for name, times in Counter(n for group in files.values() for n in group).items() if times > 1]
    if again:
        raise RunError(f"the file {again[0]} is kept twice")


def hash_of(tensor: Tensor) -> str:
    """Hex SHA-256 of the bytes of a tensor."""
    import torch

    # as bytes, because numpy has no bfloat16; the shape first, because a single number has no axis to view by
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def read_kept(folder: Path) -> dict[str, Tensor]:
    """Read back the buffers and weights of a sealed task, from the files of whichever tasks wrote them.

    Raises:
        DataError: The ledger or a file is missing or damaged, or a tensor is not the one that was sealed.
    """
    wanted: dict[str, dict[str, str]] = {}
    for entry in read_ledger(folder)["items"]:
        for tensor in entry["tensors"]:
            wanted.setdefault(tensor["file"], {})[tensor["name"]] = tensor["sha256"]
    state: dict[str, Tensor] = {}
    for file, hashes in wanted.items():
        state.update(read_tensors(run_of(folder) / file, hashes))
        changed = [name for name, expected in hashes.items() if hash_of(state[name]) != expected]
        if changed:
            raise DataError(
                f"{run_of(folder) / file}: '{changed[0]}' is not what the ledger says (hash differs)",
                "the file was changed or is damaged: restore it, or run `perdure audit` to see all of them",
            )
    return state


def read_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """The method's files after a sealed task: names in the store, by the name that an item gives."""
    prefix = f"{STORE}/"
    return {
        entry["stored"]: tuple(f["file"].removeprefix(prefix) for f in entry["files"] if f["file"].startswith(prefix))
        for entry in read_ledger(folder)["items"]
        if entry["stored"] is not None
    }


def preview_entry(folder: Path, file: Path, patients: bool, split: str = "test") -> Entry:
    """Ledger entry of a sample picture of what is measured: a ``test`` or a ``validation`` image."""
    return {
        "name": file.stem,
        "kind": "preview",
        "bytes": file.stat().st_size,
        "made_from": f"one {split} image, shown in the report",
        "patient_data": patients,
        "per_class_bytes": None,
        "shows": None,
        "stored": None,
        "files": [_describe(folder, file)],
        "tensors": [],
    }


def write_ledger(folder: Path, task: str, entries: Sequence[Entry], patients: bool) -> None:
    """Write ``ledger.json``; raw samples of patient data sets are marked as patient data."""
    totals: Counter[str] = Counter()
    for entry in entries:
        entry["patient_data"] |= patients and entry["kind"] == "exemplars"
        totals[entry["kind"]] += entry["bytes"]
    ledger: Ledger = {"version": 2, "task": task, "items": list(entries), "total_bytes": dict(totals)}
    write_json(folder / LEDGER, ledger)


def read_ledger(folder: Path) -> Ledger:
    """Read a ledger. Raises DataError where it is missing, damaged or names files outside of the run."""
    path = folder / LEDGER
    try:
        return _ADAPTER.validate_python(read_json(path))
    except ValidationError as error:
        raise DataError(f"{path} is not a ledger", _DAMAGED) from error


def run_of(folder: Path) -> Path:
    """The run folder of a task's folder."""
    return folder.parents[1]


def _describe(folder: Path, path: Path) -> StoredFile:
    """A file in a task's folder, as its ledger lists it."""
    place = path.relative_to(run_of(folder)).as_posix()
    return {"file": place, "bytes": path.stat().st_size, "sha256": sha256(path)}
