"""The ledgers of a run: each says what is true of its files, agrees with the stream, and lists no raw patient data."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from perdure.audit.findings import Audit
from perdure.audit.formats import SIZES, Found, png_problem, read_safetensors
from perdure.errors import DataError, NewerVersionError
from perdure.kept.items import KeptKind
from perdure.kept.ledger import LEDGER, VERSION, Entry, Ledger, StoredTensor, is_raw, read_ledger, shows_few
from perdure.kept.manifest import IN_TASK, KINDS, MANIFEST, SIGNATURE
from perdure.kept.store import STORE
from perdure.run_folder import LOCK
from perdure.streams.description import DescribedStream

SAMPLE: Final = re.compile(r"samples/[\w.-]+\.(image\.png|truth\.png|pred\.png|error\.png|class\.json)")


@dataclass(frozen=True)
class Sealed:
    """The sealed tasks of a run.

    Attributes:
        folders: Their folders, in order.
        ledgers: The ledgers that can be read, by folder name.
        kinds: Kind of every file that may be there, by place.
    """

    folders: Sequence[Path]
    ledgers: dict[str, Ledger]
    kinds: dict[str, str]


def read_sealed(folders: Sequence[Path], found: Audit) -> Sealed:
    """Read the ledgers, and tell which files they list.

    Raises:
        NewerVersionError: One is of a newer version.
    """
    sealed = Sealed(folders, {}, {**KINDS, LOCK: "lock", MANIFEST: "list of files", SIGNATURE: "signature"})
    for folder in folders:
        sealed.kinds.update({f"tasks/{folder.name}/{name}": kind for name, kind in IN_TASK.items()})
        where = f"tasks/{folder.name}/{LEDGER}"
        try:
            ledger = read_ledger(folder)
        except NewerVersionError:
            raise
        except DataError as error:
            found.tell(where, f"cannot be used: {error.what}")
            continue
        sealed.ledgers[folder.name] = ledger
        for entry in ledger["items"]:
            for file in entry["files"]:
                sealed.kinds[file["file"]] = entry["kind"]
    return sealed


def audit_ledgers(
    run: Path, sealed: Sealed, stream: DescribedStream | None, patients: bool, min_images: int, found: Audit
) -> None:
    """Whether ledgers say what is true of their files, agree with the stream, and name no raw patient data."""
    found.min_images = min_images if patients else None
    for folder, ledger in sealed.ledgers.items():
        where = f"tasks/{folder}/{LEDGER}"
        if ledger["version"] != VERSION:
            found.tell(where, f"is of version {ledger['version']}: an earlier Perdure sealed the task")
        else:
            found.tell(where, _ledger_problem(run / where, ledger, stream, min_images))
        for entry in ledger["items"]:
            found.items.append({"task": folder, **entry})
            found.tell(where, _entry_problem(entry))
            if wrong := _patient_problem(where, entry, patients, min_images):
                found.problems.append(wrong)
        found.bytes_by_kind = ledger["total_bytes"]
    _audit_tensors(run, sealed, found)


def _patient_problem(where: str, entry: Entry, patients: bool, min_images: int) -> str | None:
    """Whether an item of a ledger holds images of patients, as they were read or as averages of few of them."""
    if entry["patient_data"] or (patients and is_raw(entry)):
        place = entry["files"][0]["file"] if entry["files"] else where
        more = f" and {len(entry['files']) - 1} more files" if len(entry["files"]) > 1 else ""
        return f"{place}{more}: raw patient data ({entry['kind']}: {entry['made_from']})"
    if patients and shows_few(entry, min_images):
        fewest = "an unknown number of" if entry["from_images"] is None else f"only {entry['from_images']}"
        return (
            f"{where}: '{entry['name']}' holds pictures that are averages of {fewest} images of patients, fewer than "
            f"{min_images}"
        )
    return None


def _ledger_problem(path: Path, ledger: Ledger, stream: DescribedStream | None, min_images: int) -> str | None:
    if path.read_text(encoding="utf-8") != json.dumps(ledger, indent=1, ensure_ascii=False) + "\n":
        return "is not as it was written, or holds more than a ledger does"
    if stream is not None and ledger["patients"] != stream.patients:
        said, other = ("patients", "no patients") if ledger["patients"] else ("no patients", "patients")
        return f"says that the images come from {said}, stream.json that they come from {other}"
    if ledger["min_images"] != min_images:
        return f"says min_images {ledger['min_images']}, recipe.yaml says {min_images}"
    totals: Counter[str] = Counter()
    for entry in ledger["items"]:
        totals[entry["kind"]] += entry["bytes"]
    if dict(totals) != ledger["total_bytes"]:
        return "its totals are not the sums of its items"
    return None


def _entry_problem(entry: Entry) -> str | None:
    """Whether the kind of an item is known and fits what it holds, and its bytes are those of its tensors and files."""
    name, kind = entry["name"], entry["kind"]
    if kind not in get_args(KeptKind):
        return f"'{name}' is of the unknown kind '{kind}'"
    places = [file["file"] for file in entry["files"]]
    own = entry["tensors"] or entry["stored"] is not None
    if not own and not entry["files"]:  # an item without content yet
        return None if entry["bytes"] == 0 else f"'{name}' counts bytes, but lists nothing"
    if not own:  # a picture for the report
        inside = [place.partition("/")[2].partition("/")[2] for place in places]
        if kind != "preview" or not all(map(SAMPLE.fullmatch, inside)):
            return f"'{name}' is called a {kind}, but is neither tensors nor a picture in samples/"
        size = sum(file["bytes"] for file in entry["files"])
    else:
        stored = [f for f in entry["files"] if f["file"].startswith(f"{STORE}/")]
        if not all(place.endswith(".safetensors") for place in places):
            return f"'{name}' is called {kind}, but lies in files that hold no tensors"
        if any(t["dtype"] not in SIZES for t in entry["tensors"]):
            return f"'{name}' holds numbers of an unknown type"
        size = sum(math.prod(t["shape"]) * SIZES[t["dtype"]] for t in entry["tensors"])
        size += sum(file["bytes"] for file in stored) if entry["stored"] is not None else 0
    return None if size == entry["bytes"] else f"'{name}' counts {entry['bytes']:,} bytes, but has {size:,}"


def _audit_tensors(run: Path, sealed: Sealed, found: Audit) -> None:
    """Safetensors files hold what ledgers list, and nothing else; pictures are pictures; marks say nothing more."""
    listed: dict[str, dict[str, StoredTensor]] = {}
    for tensor in (t for ledger in sealed.ledgers.values() for entry in ledger["items"] for t in entry["tensors"]):
        listed.setdefault(tensor["file"], {})[tensor["name"]] = tensor
    for place in sorted(sealed.kinds):
        path = run / place
        if not place.startswith(("tasks/", f"{STORE}/")) or path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".png":
            found.tell(place, png_problem(path.read_bytes()))
        elif path.suffix == ".safetensors":
            tensors, wrong = read_safetensors(path)
            found.tell(place, wrong)
            if place in listed:  # in files of the store, what the tensors are is the method's affair
                found.tell(place, _tensor_problem(tensors, listed[place]))
        elif sealed.kinds[place] == "mark":
            number = int(place.partition("/")[2].partition("-")[0])
            if path.read_text(encoding="utf-8", errors="replace") != json.dumps({"task": number}, indent=1) + "\n":
                found.tell(place, "holds more than the number of the task")


def _tensor_problem(tensors: Mapping[str, Found], listed: Mapping[str, StoredTensor]) -> str | None:
    for name, tensor in tensors.items():
        if name not in listed:
            return f"holds the tensor '{name}', which no ledger lists"
        if tensor != {key: listed[name][key] for key in ("shape", "dtype", "sha256")}:
            return f"its tensor '{name}' is not what the ledger says"
    missing = listed.keys() - tensors.keys()
    return f"lacks the tensor '{min(missing)}'" if missing else None
