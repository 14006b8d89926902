"""The audit: is there anything in a run folder that no ledger knows, or that must not be there?

What it can prove: every file is listed with its hash and has the form and the size that its kind allows; texts, results
and pages follow from recipe, stream and counts; ledgers add up and agree with each other. What it cannot: that weights
and statistics reveal nothing, and that nobody wrote list, ledgers and files anew together. A signature tells that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from perdure.audit.files import IMAGES, MARK, Places, audit_files
from perdure.audit.findings import Audit
from perdure.audit.ledgers import audit_ledgers, read_sealed
from perdure.audit.names import audit_names, audit_words
from perdure.audit.remade import audit_remade
from perdure.audit.signature import audit_signature
from perdure.audit.texts import audit_texts
from perdure.audit.under_way import UnderWay
from perdure.audit.weights import audit_weights
from perdure.errors import DataError, PerdureError, RunError
from perdure.kept.ledger import MIN_IMAGES, sealed_folders
from perdure.run_folder import RunFolder

__all__ = ["Audit", "audit"]
_T = TypeVar("_T")


def audit(path: Path, key: Path | None = None) -> Audit:
    """Compare a run folder with its ledgers and its list of files, and look for patient data, names and paths.

    Args:
        path: The run folder.
        key: Public key to verify the signature with; without one, a signature is only noted.

    Raises:
        RunError: ``path`` is not a run folder.
        NewerVersionError: The run is of a newer version than this program reads.
        UsageError: The key cannot be used.
    """
    if not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} is not a run folder: it has no recipe.yaml", "give the folder that `perdure run` wrote")
    found, run = Audit(), RunFolder(path)
    audit_signature(path, key, found)
    # whatever cannot be read is told, and the rest looked into all the same
    stream = _read(run.stream, DataError, found)
    recipe = _read(run.recipe, RunError, found)
    tracker = recipe.name.replace("/", "-") if recipe is not None else ""
    min_images = recipe.privacy.min_images if recipe is not None else MIN_IMAGES
    names = [task.name for task in stream.tasks] if stream is not None else []
    places = Places.walk(path, found)
    sealed = read_sealed(sealed_folders(path, names), found)
    under_way = UnderWay.after(path, len(sealed.folders), names)
    listed = audit_files(path, places, sealed, under_way, tracker, found)
    # who edits stream.json alone does not make images of patients others: any file that says so counts
    patients = stream is None or stream.patients or any(led["patients"] for led in sealed.ledgers.values())
    deleted = "they are deleted when the task is sealed"
    if patients and IMAGES in found.files:
        count = found.files[IMAGES][0]
        what = "1 working file holds" if count == 1 else f"{count} working files hold"
        found.problems.append(f"{what} images of patients; {deleted}")
    if patients and MARK in found.files:
        what = "working files in the folder that engine.working named hold"
        found.problems.append(f"{what} images of patients; {deleted}")
    found.guard("ledgers", lambda: audit_ledgers(path, sealed, stream, patients, min_images, found))
    if listed is not None and stream is not None:
        growing = under_way is not None
        found.guard("texts", lambda: audit_texts(path, stream, sealed.folders, places.files, growing, found))
        found.guard("results and pages", lambda: audit_remade(path, stream, sealed.folders, places.files, found))
        if recipe is not None:
            found.guard("ledgers", lambda: audit_words(recipe, stream, sealed, found))
            found.guard("weights", lambda: audit_weights(recipe, stream, sealed, found))
    audit_names(path, places.files, found)
    if under_way is not None:
        found.notes.append("the run is not finished: the state of the task under way is listed, but not looked into")
    return found


def _read(read: Callable[[], _T], error: type[PerdureError], found: Audit) -> _T | None:
    try:
        return read()
    except error as wrong:
        found.problems.append(wrong.what)
        return None
