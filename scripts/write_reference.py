"""Write the reference pages of the docs from the schema of recipes, the tables of the package and the command line.

With ``--check`` nothing is written: it fails if a page is not what it should be.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import typer.main

from perdure.cli.app import app
from perdure.config.build import method_class
from perdure.config.recipe import Recipe
from perdure.data.catalog import DATASETS
from perdure.methods import METHODS
from perdure.metrics.definitions import describe
from perdure.networks.build import NETWORKS, network_options

WRITTEN: Final = "<!-- Written by `make docs`; do not edit. -->\n"


def main(arguments: list[str]) -> int:
    """Write or check the pages of a folder; returns the exit status."""
    check = "--check" in arguments
    (folder,) = [Path(a) for a in arguments if a != "--check"]
    stale = []
    for name, text in pages().items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path))
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'out of date, run `make docs`' if check else 'written'}: {', '.join(stale)}")
    return 1 if stale and check else 0


def pages() -> dict[str, str]:
    """All reference pages by file name."""
    return {"recipes.md": recipes_page(), "figures.md": figures_page(), "command-line.md": command_line_page()}


def recipes_page() -> str:
    """Keys of recipes, then the further keys that each method, network and data set brings."""
    schema = Recipe.model_json_schema()
    sections = {key: _sections(schema, prop) for key, prop in schema["properties"].items()}
    parts = [
        "# Recipe reference\n\n" + WRITTEN,
        "One YAML file, checked before anything starts. On the command line `key.sub=value` replaces a value, and\n"
        "`method=finetune` a whole section by its name alone.\n",
        "## Top level\n\n" + _table({k: p for k, p in schema["properties"].items() if not sections[k]}, schema),
    ]
    for key, found in sections.items():
        for section in found:
            kind = section["properties"].get("kind", {}).get("const") if len(found) > 1 else None
            title = f"{key}: {kind}" if kind else key
            parts.append(f"## `{title}`\n\n{section['description']}\n\n" + _table(section["properties"], section))
            parts += [
                f"### `{inner}`\n\n{one['description']}\n\n" + _table(one["properties"], one)
                for inner, prop in section["properties"].items()
                for one in _sections(schema, prop.get("items", {}))
            ]
    for name, entry in METHODS.items():
        own = method_class(name).Options.model_json_schema()
        known = own.get("properties", {})
        inner = {key: part for key, prop in known.items() if (part := _section(own, prop))}
        plain = {key: prop for key, prop in known.items() if key not in inner}
        parts.append(f"## `method: {name}`\n\n{_sentence(entry.summary)}\n\n" + _table(plain, own))
        parts += [
            f"### `{key}`\n\n{_sentence(known[key]['description'])}\n\n" + _table(part["properties"], part)
            for key, part in inner.items()
        ]
    for name, network in NETWORKS.items():
        text = _sentence(network.summary)
        parts.append(
            f"## `network: {name}`\n\n{text}\n\n" + _defaults(network_options(name), _function(network.target))
        )
    for name, data in DATASETS.items():
        reader = _function(data.target)
        text = _sentence(data.summary) + (f"\n\nLayout: `{data.layout}`." if data.layout else "")
        known = {key: p.default for key, p in inspect.signature(reader).parameters.items() if key != "root"}
        parts.append(f"## `data: {name}`\n\n{text}\n\n" + _defaults(known, reader))
    return "\n".join(parts)


def _function(target: str) -> Callable[..., Any]:
    """The builder or reader that ``module:function`` names."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def figures_page() -> str:
    """Every figure with its definition and variants."""
    parts = [
        "# Figures and their definitions\n\n" + WRITTEN,
        "A figure's full name carries its definition. Options that are not written have the first value listed.\n",
    ]
    for row in describe():
        lines = [
            f"## `{row['name']}`\n",
            f"{row['meaning']} In {row['unit']}, {row['bounds']}, {row['better']} is better.",
            f"Source: {row['source']}.",
        ]
        if row["options"]:
            lines.append(f"Default: `{row['default']}`.\n")
            lines += [f"* `{o['name']}={v}`: {text}" for o in row["options"] for v, text in o["values"].items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def command_line_page() -> str:
    """Every verb with its arguments and options."""
    parts = [
        "# The command line\n\n" + WRITTEN,
        "`perdure VERB --help` says the same. Exit status: 0 all went well, 1 the work could not be done (bad data, a\n"
        "failed audit, a full disk), 2 the command or the recipe is wrong and nothing was started. Every failure is\n"
        "one or two plain lines; `--debug` anywhere on the line adds the traceback.\n",
    ]
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        usage = " ".join(["perdure", name, *filter(None, map(_usage, verb.params))])
        rows = [f"| {_names(p)} | {_cell(p.help or '')} | {_preset(p)} |" for p in verb.params]
        table = ["| argument or option | meaning | default |", "|---|---|---|", *rows]
        parts.append("\n".join([f"## `{name}`\n", f"{verb.help}\n", f"```text\n{usage}\n```\n", *table]) + "\n")
    return "\n".join(parts)


def _usage(parameter: Any) -> str:
    """How one argument or option stands in the usage line; optional options are left to the table."""
    if parameter.param_type_name == "argument":
        word = "KEY=VALUE" if parameter.metavar else parameter.name.upper()
        word += " ..." if parameter.nargs == -1 else ""
        return word if parameter.required else f"[{word}]"
    return f"{parameter.opts[0]} {parameter.name.upper()}" if parameter.required else ""


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{'KEY=VALUE' if parameter.metavar else parameter.name.upper()}`"
    shown = ", ".join(f"`{o}`" for o in parameter.opts)
    return f"{shown} (may be repeated)" if parameter.multiple else shown


def _preset(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return f"`{parameter.default}`" if parameter.default and not parameter.is_flag else "–"


def _sections(schema: Mapping[str, Any], prop: Mapping[str, Any]) -> list[Any]:
    """Definitions of a key that is a section of its own, of one kind or of several; empty for a plain value."""
    options = [prop, *prop.get("anyOf", ()), *prop.get("oneOf", ())]
    return [found for option in options if (found := _section(schema, option))]


def _section(schema: Mapping[str, Any], prop: Mapping[str, Any]) -> Any:
    """Definition of a key that is a section of its own, else None."""
    name = str(prop.get("$ref", "")).rpartition("/")[2]
    return schema.get("$defs", {}).get(name)


def _table(properties: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if not properties:
        return "No options.\n"
    required = schema.get("required", ())
    rows = []
    for key, prop in properties.items():
        default = "required" if key in required else _value(prop.get("default"))
        rows.append(f"| `{key}` | {_kind(prop)} | {default} | {_cell(prop.get('description', ''))} |")
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _defaults(options: Mapping[str, Any], function: Callable[..., Any]) -> str:
    """Table of keyword arguments; their meaning comes from the function's docstring."""
    if not options:
        return "No options.\n"
    meaning = _arguments(inspect.getdoc(function) or "")
    preset = {key: "required" if v is inspect.Parameter.empty else _value(v) for key, v in options.items()}
    rows = [f"| `{key}` | {default} | {_cell(meaning[key])} |" for key, default in preset.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _arguments(docstring: str) -> dict[str, str]:
    """Text of each entry in the section ``Args`` of a docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\S|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL)
    return {name: re.sub(r"(?::\w+:)?(`+)~?([^`]+)\1", r"`\2`", text) for name, text in entries}


def _kind(prop: Mapping[str, Any]) -> str:
    """Words for the type of a key: ``integer ≥ 1``, ``one of `a`, `b```, ``list of number``."""
    if "anyOf" in prop:
        return " or ".join(_kind(option) for option in prop["anyOf"])
    if "enum" in prop or "const" in prop:
        values = prop.get("enum") or [prop["const"]]
        return "one of " + ", ".join(f"`{v}`" for v in values) if len(values) > 1 else f"`{values[0]}`"
    if prop.get("type") == "array":
        if "prefixItems" in prop:
            return " and ".join(_kind(item) for item in prop["prefixItems"])
        return f"list of {_kind(prop.get('items', {}))}"
    return " ".join([_word(prop), *_bounds(prop)])


def _word(prop: Mapping[str, Any]) -> str:
    if prop.get("format") == "path":
        return "path"
    kind = str(prop.get("type", "any"))
    return {"string": "text", "boolean": "true or false"}.get(kind, kind)


def _bounds(prop: Mapping[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {prop[key]:g}" for key, sign in signs.items() if key in prop]
    if limits:
        yield " and ".join(limits)


def _value(value: object) -> str:
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
