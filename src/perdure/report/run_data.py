"""A run folder as pages see it: read once, checked, complete or only partly done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from pydantic import JsonValue, TypeAdapter, ValidationError

from perdure.errors import DataError, RunError
from perdure.files import parse_yaml, read_json
from perdure.kept.ledger import LEDGER, sealed_folders
from perdure.metrics.measured import RunResults
from perdure.metrics.results import gather_results
from perdure.report.kept_items import KeptItem, read_items
from perdure.report.samples import Sample, read_samples
from perdure.streams.description import DescribedStream, read_stream

_ABSOLUTE: Final = re.compile(r"(?<![\w:./~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:]+[/\\])*([^\s/\\'\",;:]*)")
_PRIVATE: Final = frozenset({"host", "hostname", "user", "username", "cwd", "home"})
COMPARED: Final = ("training", "network", "augment", "volumes")
"""Sections of a recipe that have to agree if a difference between two runs is to be one of their methods."""
_MAPPING: Final = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True)
class RunData:
    """What pages show of a run.

    Args:
        name: Name of the folder.
        results: Its classes and tasks, counts after each measured task, figures of cases of runs that recorded them.
        sealed: Number of tasks that are done.
        ledgers: Kept items by task.
        samples: Test samples by task and name; empty where none may be shown.
        shown: Kept items that the report shows, by task; without raw images of patients, unless they may be shown.
        seconds: Time that each task took, by task, as the log says; of those whose end it holds.
        recipe: The resolved recipe.
        environment: Versions and machine.
    """

    name: str
    results: RunResults
    sealed: int
    ledgers: Mapping[int, tuple[KeptItem, ...]]
    samples: Mapping[int, dict[str, Sample]]
    shown: Mapping[int, tuple[KeptItem, ...]]
    seconds: Mapping[int, float]
    recipe: Mapping[str, JsonValue]
    environment: Mapping[str, JsonValue]

    @property
    def stream(self) -> DescribedStream:
        """Classes and tasks."""
        return self.results.stream

    @property
    def recipe_name(self) -> str:
        """Name of the recipe; empty where it has none."""
        return str(self.recipe.get("name") or "")

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(section(self.recipe, "method").get("name", "unknown"))

    @property
    def seed(self) -> int | None:
        """Seed of the run."""
        seed = self.recipe.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def finished(self) -> bool:
        """True where all tasks are sealed."""
        return self.sealed == len(self.stream.tasks)

    @property
    def settings(self) -> str:
        """The recipe without name and seed as text: equal for runs that differ by seed only."""
        # name and report change nothing that is measured
        kept = {k: v for k, v in self.recipe.items() if k not in ("seed", "name", "about", "report")}
        return json.dumps(kept, sort_keys=True, default=str)


def differing_settings(runs: Mapping[str, RunData]) -> list[str]:
    """What else but the method is not the same in runs, by label: "training.steps: 100 (lwf), 250 (star)".

    Options of methods are left out: they are the methods' own.
    """
    flat = {
        name: {k: v for part in COMPARED for k, v in _flat(run.recipe.get(part), part)} for name, run in runs.items()
    }
    told = []
    for key in sorted({key for settings in flat.values() for key in settings}):
        by_value: dict[str, list[str]] = {}
        for name, settings in flat.items():
            by_value.setdefault(json.dumps(settings.get(key)).strip('"'), []).append(name)
        if len(by_value) > 1:
            values = (f"{value} ({', '.join(names)})" for value, names in by_value.items())
            told.append(f"{key}: {', '.join(values)}")
    return told


def _flat(value: JsonValue, key: str) -> Iterator[tuple[str, JsonValue]]:
    """Settings of nested sections with their whole keys."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}")


def section(recipe: Mapping[str, JsonValue], key: str) -> Mapping[str, JsonValue]:
    """A section of a recipe; the short form ``key: NAME`` means a section that has only a name."""
    value = recipe.get(key)
    if isinstance(value, dict):
        return value
    return {} if value is None else {"name": value}


def load_run(path: Path) -> RunData:
    """Read a run folder; tasks that are not sealed yet are left out.

    Raises:
        RunError: The folder is not a run.
        DataError: A file of it is missing or damaged.
    """
    if not (path / "stream.json").is_file() or not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} is not a run folder", "give a folder that `perdure run` made (it holds recipe.yaml)")
    stream = read_stream(path / "stream.json")
    try:
        loaded = parse_yaml((path / "recipe.yaml").read_text(encoding="utf-8"))
        recipe = _MAPPING.validate_python(json.loads(json.dumps(loaded, default=str)))  # keys as text, dates as text
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"could not read {path / 'recipe.yaml'}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise DataError(f"{path / 'recipe.yaml'} is not a recipe: it must be a mapping of keys") from error
    environment = read_json(path / "environment.json") if (path / "environment.json").is_file() else {}
    folders = dict(enumerate(sealed_folders(path, [task.name for task in stream.tasks])))
    ledgers = {t: read_items(f) for t, f in folders.items() if (f / LEDGER).is_file()}
    # pictures of patients leave the run folder with the page: only where the recipe says so
    open_to_all = not stream.patients or bool(section(recipe, "report").get("patient_samples"))
    return RunData(
        name=path.resolve().name,
        results=gather_results(stream, list(folders.values())),
        sealed=len(folders),
        ledgers=ledgers,
        samples={t: read_samples(f / "samples") for t, f in folders.items()} if open_to_all else {},
        shown={t: _shown(items, stream.patients, open_to_all) for t, items in ledgers.items()},
        seconds=_seconds(path / "log.jsonl"),
        recipe=_MAPPING.validate_python(without_places(recipe)),
        environment=_MAPPING.validate_python(without_places(environment)),
    )


def _seconds(log: Path) -> dict[int, float]:
    """Time of each task from the lines that say it was sealed; a log is no reason to refuse a page."""
    ends: dict[int, float] = {}
    with suppress(OSError, UnicodeDecodeError):
        # a pipe may block for ever
        for text in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
            with suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                if line["event"] == "sealed":
                    ends[int(line["task"])] = float(line["seconds"])
    # the seconds of a log add up over all processes that worked on the run, and tasks count from 1 in it
    return {task - 1: end - ends.get(task - 1, 0.0) for task, end in ends.items() if task == 1 or task - 1 in ends}


def _shown(items: tuple[KeptItem, ...], patients: bool, open_to_all: bool) -> tuple[KeptItem, ...]:
    """Items that a page shows. Where averages are of few patients, synthetic images that start from them are too."""
    few = patients and any(item.few for item in items)
    return tuple(i for i in items if i.shows and (open_to_all or not i.raw) and not (few and i.shows == "images"))


def without_places(value: JsonValue) -> JsonValue:
    """Copy of plain values in which absolute paths keep their last part only and names of hosts and users are gone."""
    if isinstance(value, dict):
        return {k: without_places(v) for k, v in value.items() if str(k).lower() not in _PRIVATE}
    if isinstance(value, list):
        return [without_places(v) for v in value]
    return _ABSOLUTE.sub(lambda m: f"…/{m[1]}", value) if isinstance(value, str) else value
