"""Reading recipes: shipped or own YAML, overrides, plain errors with the nearest key."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from perdure.config.recipe import Recipe
from perdure.errors import UsageError, nearest
from perdure.files import write_text


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name such as ``star/voc-15-1-overlap``."""
    root = Path(str(resources.files("perdure"))) / "recipes"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file and apply ``key.sub=value`` overrides.

    Raises:
        UsageError: Unknown recipe, unreadable YAML, unknown key, wrong type or value: names the key.
    """
    return parse_recipe(_override(read_raw(name), overrides), name)


def read_raw(name: str) -> dict[str, Any]:
    """Plain content of a recipe by shipped name or file path."""
    path = shipped().get(name) or Path(name)
    if not path.is_file():
        raise UsageError(f"there is no recipe '{name}'", f"{nearest(name, shipped())}, or give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UsageError(f"{path} is not a recipe: it must be a mapping of keys", "see docs/reference/recipes.md")
    return raw


def parse_recipe(raw: Mapping[str, Any], origin: str) -> Recipe:
    """Check plain content against the schema."""
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        raise UsageError(*explain(error, Recipe, f"recipe '{origin}'")) from error


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, without the places of files on this machine."""
    plain = _without_places(json.loads(recipe.model_dump_json()))
    plain["data"]["root"] = None
    plain["stream"]["partition_file"] = None
    plain["stream"]["pool_folder"] = None
    write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def data_of_task(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that names a task's data, without places on a machine."""
    plain: dict[str, Any] = _without_places(json.loads(recipe.data.model_dump_json()))
    del plain["root"]
    return plain


def _without_places(value: Any) -> Any:
    """Plain values in which a file or folder given by a path is given by its name alone."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and _is_place(value):
        return PureWindowsPath(value).name  # takes both kinds of slash
    return value


def _is_place(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith(("~", "../"))


def same_experiment(old: Recipe, new: Recipe) -> str | None:
    """First key outside the tasks whose value differs in a way that changes results, or ``None``.

    Data and stream do not count: they say which tasks there are, which is compared task by task, so that a stream can
    grow at its end (:meth:`perdure.streams.description.DescribedStream.continued_by`).
    """
    a, b = (_flat(_without_places(json.loads(recipe.model_dump_json()))) for recipe in (old, new))
    free = ("data.", "stream.", "engine.", "report.", "evaluate.batch_size", "about")
    matters = [k for k in sorted(a.keys() | b.keys()) if not k.startswith(free) or k == "engine.precision"]
    return next((k for k in matters if a.get(k) != b.get(k)), None)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> tuple[str, str]:
    """Turn pydantic's first complaint into one line and a hint."""
    first = error.errors()[0]
    path, field = _place(model, first["loc"])
    if first["type"] == "extra_forbidden":
        known = dict(_fields(_model_at(model, first["loc"][:-1])))
        return f"{where}: unknown key '{path}'", nearest(str(first["loc"][-1]), known) if known else "it has no options"
    about = f"{path}: {field.description}" if field is not None and field.description else ""
    if first["type"] == "missing":
        return f"{where}: the key '{path}' is missing", about
    if first["type"] in ("model_type", "dict_type"):
        return f"{where}: {path} is not a mapping of keys (got {first['input']!r:.80})", about
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r:.80})"
    at = f"{path}: " if path else ""
    return f"{where}: {at}{message[0].lower()}{message[1:]}{got}", about


def _place(model: type[BaseModel], location: Sequence[int | str]) -> tuple[str, FieldInfo | None]:
    """Key of a complaint and its field, without the names that pydantic gives to the choices of a union."""
    keys: list[str] = []
    field = None
    for depth, part in enumerate(location):
        inner = _model_at(model, location[:depth])
        known = inner.model_fields.get(str(part))
        if field is not None and known is None and not isinstance(part, int) and not _has_model(field):
            break
        keys.append(str(part))
        field = known or field
    return ".".join(keys), field


def split_override(text: str) -> tuple[str, Any]:
    """Key and value of ``key=value``, the value read as YAML. Raises UsageError where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"'{text}' is not an override", "write key=value, for example training.epochs=5")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        hint = "quote what YAML would misread, for example 'name=\"a: b\"'"
        raise UsageError(f"the value of '{key}' cannot be read: {value}", hint) from error


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        key, value = split_override(text)
        at = raw
        *parents, leaf = key.split(".")
        for part in parents:
            inside: Any = at.get(part)
            if isinstance(inside, str):  # `method: star`, then method.option=...
                inside = at[part] = {"name": inside}
            if inside is None:
                inside = at[part] = {}
            if not isinstance(inside, dict):
                raise UsageError(f"'{key}' cannot be set: '{part}' is a single value", f"write {part}=VALUE")
            at = inside
        at[leaf] = value
    return raw


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    for part in location:
        field = model.model_fields.get(str(part))
        inner = next((t for t in _types(field.annotation) if _is_model(t)), None) if field else None
        if inner is None:
            return model
        model = inner
    return model


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    yield from model.model_fields.items()


def _has_model(field: FieldInfo) -> bool:
    return any(_is_model(kind) for kind in _types(field.annotation))


def _types(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
