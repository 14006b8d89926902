"""Reading recipes: shipped or own YAML, overrides, plain errors with the nearest key."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from perdure.config.recipe import DataSection, Recipe, StreamSection
from perdure.errors import UsageError, nearest
from perdure.files import parse_yaml, write_text
from perdure.foreign import is_foreign

Plain = dict[str, JsonValue]
"""Content of a YAML file: texts, numbers, lists and mappings."""


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name such as ``star/voc-15-1-overlap``."""
    root = Path(str(resources.files("perdure"))) / "recipes"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file and apply ``key.sub=value`` overrides.

    Raises:
        UsageError: Unknown recipe, unreadable YAML, unknown key, wrong type or value: names the key.
    """
    return parse_recipe(override(read_raw(name), overrides), name)


def read_raw(name: str) -> Plain:
    """Plain content of a recipe by shipped name or file path."""
    path = shipped().get(name) or Path(name)
    if path.is_dir():
        if (path / "recipe.yaml").is_file():
            hint = f"to go on with it, give the command that began it, with --out {name} --resume"
            raise UsageError(f"{name} is a run folder, not a recipe", hint)
        hint = f"perdure check --data {name} looks at data in it, perdure run data-sets/volumes --data {name} learns it"
        raise UsageError(f"{path} is a folder, not a recipe", hint)
    if not path.is_file():
        raise UsageError(f"there is no recipe '{name}'", f"{nearest(name, shipped())}, or give the path of a YAML file")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UsageError(f"{path} is not a recipe: it must be a mapping of keys", "see docs/reference/recipes.md")
    return raw


def parse_recipe(raw: Mapping[str, object], origin: str) -> Recipe:
    """Check plain content against the schema."""
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        raise UsageError(*explain(error, Recipe, f"recipe '{origin}'")) from error


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, without the places of files on this machine."""
    plain = recipe.model_dump(mode="json", exclude={"engine": {"working"}})
    plain = {key: value for key, value in plain.items() if value is not None or key != "data"}
    stream = plain["stream"]
    for section in (plain.get("data"), *(task["data"] for task in stream.get("tasks", ()))):
        if section is not None:
            section["root"] = None
    stream.update({key: None for key in ("root", "partition_file", "pool_folder") if key in stream})
    write_text(path, yaml.safe_dump(_without_places(plain), sort_keys=False, allow_unicode=True))


def data_of_tasks(recipe: Recipe, tasks: int) -> list[Plain]:
    """The part of a recipe that names the data of each of so many tasks, without places on a machine."""
    if isinstance(recipe.stream, StreamSection):
        return [_data(recipe.sets[0])] * tasks
    told = {"classes", "rename", "annotated"}
    sets = [
        _data(task.data) | task.model_dump(mode="json", include=told, exclude_defaults=True)
        for task in recipe.stream.tasks
    ]
    return sets if tasks == len(sets) else [{"sets": [*sets]}] * tasks  # joint training has one task of all sets


def _data(section: DataSection) -> Plain:
    absent = {"root"} if section.validation is not None else {"root", "validation"}
    return {k: _without_places(v) for k, v in section.model_dump(mode="json", exclude=absent).items()}


def _without_places(value: JsonValue) -> JsonValue:
    """Plain values in which a file or folder given by a path is given by its name alone."""
    match value:
        case dict():
            return {key: _without_places(inner) for key, inner in value.items()}
        case list():
            return [_without_places(inner) for inner in value]
        case str() if "/" in value or "\\" in value:
            windows = PureWindowsPath(value)  # takes both kinds of slash
            absolute = PurePosixPath(value).is_absolute() or windows.is_absolute()
            return windows.name if absolute or value.startswith(("~", "../")) else value
        case _:
            return value


def same_experiment(old: Recipe, new: Recipe) -> str | None:
    """First key outside the tasks whose value differs in a way that changes results, or ``None``.

    Data and stream do not count: they say which tasks there are, which is compared task by task, so that a stream can
    grow at its end (:meth:`perdure.streams.description.DescribedStream.continued_by`).
    """
    a, b = (_flat(_without_places(recipe.model_dump(mode="json"))) for recipe in (old, new))
    # data and stream are compared task by task; the others but precision change speed or presentation only
    # volumes.view names the kind of preparation, which is compared task by task too
    free = ("data.", "stream.", "engine.", "report.", "evaluate.batch_size", "about", "volumes.view")
    matters = [k for k in sorted(a.keys() | b.keys()) if not k.startswith(free) or k == "engine.precision"]
    return next((k for k in matters if a.get(k) != b.get(k)), None)


def refuse_foreign_code(recipe: Recipe, where: str, data: bool = True) -> None:
    """Raise UsageError if a recipe names code outside of this package: its author would run it on this machine.

    Args:
        recipe: The recipe.
        where: Where it is from, for the message.
        data: Whether its reader of data would be imported; for a prediction it is not.
    """
    names = (recipe.method.name, recipe.network.name, *((part.name for part in recipe.sets) if data else ()))
    if foreign := next(filter(is_foreign, names), None):
        raise UsageError(
            f"{where} names code outside of Perdure: '{foreign}'",
            "it would be run; add --allow-code if you trust it",
        )


def explain(error: ValidationError, model: type[BaseModel], where: str) -> tuple[str, str]:
    """Turn pydantic's first complaint into one line and a hint."""
    whole = model
    first = error.errors()[0]
    keys: list[str] = []
    field: FieldInfo | None = None
    for part in first["loc"]:
        if field is not None and part in (tags := _kinds(field)):  # pydantic names the chosen kind, which is no key
            model = tags[part]
            continue
        if isinstance(part, int) and field is not None:  # an entry of a list, counted from 1 as in an override
            keys.append(str(part + 1))
            model = _section(field) or model
            continue
        known = model.model_fields.get(str(part))
        # below a key that is no section, pydantic names the choices of a union, which are no keys
        if field is not None and known is None and not isinstance(part, int) and _section(field) is None:
            break
        keys.append(str(part))
        field, model = known or field, _section(known) or model
    path, at = ".".join(keys), f"{'.'.join(keys)}: " if keys else ""
    about = f"{path}: {field.description}" if field is not None and field.description else ""
    got = f" (got {first['input']!r:.80})"
    if first["type"] == "extra_forbidden":
        options = model.model_fields
        if not options:
            return f"{where}: unknown key '{path}'", "it has no options"
        return f"{where}: unknown key '{path}'", _nearest_key(keys, whole, options)
    if first["type"] == "missing":
        return f"{where}: the key '{path}' is missing", about
    if first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{where}: {path} is not a mapping of keys{got}", about
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {at}{message[0].lower()}{message[1:]}{'' if type(first['input']) is dict else got}", about


def _nearest_key(keys: Sequence[str], whole: type[BaseModel], siblings: Iterable[str]) -> str:
    """``"did you mean 'training.epochs'?"``: the whole key as it is written, also where another section has it.

    Exactly the last part in another section goes before a similar word in the section that was typed.
    """
    word, above = keys[-1], ".".join(keys[:-1])
    near = {f"{above}.{name}" if above else name: name for name in siblings}
    far = {
        f"{section}.{name}": name
        for section, field in whole.model_fields.items()
        for name in getattr(_section(field), "model_fields", ())
        if section != above
    }
    if same := [key for key, name in far.items() if name == word]:
        return f"did you mean {' or '.join(f'{key!r}' for key in same)}?"
    best = max((SequenceMatcher(None, word, name).ratio(), key in near, key) for key, name in (near | far).items())
    return f"did you mean '{best[2]}'?" if best[0] >= 0.7 else nearest(word, siblings)


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model of a key that is a section of keys, or a list of sections, also where it may be left out."""
    return next(iter(_models(field.annotation)), None) if field is not None else None


def _models(kind: object) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in typing.get_args(kind):
        yield from _models(inner)


def _kinds(field: FieldInfo) -> dict[str | int, type[BaseModel]]:
    """Sections by their ``kind``, where a key takes one of several."""
    models = [model for model in _models(field.annotation) if "kind" in model.model_fields]
    return {word: model for model in models for word in typing.get_args(model.model_fields["kind"].annotation)}


def split_override(text: str) -> tuple[str, JsonValue]:
    """Key and value of ``key=value``, the value read as YAML. Raises UsageError where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"'{text}' is not an override", "write key=value, for example training.epochs=5")
    try:
        # YAML reads `{128:1}`, without the space that shells make a nuisance, as a key of base 60 with no value
        return key, parse_yaml(re.sub(r"(?<=[{,\s])(\d+):(?=[^\s,}])", r"\1: ", value) if value[:1] == "{" else value)
    except (yaml.YAMLError, ValueError) as error:
        hint = "quote what YAML would misread, for example 'name=\"a: b\"'"
        raise UsageError(f"the value of '{key}' cannot be read: {value}", hint) from error


def override(raw: Plain, overrides: Sequence[str]) -> Plain:
    """Set ``key.sub=value`` in plain content, in place. Raises UsageError where a key cannot be set."""
    for text in overrides:
        key, value = split_override(text)
        at: Plain | list[JsonValue] = raw
        *parents, leaf = key.split(".")
        for part in parents:
            match inside := _at(at, part, key):
                case dict() | list():
                    at = inside
                case None | str():  # `method: star`, then method.option=...
                    inner: Plain = {} if inside is None else {"name": inside}
                    _put(at, part, inner, key)
                    at = inner
                case _:
                    raise UsageError(f"'{key}' cannot be set: '{part}' is a single value", f"write {part}=VALUE")
        _put(at, leaf, value, key)
    return raw


def _at(inside: Plain | list[JsonValue], part: str, key: str) -> JsonValue:
    """What a mapping or a list holds at one part of a key; entries of a list are counted from 1."""
    return inside.get(part) if isinstance(inside, dict) else inside[_place(inside, part, key)]


def _put(inside: Plain | list[JsonValue], part: str, value: JsonValue, key: str) -> None:
    if isinstance(inside, dict):
        inside[part] = value
    else:
        inside[_place(inside, part, key)] = value


def _place(inside: Sequence[JsonValue], part: str, key: str) -> int:
    if part.isdecimal() and 1 <= int(part) <= len(inside):
        return int(part) - 1
    raise UsageError(
        f"'{key}' cannot be set: '{part}' is none of the {len(inside)} entries", "they are numbered from 1"
    )


def _flat(tree: JsonValue, prefix: str = "") -> Plain:
    """Values by their whole keys, ``stream.base``."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}
