"""The state of a phase under way as one safetensors file: tensors flat, the rest as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import RunError
from perdure.files import read_tensors, write_tensors
from perdure.kept.store import FileStore

HEADER = "perdure"
_TENSOR = "$tensor"
_INT_KEYS = "$int"


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


def flatten(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors in nested dicts and lists by references; they are put into ``tensors`` by path.

    Dictionaries with integer keys (optimiser states) are marked so that :func:`unflatten` restores them.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        body = {str(k): flatten(v, f"{name}/{k}", tensors) for k, v in tree.items()}
        return {_INT_KEYS: body} if tree and all(isinstance(k, int) for k in tree) else body
    if isinstance(tree, list | tuple):
        return [flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(tree)]
    return tree


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`flatten`; tuples come back as lists."""
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            return tensors[skeleton[_TENSOR]]
        if _INT_KEYS in skeleton:
            return {int(k): unflatten(v, tensors) for k, v in skeleton[_INT_KEYS].items()}
        return {k: unflatten(v, tensors) for k, v in skeleton.items()}
    if isinstance(skeleton, list):
        return [unflatten(v, tensors) for v in skeleton]
    return skeleton


def save_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a nested state atomically."""
    tensors: dict[str, Tensor] = {}
    skeleton = flatten(tree, "", tensors)
    write_tensors(path, tensors, {HEADER: json.dumps(skeleton)})


def load_tree(path: Path) -> dict[str, Any]:
    """Read a nested state written by :func:`save_tree`."""
    from safetensors import SafetensorError, safe_open

    tensors = read_tensors(path)
    try:
        with safe_open(str(path), "pt") as opened:
            header = opened.metadata() or {}
        tree = unflatten(json.loads(header[HEADER]), tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} is not a saved state of this program", "delete it to start the task again") from error
    if not isinstance(tree, dict):
        raise RunError(f"{path} is not a saved state of this program", "delete it to start the task again")
    return tree


def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put saved tensors back: parameters in place (same shape), buffers as they were, of whatever shape.

    Buffers may grow with the classes or be ``None`` at times, so a saved buffer replaces the present one and
    a buffer that was not saved becomes ``None``.

    Raises:
        RunError: A parameter is missing, unknown or has another shape.
    """
    parameters = dict(module.named_parameters())
    missing = [name for name in parameters if name not in state]
    if missing:
        raise RunError(
            f"the saved weights lack {len(missing)} tensors, first '{missing[0]}'",
            "was the run made by another recipe?",
        )
    for name, owner, leaf in _buffer_slots(module):
        if leaf not in owner._non_persistent_buffers_set and name not in state:
            owner._buffers[leaf] = None
    with torch.no_grad():
        for name, value in state.items():
            if name in parameters:
                _fill(name, parameters[name], value)
            else:
                _set_buffer(module, name, value)


def _fill(name: str, parameter: Tensor, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise RunError(
            f"saved weight '{name}' has shape {tuple(value.shape)}, the network wants {tuple(parameter.shape)}",
            "was the run made by another recipe?",
        )
    parameter.copy_(value)


def _buffer_slots(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [
        (f"{prefix}.{leaf}" if prefix else leaf, owner, leaf)
        for prefix, owner in module.named_modules()
        for leaf in owner._buffers
    ]


def _set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    prefix, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(prefix)
    except AttributeError:
        owner = None
    if owner is None or leaf not in owner._buffers:
        raise RunError(
            f"the saved weights hold '{name}', which the network does not have",
            "was the run made by another recipe?",
        )
    present = owner._buffers[leaf]
    device = (
        present.device if present is not None else next((p.device for p in module.parameters()), torch.device("cpu"))
    )
    # a copy: tensors of a file lie in memory as they come, and products of unaligned ones differ in the last bit
    owner._buffers[leaf] = value.to(device, copy=True)
