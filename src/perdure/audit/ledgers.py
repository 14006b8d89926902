"""The ledgers of a run: each says what is true of its files, agrees with the stream, and lists no raw patient data."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final, get_args

import numpy as np

from perdure.audit.findings import Audit
from perdure.audit.formats import PNG_START, SIZES, png_problem, read_safetensors
from perdure.errors import DataError, NewerVersionError
from perdure.kept.items import KeptKind
from perdure.kept.ledger import (
    LEDGER,
    LONGEST_NAME,
    MOST_WORDS,
    VERSION,
    Entry,
    Ledger,
    StoredTensor,
    is_raw,
    read_ledger,
    shows_few,
)
from perdure.kept.manifest import IN_TASK, KINDS, MANIFEST, SIGNATURE
from perdure.kept.store import STORE
from perdure.labels import BACKGROUND, IGNORE, LabelSpace
from perdure.report.samples import ERRORS, HATCH, NOT_COUNTED_BEFORE
from perdure.run_folder import LOCK
from perdure.streams.description import DescribedStream

SAMPLE: Final = re.compile(r"samples/[\w.-]+\.(image\.png|truth\.png|pred\.png|error\.png|class\.json)")
PICTURE: Final = ".image.png"
MOST_ITEMS: Final = 100
"""Of a method, each with its explanation."""
MOST_SIDES: Final = 8
"""Numbers in the shape of a tensor."""
_PREVIEW: Final = re.compile(r"one (test|validation) image, shown in the report")


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
            found.check(where, partial(_ledger_problem, run / where, ledger, stream, min_images))
        for entry in ledger["items"]:
            found.items.append({"task": folder, **entry})
            found.check(where, partial(_entry_problem, entry))
            if wrong := _patient_problem(where, entry, patients, min_images):
                found.problems.append(wrong)
        found.bytes_by_kind = ledger["total_bytes"]
    _audit_contents(run, sealed, found)
    colors = None if stream is None else _colors(stream)
    for place in sorted(sealed.kinds):
        if place.endswith(PICTURE) and SAMPLE.fullmatch(place.partition("/")[2].partition("/")[2]):
            maps = {f"{place.removesuffix(PICTURE)}.{part}.png" for part in ("truth", "pred", "error")}
            for each in sorted({place, *maps}):
                if all((run / p).is_file() and not (run / p).is_symlink() for p in (place, each)):
                    found.check(each, partial(_sample_problem, run / each, run / place, colors))


def _colors(stream: DescribedStream) -> set[bytes]:
    """The RGBA colours of a run's maps: of its classes, of what is not counted, of errors, and clear."""
    # a colour out of range is told of stream.json
    classes = tuple(c for c in stream.classes if all(0 <= value <= 255 for value in c.color))
    palette = LabelSpace(classes, stream.background).palette()
    errors = [*(color for _, color in ERRORS), HATCH, NOT_COUNTED_BEFORE]
    known = [*(c.color for c in classes), tuple(palette[IGNORE]), *errors]
    return {palette[BACKGROUND].tobytes() + b"\0", b"\0\0\0\0", *(bytes([*map(int, color), 255]) for color in known)}


def _sample_problem(path: Path, image: Path, colors: set[bytes] | None) -> str | None:
    """Whether a picture of a sample shows nothing but the image, or a map of it: what is clear can hide a picture."""
    content = path.read_bytes()
    if (wrong := png_problem(content)) is not None:
        return wrong
    start = len(PNG_START) + 8
    size, form = content[start : start + 8], tuple(content[start + 8 : start + 10])
    if path == image:
        return None if form == (8, 2) else "is not a picture of 8 bits per colour without transparency"
    with image.open("rb") as stream:
        if stream.read(start + 8)[start:] != size:
            return "is not of the size of the sample's image"
    if form != (8, 6):
        return "is not a map with 8 bits per colour and transparency"
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        shown = np.unique(np.frombuffer(picture.tobytes(), "<u4"))
    if colors is not None and (strange := [c for c in shown if c.tobytes() not in colors]):
        return f"shows {len(strange):,} colours that no class of the run has"
    return None


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
    if stream is not None and ledger["task"] not in [task.name for task in stream.tasks]:
        return "names a task that is none of the stream"
    own = [entry for entry in ledger["items"] if entry["tensors"] or entry["stored"] is not None or not entry["files"]]
    if len(own) > MOST_ITEMS or len({entry["name"] for entry in own}) < len(own):
        return f"lists an item twice, or more than {MOST_ITEMS} items besides pictures"
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
    if (entry["stored"] or "").startswith("exemplars") and kind != "exemplars":  # raw data, whatever it is called
        return f"'{name}' is stored as exemplars and called {kind}"
    if len(name) > LONGEST_NAME or len(entry["made_from"]) > MOST_WORDS:
        return f"'{name[:40]}' has a name or an explanation that is too long"
    if entry["shows"] not in (None, "images", "distances") or len(entry["stored"] or "") > LONGEST_NAME:
        return f"'{name}' says otherwise than an item does how it is shown or stored"
    if any(len(t["name"]) > MOST_WORDS or len(t["shape"]) > MOST_SIDES for t in entry["tensors"]):
        return f"'{name}' lists a tensor with too long a name or shape"
    places = [file["file"] for file in entry["files"]]
    own = entry["tensors"] or entry["stored"] is not None
    if not own and not entry["files"]:  # an item without content yet
        return None if entry["bytes"] == 0 else f"'{name}' counts bytes, but lists nothing"
    if not own:  # a picture for the report
        inside = [place.partition("/")[2].partition("/")[2] for place in places]
        if kind != "preview" or not all(map(SAMPLE.fullmatch, inside)):
            return f"'{name}' is called a {kind}, but is neither tensors nor a picture in samples/"
        if [name] != [PurePosixPath(place).stem for place in places] or not _PREVIEW.fullmatch(entry["made_from"]):
            return f"'{name}' is a picture in samples/, but does not say so as the run does"
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


def _audit_contents(run: Path, sealed: Sealed, found: Audit) -> None:
    """Safetensors files hold what ledgers list, and nothing else; pictures are pictures; marks say nothing more."""
    listed: dict[str, dict[str, StoredTensor]] = {}
    weights: set[tuple[str, str]] = set()
    for entry in (entry for ledger in sealed.ledgers.values() for entry in ledger["items"]):
        for tensor in entry["tensors"]:
            listed.setdefault(tensor["file"], {})[tensor["name"]] = tensor
            if entry["kind"] == "weights":
                weights.add((tensor["file"], tensor["name"]))
    for place in sorted(sealed.kinds):
        path = run / place
        if not place.startswith(("tasks/", f"{STORE}/")) or path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".png":
            found.check(place, partial(_picture_problem, path))
        elif path.suffix == ".safetensors":
            names = {name for file, name in weights if file == place}
            # in files of the store, what the tensors are is the method's affair
            found.check(place, partial(_tensor_problem, path, listed.get(place), names))
        elif sealed.kinds[place] == "mark":
            found.check(place, partial(_mark_problem, path, int(place.partition("/")[2].partition("-")[0])))


def _picture_problem(path: Path) -> str | None:
    return png_problem(path.read_bytes())


def _mark_problem(path: Path, number: int) -> str | None:
    same = path.read_text(encoding="utf-8", errors="replace") == json.dumps({"task": number}, indent=1) + "\n"
    return None if same else "holds more than the number of the task"


def _tensor_problem(path: Path, listed: Mapping[str, StoredTensor] | None, weights: Collection[str]) -> str | None:
    """Whether a file of tensors is not what ledgers list (``None``: they list the file only), or a weight is none."""
    tensors, wrong = read_safetensors(path)
    if wrong is not None or listed is None:
        return wrong
    for name, tensor in tensors.items():
        if name not in listed:
            return f"holds the tensor '{name}', which no ledger lists"
        said: StoredTensor = listed[name]
        if (tensor["shape"], tensor["dtype"], tensor["sha256"]) != (said["shape"], said["dtype"], said["sha256"]):
            return f"its tensor '{name}' is not what the ledger says"
        if name in weights and not tensor["finite"]:  # statistics may hold NaN for "none"
            return f"its weight '{name}' is not finite"
    missing = listed.keys() - tensors.keys()
    return f"lacks the tensor '{min(missing)}'" if missing else None
