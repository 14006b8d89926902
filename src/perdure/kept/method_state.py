"""A method's state where a task ends: written to files that a ledger lists, and read back from them.

Nothing that did not change is written again: the ledger then names the file of an earlier task.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perdure.errors import DataError, RunError
from perdure.files import read_tensors, write_tensors
from perdure.kept.items import Kept
from perdure.kept.ledger import (
    AVERAGED,
    LONGEST_NAME,
    MOST_WORDS,
    Entry,
    StoredTensor,
    describe,
    is_picture,
    read_ledger,
    run_of,
)
from perdure.kept.store import STORE, FileStore

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS: Final = Kept("weights", "weights", (), "training on the data of this and all earlier tasks")


def write_kept(
    folder: Path,
    state: Mapping[str, Tensor],
    items: Sequence[Kept],
    classes: int,
    files: Mapping[str, Sequence[str]] | None = None,
    store: FileStore | None = None,
    before: Path | None = None,
    least: int = 0,
    own: Collection[str] | None = None,
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
        least: Number of images that a statistic which looks like an image must come from; 0 where no patient is shown.
        own: Entries of ``state`` that are weights (:func:`weight_names`); any other one needs an item. ``None``: all.

    Returns:
        Ledger entries.

    Raises:
        RunError: An item names a key or files that the method does not have, two claim one, files have no item, a
            buffer is neither a weight nor an item's, or an item with pictures does not say from how many images.
        DataError: A statistic that looks like an image comes from too few images of patients. Nothing is written.
    """
    files, store = files or {}, store or FileStore()
    _check_claims(state, items, files, own)
    earlier = read_ledger(before)["items"] if before is not None else []
    from_images = {item.name: _from_images(item, state, earlier, least) for item in items}
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
            new = describe(folder, folder / place)
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
            "from_images": from_images.get(item.name),
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


def _from_images(item: Kept, state: Mapping[str, Tensor], earlier: Sequence[Entry], least: int) -> int | None:
    """Least number of images that a picture of an item comes from: of this task's classes, and of earlier ones."""
    pictures = item.shows == "images" or any(is_picture(state[key].shape) for key in item.keys)
    if item.kind not in AVERAGED or not pictures:
        return item.from_images
    if item.from_images is None and item.kind == "preview" and not least:
        return None
    if item.from_images is None:
        raise RunError(
            f"kept item '{item.name}' holds statistics that look like images, but not from how many images they come",
            "give Kept(from_images=...), the least number of any class of the task",
        )
    before = next((e["from_images"] for e in earlier if e["name"] == item.name), None)
    fewest = item.from_images if before is None else min(before, item.from_images)
    if fewest < least:
        raise DataError(
            f"'{item.name}' would keep pictures that are averages of only {fewest} images of patients; "
            f"at least {least} are needed",
            "learn these classes from more images, take a method or a method.replay that keeps no such pictures (star, "
            "finetune or lwf without impressions), or lower privacy.min_images",
        )
    return fewest


def weight_names(module: nn.Module) -> set[str]:
    """Entries of ``state_dict()`` that are a network's own: parameters, and running statistics per channel.

    Any other buffer may hold anything of the data, so it needs an item that says what it is.
    """
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for prefix, part in module.named_modules(remove_duplicate=False):
        mean = part._buffers.get("running_mean")  # of all sorts of normalisation, frozen ones of timm included
        if mean is None or mean.ndim != 1 or len(mean) != getattr(part, "num_features", len(mean)):
            continue
        for name, buffer in part._buffers.items():
            if buffer is not None and (buffer.ndim == 0 or buffer.shape == mean.shape):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def _check_claims(
    state: Mapping[str, Tensor],
    items: Sequence[Kept],
    files: Mapping[str, Sequence[str]],
    own: Collection[str] | None,
) -> None:
    keys = Counter(key for item in items for key in item.keys)
    names = Counter(item.files for item in items if item.files is not None)
    for item in items:
        if len(item.name) > LONGEST_NAME or len(item.made_from) > MOST_WORDS:
            raise RunError(
                f"kept item '{item.name[:LONGEST_NAME]}' has a name of more than {LONGEST_NAME} characters, or says in "
                f"more than {MOST_WORDS} what it was made from"
            )
        if bad := [k for k in item.keys if k not in state or keys[k] > 1]:
            raise RunError(
                f"kept item '{item.name}' claims '{bad[0]}', which is not in the method's state or not its own"
            )
        if item.files is not None and (item.files not in files or names[item.files] > 1):
            raise RunError(
                f"kept item '{item.name}' claims the files '{item.files}', which are not there or not its own"
            )
    if own is not None and (stray := [k for k in state if k not in keys and k not in own]):
        raise RunError(
            f"the method's buffer '{stray[0]}' would be kept, but no kept item names it and it is no weight",
            "name it in kept(), or set it to None before the task ends (docs/adding-a-method.md)",
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
        DataError: The ledger or a file is missing or damaged, a tensor is not the one that was sealed, or a weight is
            not finite.
    """
    wanted: dict[str, dict[str, str]] = {}
    weights: list[StoredTensor] = []
    for entry in read_ledger(folder)["items"]:
        weights += entry["tensors"] if entry["kind"] == "weights" else []
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
    for tensor in weights:  # hashes can be right and the model still be broken; statistics may hold NaN for "none"
        if not bool(state[tensor["name"]].isfinite().all()):
            raise DataError(
                f"{run_of(folder) / tensor['file']}: the weight '{tensor['name']}' is not finite",
                "the model cannot predict anything: restore the file, or start a new run",
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
