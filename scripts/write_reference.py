"""Write the reference pages of the docs from the schema of recipes and the tables of figures, methods and data.

With ``--check`` nothing is written: it fails if a page is not what it should be.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from perdure.config.build import method_class
from perdure.config.recipe import Recipe
from perdure.data.catalog import DATASETS
from perdure.methods import METHODS
from perdure.metrics.definitions import describe
from perdure.networks.build import NETWORKS, network_options

WRITTEN = "<!-- Written by `make docs`; do not edit. -->\n"


def main(arguments: list[str]) -> int:
    """Write or check the pages of a folder; returns the exit status."""
    check = "--check" in arguments
    (folder,) = [Path(a) for a in arguments if a != "--check"]
    stale = []
    for name, text in {"recipes.md": recipes_page(), "figures.md": figures_page()}.items():
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


def recipes_page() -> str:
    """Keys of recipes, then the further keys that each method, network and data set brings."""
    schema = Recipe.model_json_schema()
    sections = {key: _section(schema, prop) for key, prop in schema["properties"].items()}
    parts = [
        "# Recipe reference\n\n" + WRITTEN,
        "One YAML file, checked before anything starts. On the command line `key.sub=value` replaces a value, and\n"
        "`method=finetune` a whole section by its name alone.\n",
        "## Top level\n\n" + _table({k: p for k, p in schema["properties"].items() if not sections[k]}, schema),
    ]
    for key, section in sections.items():
        if section:
            parts.append(f"## `{key}`\n\n{section['description']}\n\n" + _table(section["properties"], section))
    for name, entry in METHODS.items():
        own = method_class(name).Options.model_json_schema()
        parts.append(f"## `method: {name}`\n\n{_sentence(entry.summary)}\n\n" + _table(own.get("properties", {}), own))
    for name, network in NETWORKS.items():
        parts.append(f"## `network: {name}`\n\n{_sentence(network.summary)}\n\n" + _defaults(network_options(name)))
    for name, data in DATASETS.items():
        module, _, function = data.target.partition(":")
        known = inspect.signature(getattr(import_module(module), function)).parameters
        text = _sentence(data.summary) + (f" Layout: `{data.layout}`" if data.layout else "")
        options = {key: p.default for key, p in known.items() if key != "root"}
        parts.append(f"## `data: {name}`\n\n{text}\n\n" + _defaults(options))
    return "\n".join(parts)


def figures_page() -> str:
    """Every figure with its definition and variants."""
    parts = [
        "# Figures and their definitions\n\n" + WRITTEN,
        "A figure's full name carries its definition. Options that are not written have the first value listed.\n",
    ]
    for row in describe():
        low, high = row["range"]
        lines = [
            f"## `{row['name']}`\n",
            f"{row['meaning']} In {row['unit']}, {low:g} to {high:g}, {row['better']} is better.",
            f"Source: {row['source']}.",
        ]
        if row["options"]:
            lines.append(f"Default: `{row['default']}`.\n")
            lines += [f"* `{o['name']}={v}`: {text}" for o in row["options"] for v, text in o["values"].items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _section(schema: Mapping[str, Any], prop: Mapping[str, Any]) -> Any:
    """Definition of a key that is a section of its own, else None."""
    name = str(prop.get("$ref", "")).rpartition("/")[2]
    return schema["$defs"].get(name)


def _table(properties: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if not properties:
        return "No options.\n"
    required = schema.get("required", ())
    rows = []
    for key, prop in properties.items():
        default = "required" if key in required else _value(prop["default"])
        rows.append(f"| `{key}` | {_kind(prop)} | {default} | {_cell(prop.get('description', ''))} |")
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _defaults(options: Mapping[str, Any]) -> str:
    if not options:
        return "No options.\n"
    rows = [f"| `{key}` | {'required' if v is inspect.Parameter.empty else _value(v)} |" for key, v in options.items()]
    return "\n".join(["| key | default |", "|---|---|", *rows]) + "\n"


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
