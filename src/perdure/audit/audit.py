"""The audit: is there anything in a run folder that no ledger knows, or that must not be there?

What it can prove: every file is listed with its hash and has the form and the size that its kind allows; texts, results
and pages follow from recipe, stream and counts; ledgers add up and agree with each other. What it cannot: that weights
and statistics reveal nothing, and that nobody wrote list, ledgers and files anew together. A signature tells that.
"""

from __future__ import annotations

from pathlib import Path

from perdure.audit.contents import audit_contents
from perdure.audit.files import Audit, Places, Sealed, audit_files, audit_ledgers, look_for_names, read_sealed
from perdure.errors import DataError, PerdureError, RunError, UsageError
from perdure.kept.ledger import MIN_IMAGES, sealed_folders, task_folder
from perdure.kept.manifest import SIGNATURE
from perdure.run_folder import RunFolder
from perdure.streams.description import DescribedStream, read_stream

__all__ = ["Audit", "audit"]


def audit(path: Path, key: Path | None = None) -> Audit:
    """Compare a run folder with its ledgers and its list of files, and look for patient data, names and paths.

    Args:
        path: The run folder.
        key: Public key to verify the signature with; without one, a signature is only noted.

    Raises:
        RunError: ``path`` is not a run folder.
        DataError: The run is of a newer version than this program reads.
        UsageError: The key cannot be used.
    """
    if not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} is not a run folder: it has no recipe.yaml", "give the folder that `perdure run` wrote")
    found = Audit(signed=(path / SIGNATURE).is_file())
    if key is not None:
        from perdure.audit.signature import signature_problem

        if problem := signature_problem(path, key):
            found.problems.append(problem)
    elif found.signed:
        found.notes.append("the run is signed; give --verify PUBLIC_KEY to check the signature")
    if found.signed and (path / SIGNATURE).stat().st_size != 64:
        found.tell(SIGNATURE, "is no signature: it must have 64 bytes")
    stream: DescribedStream | None = None
    try:
        stream = read_stream(path / "stream.json")
    except DataError as error:
        found.problems.append(error.what)
    run = RunFolder(path)
    try:
        recipe = run.recipe()
        tracker, least = recipe.name.replace("/", "-"), recipe.privacy.min_images
    except RunError as error:
        found.problems.append(error.what)
        tracker, least = "", MIN_IMAGES
    names = [task.name for task in stream.tasks] if stream is not None else []
    folders = sealed_folders(path, names)
    places = Places.walk(path, found)
    sealed = read_sealed(folders, found)
    number, next_task = len(folders), None
    if number < len(names):
        next_task = (number, task_folder(path, number, names[number]).name)
    listed = audit_files(path, places, sealed, next_task, tracker, found)
    # who edits stream.json alone does not make images of patients others: any file that says so counts
    patients = stream is None or stream.patients or any(led["patients"] for led in sealed.ledgers.values())
    audit_ledgers(path, sealed, stream, patients, least, found)
    if listed is not None and stream is not None:
        audit_contents(path, stream, folders, places, found)
        _audit_weights(run, stream, sealed, found)
    look_for_names(path, places, found)
    if next_task is not None:
        found.notes.append("the run is not finished: the state of the task under way is listed, but not looked into")
    return found


def _audit_weights(run: RunFolder, stream: DescribedStream, sealed: Sealed, found: Audit) -> None:
    """Build the method without its data, and see that what is called weights are the weights that it has by then.

    A buffer that holds images would not be among them, or not have the shape. A method of one's own is not imported.
    """
    from perdure.config.build import build_method
    from perdure.config.load import refuse_foreign_code
    from perdure.kept.ledger import read_files, weight_names
    from perdure.sealing import begin
    from perdure.streams.description import restore

    try:
        recipe = run.recipe()
        refuse_foreign_code(recipe, "recipe.yaml")
    except UsageError:
        found.notes.append("the run names code outside of Perdure: that its weights are weights was not checked")
        return
    except RunError:
        return  # told already
    try:
        tasks = restore(stream).tasks
        method = build_method(recipe, tasks[0].preparation, pretrained=False)
        for task, folder in zip(tasks, sealed.folders, strict=False):
            begin(method, task, recipe.seed)
            own = {name: list(method.state_dict()[name].shape) for name in weight_names(method)}
            ledger = sealed.ledgers.get(folder.name)
            if ledger is None:
                return  # told already
            for tensor in (t for entry in ledger["items"] if entry["name"] == "weights" for t in entry["tensors"]):
                if own.get(tensor["name"]) != tensor["shape"]:
                    found.tell(tensor["file"], f"'{tensor['name']}' is called a weight, but is none of the network")
            method.files = read_files(folder)
    except PerdureError as error:
        found.problems.append(f"the model cannot be built from recipe.yaml: {error.what}")
