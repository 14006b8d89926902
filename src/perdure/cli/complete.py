"""Tab completion: names that begin with what was typed. Nothing heavy is imported, or a key would take seconds."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import typer

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def is_override(word: str) -> bool:
    """True for ``key=value`` and ``key.sub=value``; a folder with such a name is written ``./NAME``."""
    return _OVERRIDE.match(word) is not None


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes; files are completed by the shell where none fits."""
    from perdure.config.load import shipped

    return _beginning(incomplete, shipped())


def recipes_and_data(incomplete: str) -> list[str]:
    """What ``perdure check`` takes: recipes and data sets."""
    from perdure.data.catalog import DATASETS

    return recipes(incomplete) + _beginning(incomplete, DATASETS)


def lists(incomplete: str) -> list[str]:
    """What ``perdure list`` takes."""
    from perdure.cli.listing import LISTS

    return _beginning(incomplete, LISTS)


def phantoms(incomplete: str) -> list[str]:
    """What ``perdure phantoms`` takes."""
    from perdure.cli.phantoms import KINDS

    return _beginning(incomplete, KINDS)


def figures(incomplete: str) -> list[str]:
    """Figures that can be compared, each with its default definition: not those with one value per class."""
    from perdure.metrics.definitions import describe

    return _beginning(incomplete, (str(row["default"]) for row in describe() if row["scope"] != "class"))


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Keys of a recipe as ``section.key=``, and the values of those that have a fixed choice.

    Bash hands ``method=sta`` over as three words, ``method``, ``=`` and ``sta``, and ``method=`` as two, the second
    of which arrives here as nothing. It inserts an answer behind the sign. Other shells hand all over as one word.
    """
    from perdure.data.catalog import DATASETS

    words = (ctx.params.get("path"), *(ctx.params.get("overrides") or ()))
    given = [str(word) for word in words if word is not None]
    if given and not incomplete and given[-1] in _keys():
        return _choices(given[-1])
    if len(given) > 1 and given[-1] == "=":
        return _beginning(incomplete, _choices(given[-2]))
    if (data := str(ctx.params.get("what"))) in DATASETS and "=" not in incomplete:
        return _beginning(incomplete, (f"{option}=" for option in _reader_options(data)))
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={word}" for word in _beginning(value, _choices(key))]
    return _beginning(incomplete, (f"{key}=" for key in _keys()))


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _keys() -> list[str]:
    """Every key of the schema, with those of its sections; settings of one method or network are not among them."""
    from pydantic import BaseModel

    from perdure.config.recipe import Recipe

    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        keys.append(name)
        for kind in (field.annotation, *get_args(field.annotation)):  # a stream is of one of two kinds
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += [f"{name}.{inner}" for inner in kind.model_fields]
    return [*dict.fromkeys(keys), "network.weights"]  # not of the schema, but the one that most people have to set


def _reader_options(name: str) -> list[str]:
    """Options of a data set, from the text of its reader: to import it would import NumPy and Pillow."""
    from perdure.data.catalog import DATASETS, HELD_OUT

    module, function = DATASETS[name].target.split(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    options = [part.arg for part in (*found.args.args, *found.args.kwonlyargs) if part.arg != "root"]
    return [*options, HELD_OUT]


def _choices(key: str) -> list[str]:
    """Values of a key that takes one of a few."""
    from perdure.config.recipe import Recipe
    from perdure.data.catalog import DATASETS
    from perdure.methods import METHODS
    from perdure.networks.build import NETWORKS

    tables: dict[str, Iterable[str]] = {"data": DATASETS, "method": METHODS, "network": NETWORKS}
    if key.removesuffix(".name") in tables:
        return list(tables[key.removesuffix(".name")])
    if key == "network.weights":
        return ["random", "installed", "imagenet"]
    section, _, name = key.partition(".")
    field = Recipe.model_fields.get(section)
    options: list[object] = []
    for section_kind in (field.annotation, *get_args(field.annotation)) if field is not None else ():
        inner = getattr(section_kind, "model_fields", {}).get(name)
        kind = inner.annotation if inner is not None else None
        # of a union such as a choice or null, the choice
        options += (
            ["true", "false"] if kind is bool else [a for part in (kind, *get_args(kind)) for a in get_args(part)]
        )
    return list(dict.fromkeys(word for word in options if isinstance(word, str)))
