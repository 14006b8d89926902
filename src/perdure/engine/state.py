"""The state of a phase under way as one safetensors file: tensors flat, the rest as JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import RunError
from perdure.files import read_tensors, write_tensors
from perdure.kept.method_state import hash_of
from perdure.kept.store import FileStore

HEADER, DIGEST = "perdure", "sha256"
_TENSOR, _INT_KEYS = "$tensor", "$int"  # marks of a reference to a tensor, and of a dictionary with integer keys

State = dict[str, Any]
"""Tensors, numbers and texts in dictionaries and lists; only who saved a state knows what its entries are."""


class Stateful(nn.Module):
    """A module with all that a run saves of it: parameters, buffers, and the names of files that it keeps.

    Attributes:
        files: Names in the store, in order, by a name of the method's choice. Checkpoints and ledgers hold these
            names only, so memory in files makes no save slower. Whole entries are replaced, not changed in place.
        store: Where the files are; the run's from before the first ``begin`` on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, tuple[str, ...]] = {}
        self.store = FileStore()


def flatten(tree: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Replace tensors in nested dicts and lists by references; they are put into ``tensors`` by path.

    Dictionaries with integer keys (optimiser states) are marked so that :func:`unflatten` restores them.
    """
    match tree:
        case Tensor():
            tensors[name] = tree
            return {_TENSOR: name}
        case Mapping():
            body = {str(k): flatten(v, f"{name}/{k}", tensors) for k, v in tree.items()}
            return {_INT_KEYS: body} if tree and {type(k) for k in tree} == {int} else body
        case list() | tuple():
            return [flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(tree)]
        case _:
            return tree


def unflatten(skeleton: object, tensors: Mapping[str, Tensor]) -> object:
    """Inverse of :func:`flatten`; tuples come back as lists."""
    match skeleton:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$int": dict(body)}:
            return {int(k): unflatten(v, tensors) for k, v in body.items()}
        case dict():
            return {k: unflatten(v, tensors) for k, v in skeleton.items()}
        case list():
            return [unflatten(v, tensors) for v in skeleton]
        case _:
            return skeleton


def save_tree(path: Path, tree: State) -> None:
    """Write a nested state atomically."""
    tensors: dict[str, Tensor] = {}
    header = json.dumps(flatten(tree, "", tensors))
    write_tensors(path, tensors, {HEADER: header, DIGEST: _digest(header, tensors)})


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        whole.update(f"{name} {hash_of(tensors[name])}\n".encode())
    return whole.hexdigest()


def load_tree(path: Path) -> State:
    """Read a nested state written by :func:`save_tree`.

    Raises:
        RunError: The file holds something else, or was changed.
    """
    from safetensors import SafetensorError, safe_open

    tensors = read_tensors(path)
    try:
        with safe_open(str(path), "pt") as opened:
            metadata = opened.metadata() or {}
        # states saved by earlier versions have no digest
        if metadata.get(DIGEST, (whole := _digest(metadata[HEADER], tensors))) != whole:
            raise RunError(f"{path} is damaged or was changed (hash differs)", "delete it to start the task again")
        tree = unflatten(json.loads(metadata[HEADER]), tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} is not a saved state of this program", "delete it to start the task again") from error
    match tree:
        case dict():
            return tree
    raise RunError(f"{path} is not a saved state of this program", "delete it to start the task again")


def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put saved tensors back: parameters in place (same shape), buffers as they were, of whatever shape.

    Buffers may grow with the classes or be ``None`` at times, so a saved buffer replaces the present one and
    a buffer that was not saved becomes ``None``. ``load_state_dict`` would refuse both.

    Raises:
        RunError: A parameter is missing, unknown or has another shape.
    """
    another = "was the run made by another recipe?"
    parameters = dict(module.named_parameters())
    if missing := [name for name in parameters if name not in state]:
        raise RunError(f"the saved weights lack {len(missing)} tensors, first '{missing[0]}'", another)
    buffers = {
        f"{prefix}.{leaf}" if prefix else leaf: (owner, leaf)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for leaf in owner._buffers
    }
    for name, (owner, leaf) in buffers.items():
        if name not in state and leaf not in owner._non_persistent_buffers_set:
            owner._buffers[leaf] = None
    nearby = next(iter(parameters.values()), torch.empty(0)).device
    for name, value in state.items():
        if name in parameters:
            if parameters[name].shape != value.shape:
                raise RunError(
                    f"saved weight '{name}' has shape {tuple(value.shape)}, the network wants "
                    f"{tuple(parameters[name].shape)}",
                    another,
                )
            with torch.no_grad():
                parameters[name].copy_(value)
        elif name in buffers:
            owner, leaf = buffers[name]
            present = owner._buffers[leaf]
            # a copy, for products of tensors that lie unaligned in a mapped file differ in the last bit
            owner._buffers[leaf] = value.to(nearby if present is None else present.device, copy=True)
        else:
            raise RunError(f"the saved weights hold '{name}', which the network does not have", another)
