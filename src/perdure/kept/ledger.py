"""The ledger: every byte that a sealed task keeps, what kind it is and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from perdure.errors import DataError, RunError
from perdure.files import read_json, read_tensors, sha256, write_json, write_tensors
from perdure.kept.items import Kept

if TYPE_CHECKING:
    from torch import Tensor

LEDGER: Final = "ledger.json"
WEIGHTS: Final = Kept("weights", "weights", (), "training on the data of this and all earlier tasks")

ENTRY: Final[Mapping[str, type]] = {
    "name": str,
    "kind": str,
    "file": str,
    "bytes": int,
    "sha256": str,
    "made_from": str,
    "patient_data": bool,
}
"""What every entry of a ledger says."""


def write_kept(folder: Path, state: Mapping[str, Tensor], items: Sequence[Kept], classes: int) -> list[dict[str, Any]]:
    """Write a method's whole state, split by what it is: network weights, and one file for each kept item.

    Args:
        folder: The task's folder.
        state: ``method.state_dict()``.
        items: What the method says it keeps; every key must be in ``state`` and belong to one item only.
        classes: Number of classes seen, for bytes a class.

    Returns:
        Ledger entries.

    Raises:
        RunError: An item names a key that the state does not hold, or two items claim one key.
    """
    claimed: set[str] = set()
    for item in items:
        unknown = [k for k in item.keys if k not in state or k in claimed]
        if unknown:
            raise RunError(
                f"kept item '{item.name}' claims '{unknown[0]}', which is not in the method's state or not its own"
            )
        claimed.update(item.keys)
    weights = {k: v for k, v in state.items() if k not in claimed}
    entries = [_write(folder, "weights.safetensors", WEIGHTS, weights, classes)]
    for item in items:
        tensors = {k: state[k] for k in item.keys}
        entries.append(_write(folder, f"kept/{item.name}.safetensors", item, tensors, classes))
    return entries


def read_kept(folder: Path) -> dict[str, Tensor]:
    """Read back the whole state of a sealed task."""
    state = read_tensors(folder / "weights.safetensors")
    for entry in read_ledger(folder)["items"]:
        if entry["file"].startswith("kept/"):
            state.update(read_tensors(folder / entry["file"]))
    return state


def preview_entry(folder: Path, file: Path, patients: bool) -> dict[str, Any]:
    """Ledger entry of a sample picture of test data."""
    size = file.stat().st_size
    return {
        "name": file.stem,
        "kind": "preview",
        "file": file.relative_to(folder).as_posix(),
        "bytes": size,
        "file_bytes": size,
        "sha256": sha256(file),
        "made_from": "one test image, shown in the report",
        "patient_data": patients,
        "per_class_bytes": None,
        "shows": None,
        "tensors": [],
    }


def write_ledger(folder: Path, task: str, entries: Sequence[Mapping[str, Any]], patients: bool) -> None:
    """Write ``ledger.json``; raw samples of patient data sets are marked as patient data."""
    marked = [{**e, "patient_data": e["patient_data"] or (patients and e["kind"] == "exemplars")} for e in entries]
    totals: dict[str, int] = {}
    for entry in marked:
        totals[entry["kind"]] = totals.get(entry["kind"], 0) + entry["bytes"]
    write_json(folder / LEDGER, {"version": 1, "task": task, "items": marked, "total_bytes": totals})


def read_ledger(folder: Path) -> dict[str, Any]:
    """Read a ledger. Raises DataError where it is missing or damaged."""
    path = folder / LEDGER
    ledger = read_json(path)
    items = ledger.get("items") if isinstance(ledger, dict) else None
    totals = ledger.get("total_bytes") if isinstance(ledger, dict) else None
    if not isinstance(items, list) or not isinstance(totals, dict) or not all(map(_whole, items)):
        raise DataError(f"{path} is not a ledger", "the file was changed or is damaged")
    whole: dict[str, Any] = ledger
    return whole


def _whole(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())


def _write(folder: Path, file: str, item: Kept, tensors: Mapping[str, Tensor], classes: int) -> dict[str, Any]:
    path = folder / file
    write_tensors(path, tensors)
    by_class = sum(t.nbytes for t in tensors.values() if t.ndim and t.shape[0] == classes)
    return {
        "name": item.name,
        "kind": item.kind,
        "file": file,
        "bytes": sum(t.nbytes for t in tensors.values()),
        "file_bytes": path.stat().st_size,
        "sha256": sha256(path),
        "made_from": item.made_from,
        "patient_data": False,
        "per_class_bytes": by_class // classes if item.per_class and classes else None,
        "shows": item.shows,
        "tensors": [
            {"name": k, "shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")}
            for k, v in tensors.items()
        ],
    }
