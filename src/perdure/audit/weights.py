"""Weights of a run: what is called so has the names and shapes of the network's weights."""

from __future__ import annotations

from perdure.audit.findings import Audit
from perdure.audit.ledgers import Sealed
from perdure.config.build import build_method
from perdure.config.load import refuse_foreign_code
from perdure.config.recipe import Recipe
from perdure.errors import PerdureError, UsageError
from perdure.kept.method_state import read_files, weight_names
from perdure.sealing import begin
from perdure.streams.description import DescribedStream, restore


def audit_weights(recipe: Recipe, stream: DescribedStream, sealed: Sealed, found: Audit) -> None:
    """Build the method without its data, and see that what is called weights are the weights that it has by then.

    A buffer that holds images would not be among them, or not have the shape. A method of one's own is not imported.
    """
    try:
        refuse_foreign_code(recipe, "recipe.yaml")
    except UsageError:
        found.notes.append("the run names code outside of Perdure: that its weights are weights was not checked")
        return
    try:
        tasks = restore(stream).tasks
        method = build_method(recipe, tasks[0].preparation, pretrained=False)
        for task, folder in zip(tasks, sealed.folders, strict=False):
            begin(method, task, recipe.seed)
            own = {name: list(method.state_dict()[name].shape) for name in weight_names(method)}
            ledger = sealed.ledgers.get(folder.name)
            if ledger is None:
                return  # told already
            for tensor in (t for entry in ledger["items"] if entry["kind"] == "weights" for t in entry["tensors"]):
                if own.get(tensor["name"]) != tensor["shape"]:
                    found.tell(tensor["file"], f"'{tensor['name']}' is called a weight, but is none of the network")
            method.files = read_files(folder)
    except PerdureError as error:
        found.problems.append(f"the model cannot be built from recipe.yaml: {error.what}")
    except (MemoryError, ArithmeticError, RuntimeError, TypeError, ValueError, LookupError) as error:
        # torch, of a recipe that was edited: sizes that no machine has, and more
        found.problems.append(f"the model cannot be built from recipe.yaml: {' '.join(str(error).split())[:200]}")
